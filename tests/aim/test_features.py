"""``mixing="features"``: the mixture and its gradients by hand, and its relation to degraded weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from aim_helpers import CLASSES, DOMINANT_A, batch, build, fixed, train
from helpers import same_bits
from torch import Tensor, nn

from aim_kernels.aim import AIM, CustomProbe, block_param_groups
from aim_kernels.aim.features import auxiliary_parameters
from aim_kernels.optim.optimizer import AIMFusedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "under_optimized": ("fraction", 0.25)}


class Linear(nn.Module):
    """Encoders of linear blocks, between which nothing stands."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
        self.b = nn.Sequential(nn.Linear(CLASSES, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.cat([self.a(a), self.b(b)], 1)))


@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_a_linear_block_is_one_of_degraded_weights(anchor: str) -> None:
    """(1-k) W z + k W_aux z is W' z with W' = W where under-optimized, and else withdrawn by k * k, where the gradient
    of W is 1-k times that of W': a row of "weights"."""
    torch.manual_seed(0)
    mixed, degraded = Linear().double(), Linear().double()
    degraded.load_state_dict(mixed.state_dict())
    optimizers = [
        AIMFusedOptimizer(block_param_groups(model, {"a": list(model.a), "b": list(model.b)}), anchor=anchor, **OPTIONS)
        for model in (mixed, degraded)
    ]
    aim = AIM(mixed, optimizers[0], CLASSES, probe=DOMINANT_A, mixing="features", alpha=1.0)
    kappas = aim.update(*batch()).kappa["a"]
    for number, group in enumerate(optimizers[1].param_groups):
        if group["modality"] == "a" and group["modulated"]:
            kappa = kappas[group["depth"]]
            row = {"live_well": 1.0 - kappa * kappa, "grad_well": 1.0 - kappa}
            optimizers[1].set_phase_rows(number, true=row, aux=row)
    inputs, labels = batch()
    for _ in range(20):
        losses = []
        for model, optimizer in zip((mixed, degraded), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(*(x.double() for x in inputs)), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        # the same numbers, added up in another order in float64
        torch.testing.assert_close(*losses, rtol=1e-10, atol=0.0)
        for p, q in zip(mixed.parameters(), degraded.parameters(), strict=True):
            true = optimizers[1].state[q].get("master", q).detach()
            torch.testing.assert_close(p.detach(), true, rtol=1e-8, atol=1e-10)
    rows = [row["under_fraction"] for row in optimizers[0].statistics()]
    assert rows == [row["under_fraction"] for row in optimizers[1].statistics()]
    assert 0.0 < rows[0] < 0.9, "there are elements of both classes"


def test_the_mixture_and_its_gradients_are_those_of_the_formula() -> None:
    model, optimizer = build(normalization=nn.LayerNorm(8), under_optimized=("fraction", 0.25))
    train(model, optimizer, 25)
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing="features", alpha=1.0)
    kappa = aim.update(*batch()).kappa["a"][1]
    block, z = model.a[1], torch.randn(5, 8)
    out = block(z)
    grads = torch.autograd.grad(out.square().sum(), list(block.parameters()))

    plain = copy.deepcopy(block)
    plain._forward_hooks.clear()
    weight = plain[0].weight
    state, group = optimizer.state[block[0].weight], optimizer.param_groups[2]
    assert (group["depth"], group["modulated"]) == (1, True)
    t, tau = int(state["step"]), optimizer.tables.rows[2, 2].item()  # tau_prev
    m_hat, v_hat = state["exp_avg"] / (1 - 0.9**t), state["exp_avg_sq"] / (1 - 0.99**t)
    under = m_hat**2 >= tau**2 * (v_hat + 1e-16)
    assert 0 < under.sum() < under.numel()
    auxiliary = torch.where(under, weight, (weight * (1 - kappa)).detach())
    again = (1 - kappa) * plain(z) + kappa * torch.func.functional_call(plain, {"0.weight": auxiliary}, (z,))
    torch.testing.assert_close(out, again)
    expected = torch.autograd.grad(again.square().sum(), list(plain.parameters()))
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_it_mixes_in_training_only_and_only_where_it_is_to() -> None:
    model, optimizer = build(normalization=nn.LayerNorm(8))
    train(model, optimizer, 25)
    inputs, _ = batch()
    plain = [z.detach() for z in model.features(*inputs)]
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing="features")
    same_bits([z.detach() for z in model.features(*inputs)], plain)
    aim.update(*batch())
    mixed = [z.detach() for z in model.features(*inputs)]
    assert not torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], plain[1])
    model.eval()
    same_bits([z.detach() for z in model.features(*inputs)], plain)
    model.train()
    assert all("master" not in optimizer.state[p] for p in model.parameters())
    state = aim.state_dict()
    aim.remove()
    same_bits([z.detach() for z in model.features(*inputs)], plain)
    again = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing="features")
    again.load_state_dict(state)
    same_bits([z.detach() for z in model.features(*inputs)], mixed)
    again.probe = CustomProbe(function=fixed((0.5, 0.5), (0.5, 0.5, 0.5)))
    again.update(*batch())
    same_bits([z.detach() for z in model.features(*inputs)], plain)


class Returning(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(4, 4), make

    def forward(self, x: Tensor, *, factor: float = 1.0) -> Any:
        return self.make(self.linear(x) * factor)


@pytest.mark.parametrize("make", [lambda z: (z, [2 * z, None]), lambda z: {"z": z}])
def test_what_blocks_may_return(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Returning(make), "b": nn.Linear(4, 4)})
    optimizer = AIMFusedOptimizer(block_param_groups(model, {"a": [model["a"]], "b": [model["b"]]}), **OPTIONS)
    aim = AIM(model, optimizer, 2, probe=fixed((0.8,), (0.2,)), mixing="features", alpha=0.5)
    kappa = aim.update([torch.ones(2, 4)] * 2).kappa["a"][0]
    for _ in range(12):
        model["a"].linear(torch.randn(3, 4)).square().sum().backward()
        model["b"](torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    x = torch.randn(3, 4)
    if isinstance(make(x), dict):
        with pytest.raises(TypeError, match=r"block \('a', 0\) returns a dict; mixing='features' needs tensors"):
            model["a"](x)
        return
    first, (second, nothing) = model["a"](x, factor=3.0)
    assert nothing is None
    weight, bias = auxiliary_parameters(optimizer, model["a"], kappa)["linear.weight"], model["a"].linear.bias
    linear = model["a"].linear
    expected = 3 * ((1 - kappa) * linear(x) + kappa * (x @ weight.T + bias))
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, 2 * expected)
    assert not torch.equal(weight, linear.weight)
