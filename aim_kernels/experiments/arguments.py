"""Recorded options of AIM and its controls as arguments: results name plain numbers and words, AIM takes objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aim_kernels.aim.mixing import Alternate
from aim_kernels.aim.rules import RULES


def arguments_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`~aim_kernels.methods.make_method` takes, of options as results record them: ``confidence`` goes to
    the ``rule`` beside it, ``hold`` to ``Alternate``.

    Raises ValueError for a confidence without a rule, and for ``hold`` beside another mixing.
    """
    arguments = dict(options)
    if "confidence" in arguments:
        if arguments.get("rule") not in RULES:
            raise ValueError(f"confidence belongs to a rule; name one beside it in {dict(options)}")
        arguments["rule"] = RULES[arguments["rule"]](confidence=arguments.pop("confidence"))
    if "hold" in arguments:
        if arguments.get("mixing", "alternate") != "alternate":
            raise ValueError(f"hold belongs to mixing='alternate'; leave one of them out of {dict(options)}")
        arguments["mixing"] = Alternate(hold=arguments.pop("hold"))
    return arguments
