"""Rules, probes, mixings and schedules as objects: what names stand for, what is refused, what is kept."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
from typing import Any

import pytest
from aim_helpers import CLASSES, DOMINANT_A, batch, build, fixed

from aim_kernels import make_method
from aim_kernels.aim import (
    AIM,
    Alternate,
    Constant,
    CosineOut,
    CustomProbe,
    CustomSchedule,
    DecoupleAll,
    DecoupleDominant,
    Features,
    Gap,
    GradientNorm,
    LinearOut,
    LinearReadout,
    Margin,
    Prototypes,
    Ratio,
    Reliance,
    Split,
    Trial,
    Weights,
)
from aim_kernels.aim.mixing import DECOUPLES, MIXINGS
from aim_kernels.aim.probes import PROBES
from aim_kernels.aim.rules import RULES
from aim_kernels.aim.schedules import SCHEDULES
from aim_kernels.methods.base import Blocks
from aim_kernels.methods.controls import DropFeatures, ScaleFeatures, WithoutMask

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES: dict[str, dict[str, Any]] = {
    "rule": {"reliance": Reliance(), "gap": Gap(), "ratio": Ratio(), "margin": Margin(), "trial": Trial()},
    "probe": {"prototypes": Prototypes(), "linear": LinearReadout(), "gradient-norm": GradientNorm()},
    "mixing": {"alternate": Alternate(), "split": Split(), "weights": Weights(), "features": Features()},
    "decouple": {"dominant": DecoupleDominant(), "all": DecoupleAll()},
    "schedule": {"constant": Constant()},
}
OBJECTS = [
    *(made for named in NAMES.values() for made in named.values()),
    *(LinearOut(total_updates=9), CosineOut(total_updates=9, warmup_updates=2), CustomSchedule(function=math.sqrt)),
    *(
        DropFeatures(),
        ScaleFeatures(),
        WithoutMask(inner=Split(head_from="true")),
        CustomProbe(function=math.hypot),
    ),
]


def made(**options: Any) -> AIM:
    model, optimizer = build()
    return AIM(model, optimizer, CLASSES, **options)


@pytest.mark.parametrize(("option", "name"), [(option, name) for option, named in NAMES.items() for name in named])
def test_a_name_is_the_object_with_its_defaults(option: str, name: str) -> None:
    extra = {"rule": "ratio"} if name == "gradient-norm" else {}
    found = getattr(made(**{option: name}, **extra), option)
    assert found == NAMES[option][name] == getattr(made(**{option: NAMES[option][name]}, **extra), option)


def test_every_name_is_listed_here() -> None:
    for option, names in (("rule", RULES), ("probe", PROBES), ("mixing", MIXINGS), ("decouple", DECOUPLES)):
        assert {name: type(value) for name, value in NAMES[option].items()} == names
    assert set(SCHEDULES) == set(NAMES["schedule"])


@pytest.mark.parametrize("choice", OBJECTS, ids=lambda choice: type(choice).__name__)
def test_objects_are_values(choice: Any) -> None:
    assert pickle.loads(pickle.dumps(choice)) == choice == dataclasses.replace(choice)
    assert hash(choice) == hash(dataclasses.replace(choice))
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.name = "another"


def test_defaults() -> None:
    aim = made()
    assert (aim.rule, aim.probe, aim.mixing) == (None, Prototypes(), Alternate())
    assert (aim.decouple, aim.schedule, aim.alpha) == (DecoupleDominant(), Constant(), 10.0)
    assert (aim.scoring.targets, aim.scoring.batch_size) == ("classes", 512)
    assert [rule().confidence for rule in (Gap, Ratio, Margin, Trial)] == [3.0, 0.0, 3.0, 3.0]


def test_the_method_has_the_defaults_of_aim() -> None:
    """``make_method("aim")`` and ``AIM`` decide alike, given the same."""
    model, optimizer = build()
    blocks = Blocks(model, {"a": list(model.a), "b": list(model.b)}, fuse=model.head, num_classes=CLASSES)
    method: Any = make_method("aim", blocks, optimizer)
    aim = made()
    for name in ("rule", "probe", "asks_for_scores", "mixing", "decouple", "schedule", "alpha"):
        assert getattr(method.aim, name) == getattr(aim, name)
    for name in ("targets", "loss", "batch_size", "num_classes"):
        assert getattr(method.aim.scoring, name) == getattr(aim.scoring, name)
    assert not {"rule", "mixing", "probe"} & inspect.signature(type(method).__init__).parameters.keys()


def test_what_is_given_decides_the_rule() -> None:
    model, optimizer = build()

    def train(_inputs: Any, _labels: Any) -> None:
        """A step that changes nothing."""

    inputs, labels = batch()
    held_out = batch(seed=1)
    aim = AIM(model, optimizer, CLASSES)
    assert aim.update(inputs, labels).rule == "ratio"
    assert aim.update(inputs, labels, train=train).rule == "ratio"
    assert aim.update(inputs, labels, held_out=held_out).rule == "reliance"
    assert aim.update(inputs, labels, held_out=held_out, train=train).rule == "reliance", "steps need not be tried"
    named = AIM(model, optimizer, CLASSES, probe=DOMINANT_A)
    assert named.update(inputs, labels, held_out=held_out, train=train).rule == "gap", "a named probe asks for scores"
    for given in ({"alpha": 2.0}, {"pool": "channels_last"}, {"targets": "classes"}):
        aim = AIM(model, optimizer, CLASSES, **given)  # type: ignore[arg-type]
        assert aim.asks_for_scores, f"{given} would mean nothing under reliance"


# -- what means nothing is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        *("confidence", "dead_zone", "trial_steps", "prototype_steps", "prototype_lr", "init", "probability", "hold"),
        *("learn_weak_in_true_phase", "learn_dominant_in_aux", "head_from", "auxiliary_weight", "coefficients", "beta"),
        *("total_updates", "warmup_updates"),
    ],
)
def test_options_of_a_choice_are_none_of_aim(option: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        made(**{option: 1})


OPTIONS = {
    Gap: {"confidence", "dead_zone"},
    Ratio: {"confidence", "dead_zone"},
    Margin: {"confidence", "dead_zone"},
    Trial: {"confidence", "dead_zone", "steps"},
    Prototypes: {"steps", "lr", "init"},
    LinearReadout: set(),
    GradientNorm: set(),
    Alternate: {"probability", "learn_weak_in_true_phase", "learn_dominant_in_aux", "hold", "head_from"},
    Split: {"head_from", "auxiliary_weight"},
    Weights: {"coefficients"},
    Features: set(),
    DecoupleDominant: set(),
    DecoupleAll: {"beta"},
    Constant: {"warmup_updates"},
    LinearOut: {"total_updates", "warmup_updates"},
    CosineOut: {"total_updates", "warmup_updates"},
}


@pytest.mark.parametrize("choice", OPTIONS)
def test_every_choice_has_its_own_options_only(choice: Any) -> None:
    needed = {"total_updates": 9} if "total_updates" in OPTIONS[choice] else {}
    for option in set().union(*OPTIONS.values()) - OPTIONS[choice]:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            choice(**needed, **{option: 1})
    assert {field.name for field in dataclasses.fields(choice)} == OPTIONS[choice]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"rule": "trial", name: value}, f"{name} means nothing under rule='trial', which scores no blocks") for
          name, value in {"probe": "linear", "alpha": 1.0, "targets": "classes", "pool": "channels_last"}.items()),
        *(({"probe": probe, name: value}, f"{name} means nothing under probe='{said}', which reads no features") for
          name, value in {"targets": "classes", "pool": "channels_last"}.items()
          for probe, said in (("gradient-norm", "gradient-norm"), (DOMINANT_A, "custom"))),
        *(({"mixing": mixing, "decouple": "all"}, f"decouple means nothing under mixing='{mixing.name}'") for
          mixing in (DropFeatures(), ScaleFeatures())),
        *(({"probe": "gradient-norm", "rule": rule}, "'gradient-norm' has no held-out scores; use rule='ratio'") for
          rule in ("gap", "margin")),
        ({"mixing": Alternate}, r"mixing is a class; give an object of it: mixing=Alternate\(\)"),
        ({"probe": LinearReadout}, r"probe is a class; give an object of it: probe=LinearReadout\(\)"),
        ({"schedule": Constant}, r"schedule is a class; give an object of it: schedule=Constant\(\)"),
        ({"rule": Alternate()}, "unknown rule Alternate.* one of 'reliance', 'gap', .*, 'trial', or a Rule object"),
        ({"mixing": None}, "unknown mixing None"),
        ({"schedule": 3}, "unknown schedule 3; it is one of 'constant', or a Schedule object or a callable"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)


@pytest.mark.parametrize("name", ["drop", "feature-scale"])
@pytest.mark.parametrize("option", ["mixing", "decouple"])
def test_controls_without_rows_refuse_what_is_about_rows(name: str, option: str) -> None:
    model, optimizer = build()
    blocks = Blocks(model, {"a": list(model.a), "b": list(model.b)}, fuse=model.head, num_classes=CLASSES)
    with pytest.raises(ValueError, match=f"{option} means nothing"):
        make_method(name, blocks, optimizer, **{option: {"mixing": "split", "decouple": "all"}[option]})


@pytest.mark.parametrize(
    ("choice", "options", "message"),
    [
        (Prototypes, {"init": "zeros"}, "unknown init 'zeros'; it is one of 'noise', 'mean'"),
        (Prototypes, {"steps": -1}, "steps must be at least 0"),
        (Prototypes, {"lr": math.nan}, "lr must be a finite number >= 0"),
        (Trial, {"steps": 0}, "steps must be at least 1, got 0"),
        *((rule, {name: -0.1}, f"{name} must be a finite number >= 0") for rule in (Gap, Ratio, Margin, Trial)
          for name in ("confidence", "dead_zone")),
        (Alternate, {"probability": 1.5}, r"probability must lie in \[0.0, 1.0\], got 1.5"),
        (Alternate, {"probability": "often"}, "unknown probability 'often'; it is one of 'strength', or a number"),
        (Alternate, {"learn_dominant_in_aux": "all"}, "unknown learn_dominant_in_aux 'all'"),
        (Alternate, {"hold": "stop"}, "unknown hold 'stop'; it is one of 'fade', 'freeze'"),
        (Alternate, {"head_from": "both"}, "unknown head_from 'both'"),
        (Split, {"head_from": "both"}, "unknown head_from 'both'"),
        (Split, {"auxiliary_weight": math.inf}, "auxiliary_weight must be a finite number"),
        (Weights, {"coefficients": "sum"}, "unknown coefficients 'sum'"),
        (DecoupleAll, {"beta": -1.0}, "beta must be a finite number"),
        (Constant, {"warmup_updates": -1}, "warmup_updates must be at least 0"),
        (CosineOut, {"total_updates": 3, "warmup_updates": 2}, "at least warmup_updates \\+ 2, got 3 and 2"),
    ],
)  # fmt: skip
def test_errors_of_objects(choice: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choice(**options)


def test_a_schedule_may_not_leave_its_range() -> None:
    aim = made(probe=fixed((0.6, 0.8), (0.4, 0.4, 0.4)), schedule=lambda update: 2.0)
    with pytest.raises(ValueError, match=r"schedule\(0\) returned 2.0; a factor lies in \[0, 1\]"):
        aim.update(*batch())
    assert aim.updates == 0


def test_state_is_that_of_before() -> None:
    """Keys of a checkpoint: those of the object, and of a mixing that keeps something."""
    keys = {"updates", "generator", "history", "guard", "held_back"}
    assert made().state_dict().keys() == keys
    assert made(mixing=DropFeatures()).state_dict().keys() == keys | {"drop", "drop_generator"}


def test_it_can_be_pickled() -> None:
    """Together with its model and optimizer, and goes on with the same draws."""
    aim = made(guard=True, schedule=LinearOut(total_updates=5))
    inputs, labels = batch()
    aim.update(inputs, labels, held_out=batch(seed=1))
    again = pickle.loads(pickle.dumps(aim))
    assert again.generator is again.scoring.generator and again.model is again.scoring.model
    tables = [each.update(inputs, labels, held_out=batch(seed=2)) for each in (aim, again)]
    assert tables[0].to_dict()["scores"] == tables[1].to_dict()["scores"] != aim.history[0].scores
    assert (aim.optimizer.tables.rows == again.optimizer.tables.rows).all()
