"""Where features meet: what each of them leaves alone, and none may break for another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Gradients, assign, build, parameter, parameters_of, same_bits, set_row

import aim_kernels as ak

SHAPES = (((5, 7), (33,)), ((6, 2),))


def stepped(steps: int = 3, **options: Any) -> ak.AIMFusedOptimizer:
    optimizer = build("adamw", SHAPES, **options)
    set_row(optimizer, 0, "chain")
    gradients = Gradients(parameters_of(optimizer))
    for _ in range(steps):
        assign(parameters_of(optimizer), gradients())
        optimizer.step()
    return optimizer


# -- anchors of parameters that have not been stepped ---------------------------------------------------


def test_an_anchor_of_another_shape_is_an_error() -> None:
    """The kernel would read past its end."""
    optimizer = build("adamw", (((4,),),), anchor="init")
    (p,) = parameters_of(optimizer)
    p.data = torch.zeros(64)
    p.grad = torch.ones(64)
    with pytest.raises(RuntimeError, match=r"its state anchor has shape \(4,\)"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(64))


def test_anchors_follow_a_module_that_is_moved() -> None:
    """Between devices there is nothing to test with here; the meta device stands for another one."""
    optimizer = build("adamw", (((4,),),), anchor="init")
    (p,) = parameters_of(optimizer)
    optimizer._anchors[p] = optimizer._anchors[p].to("meta")
    p.grad = torch.ones(4)
    with pytest.raises(NotImplementedError, match="meta"):  # torch cannot copy out of it: the copy was tried
        optimizer.step()


def test_loading_a_state_dict_from_before_the_first_step_makes_no_states() -> None:
    """States that are anchors only would keep torch.distributed.checkpoint from making the others."""
    fresh, other = (build("adamw", SHAPES, anchor="init") for _ in range(2))
    anchors = {index: fresh._anchors[p].clone() for index, p in enumerate(parameters_of(fresh))}
    other.load_state_dict(fresh.state_dict())
    assert not other.state
    same_bits(anchors, {index: other._anchors[p] for index, p in enumerate(parameters_of(other))})
    trained = stepped(anchor="init")
    trained.load_state_dict(fresh.state_dict())
    assert not trained.state


# -- modes ----------------------------------------------------------------------------------------------


def test_train_that_raises_can_be_called_again() -> None:
    optimizer = stepped()
    live = [p.detach().clone() for p in parameters_of(optimizer)]
    optimizer.eval()
    true = [p.detach().clone() for p in parameters_of(optimizer)]
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr \(group 0\)"):
        optimizer.train()
    assert optimizer.holds_true_weights
    same_bits(true, [p.detach() for p in parameters_of(optimizer)])
    optimizer.param_groups[0]["lr"] = lr
    optimizer.train()
    assert not optimizer.holds_true_weights
    same_bits(live, [p.detach() for p in parameters_of(optimizer)])


# -- options of the whole optimizer ---------------------------------------------------------------------


@pytest.mark.parametrize("option", ["anchor", "backend", "seed", "max_grad_norm", "sync_every", "keep_masters"])
def test_an_option_of_the_whole_is_refused_in_a_group(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} \(group 0\)"):
        ak.AIMFusedOptimizer([{"params": [parameter((3,))], option: 1}])


def test_a_phase_row_takes_phase_columns_only() -> None:
    optimizer = build("adamw", SHAPES)
    before = optimizer.tables.rows.clone()
    for column in ("noise", "tau"):
        with pytest.raises(ValueError, match=column):
            optimizer.set_phase_rows(0, true={"live_well": 0.5, column: 0.5})
    same_bits(before, optimizer.tables.rows)


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ("rmsprop", {"momentum": 0.9}),
        ("rmsprop", {"centered": True}),
        ("adamw", {"amsgrad": True}),
        ("sgd", {"momentum": 0.9}),
        ("adagrad", {"modulated": True}),
        ("lion", {"modulated": True}),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_moment_that_comes_in_mid_run(rule: str, changed: dict[str, Any], backend: str) -> None:
    optimizer = ak.AIMFusedOptimizer([parameter((40,))], rule=rule, lr=1e-2, backend=backend)
    (p,) = parameters_of(optimizer)
    kept = []
    for options in ({}, changed, dict.fromkeys(changed, 0)):
        optimizer.param_groups[0].update(options)
        for _ in range(2):
            p.grad = torch.linspace(-1, 1, 40)
            optimizer.step()
        kept.append({name for name in optimizer.state[p] if name != "step"})
        assert p.isfinite().all()
    assert kept[1] > kept[0]
