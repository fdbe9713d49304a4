"""The gate before the clock: every candidate must compute what it claims to, on a small copy."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from aim_kernels.bench.eager import EagerAIM
from aim_kernels.bench.peers import PLAIN, Candidate
from aim_kernels.bench.shapes import Arrays, ShapeSet

SMALL = ShapeSet("small", ((64, 65), (1,), (37,), (16, 1025)), "odd sizes, more than one chunk")
STEPS = 6
ATTEMPTS = 3
COMPARED = ("params", "exp_avg", "exp_avg_sq", "master")

#: The references contract into FMA where torch does, and fold constants differently: a few ulp of a parameter a step.
RELATIVE, ABSOLUTE = 1e-5, 2e-6


class WrongResultError(AssertionError):
    """A candidate disagrees with its reference: no time of it is worth printing."""


def verify(candidates: Iterable[Candidate], device: str = "cpu") -> None:
    """Run every candidate beside its reference; raise WrongResultError at the first element that differs.

    An element at the very edge of its class may fall on either side, since the references round otherwise: on a device,
    whose random numbers are its own, a candidate that differs may try again with others.
    """
    for candidate in candidates:
        for seed in range(ATTEMPTS if device != "cpu" else 1):
            try:
                verify_one(candidate, device, seed)
                break
            except WrongResultError as error:
                wrong = error
        else:
            raise wrong


def verify_one(candidate: Candidate, device: str, seed: int) -> None:
    """One attempt."""
    mine, reference = (Arrays(SMALL, seed, device) for _ in range(2))
    step, _ = candidate.build(mine)
    settings = candidate.settings or PLAIN
    master = reference.master if settings.live != PLAIN.live else None
    expected = EagerAIM(reference.params, reference.exp_avg, reference.exp_avg_sq, settings, master)
    for number in range(STEPS):
        step()
        expected.step()
        mine.stir()
        reference.stir()
        compare(candidate.name, number, mine, reference)
    if candidate.settings and not 0 < expected.under < expected.numel:
        raise WrongResultError("the check itself is worthless: all elements are of one class")


def compare(name: str, step: int, mine: Arrays, reference: Arrays, arrays: Iterable[str] = COMPARED) -> None:
    """Every element of parameters and states."""
    for array in arrays:
        for index, (got, want) in enumerate(zip(getattr(mine, array), getattr(reference, array), strict=True)):
            try:
                torch.testing.assert_close(got.detach(), want.detach(), rtol=RELATIVE, atol=ABSOLUTE)
            except AssertionError as error:
                raise WrongResultError(
                    f"{name}, step {step}, {array}[{index}] of shape {tuple(got.shape)}: {error}"
                ) from None
