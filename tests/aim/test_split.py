"""``mixing="split"``: what each parameter learns from, against a float64 transcription, and all that may come between
two passes and a step."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from aim_helpers import CLASSES, DOMINANT_A, Net, batch, build, fixed
from helpers import RULES, same_bits
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.aim import AIM, CustomProbe, Split, block_param_groups
from aim_kernels.methods.controls import DropFeatures
from aim_kernels.optim.optimizer import AIMFusedOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

NOBODY = fixed((0.5, 0.5), (0.5, 0.5, 0.5))
cross_entropy = nn.functional.cross_entropy


def started(split: Split | None = None, **options: Any) -> tuple[Net, AIMFusedOptimizer, AIM]:
    """Without dropout, so that both passes see the same network."""
    model, optimizer = build(normalization=nn.LayerNorm(8), **options)
    return model, optimizer, AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing=split or Split())


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    inputs, labels = batch(seed=seed)
    dtype = next(model.parameters()).dtype
    return cross_entropy(model(*(x.to(dtype) for x in inputs)), labels)


def run(model: Net, optimizer: AIMFusedOptimizer, aim: AIM, steps: int, seed: int = 0) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        aim.backward(lambda number=number: loss_of(model, seed + number))
        optimizer.step()


class Transcription:
    """AdamW with AIM's two passes in eager float64: its formulae, one by one."""

    lr, beta1, beta2, eps, target, rate = 1e-2, 0.9, 0.99, 1e-8, 0.25, 0.1

    def __init__(self, model: Net, kappa: dict[str, list[float]]) -> None:
        self.model = copy.deepcopy(model)
        self.groups = block_param_groups(self.model, {"a": list(self.model.a), "b": list(self.model.b)})
        self.kappa, self.t = kappa, 0
        self.tau = [0.0] * len(self.groups)
        self.theta = {p: p.detach().clone() for group in self.groups for p in group["params"]}
        self.live = {p: value.clone() for p, value in self.theta.items()}
        self.m = {p: torch.zeros_like(p) for p in self.theta}
        self.v = {p: torch.zeros_like(p) for p in self.theta}

    def gradients(self, weights: dict[Tensor, Tensor], seed: int) -> dict[Tensor, Tensor]:
        with torch.no_grad():
            for p, value in weights.items():
                p.copy_(value)
        return dict(zip(weights, torch.autograd.grad(loss_of(self.model, seed), list(weights)), strict=True))

    def step(self, seed: int) -> None:
        degraded, true = self.gradients(self.live, seed), self.gradients(self.theta, seed)
        self.t += 1
        for number, group in enumerate(self.groups):
            under_count = 0
            for p in group["params"]:
                g = {"a": true[p], "b": degraded[p], None: (true[p] + degraded[p]) / 2}[group["modality"]]
                self.m[p] = self.beta1 * self.m[p] + (1 - self.beta1) * g
                self.v[p] = self.beta2 * self.v[p] + (1 - self.beta2) * g * g
                m_hat = self.m[p] / (1 - self.beta1**self.t)
                v_hat = self.v[p] / (1 - self.beta2**self.t)
                decay = 0.0 if p.dim() < 2 and group["modality"] else 1e-2
                self.theta[p] = self.theta[p] * (1 - self.lr * decay) - self.lr * m_hat / (v_hat.sqrt() + self.eps)
                under = m_hat**2 >= self.tau[number] ** 2 * (v_hat + self.eps**2)
                under_count += int(under.sum())
                keep = 1.0
                if group["modality"] == "a" and group["modulated"]:
                    keep = 1 - self.kappa["a"][group["depth"]]
                self.live[p] = torch.where(under, self.theta[p], keep * self.theta[p])
            share = under_count / sum(p.numel() for p in group["params"])
            self.tau[number] = min(max(self.tau[number] + self.rate * (share - self.target), 0.0), 1.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_steps_are_those_of_a_float64_transcription(backend: str) -> None:
    torch.manual_seed(0)
    model = Net(nn.LayerNorm(8)).double()
    groups = block_param_groups(model, {"a": list(model.a), "b": list(model.b)})
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "under_optimized": ("fraction", 0.25), "backend": backend}
    optimizer = AIMFusedOptimizer(groups, **options)
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing="split", alpha=1.0)
    eager = Transcription(model, aim.update(*batch()).kappa)
    degraded = 0
    for number in range(25):
        optimizer.zero_grad()
        aim.backward(lambda number=number: loss_of(model, number))
        optimizer.step()
        eager.step(number)
        for p, theta, live in zip(model.parameters(), eager.model.parameters(), eager.model.parameters(), strict=True):
            true = optimizer.state[p].get("master", p).detach()
            # float64 on both sides; 25 steps of rounding, and Adam divides by small roots
            torch.testing.assert_close(true, eager.theta[theta], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(p.detach(), eager.live[live], rtol=1e-9, atol=1e-11)
            degraded += int((p != true).sum())
    assert degraded > 1000


@pytest.mark.parametrize("rule", ["sgd", "sgd-momentum", "amsgrad", "adagrad", "rmsprop-momentum", "lion"])
@pytest.mark.parametrize("head_from", ["average", "true", "auxiliary"])
def test_gradients_are_routed_under_every_rule(rule: str, head_from: str) -> None:
    torch.manual_seed(0)
    model = Net(nn.LayerNorm(8))
    groups = block_param_groups(model, {"a": list(model.a), "b": list(model.b)})
    optimizer = AIMFusedOptimizer(groups, **RULES[rule])
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing=Split(head_from=head_from, auxiliary_weight=0.5))
    aim.update(*batch())
    run(model, optimizer, aim, 6)
    degraded = torch.autograd.grad(loss_of(model), list(model.parameters()))
    live = copy.deepcopy(model.state_dict())
    with optimizer.true_parameters():
        true = torch.autograd.grad(loss_of(model), list(model.parameters()))
        masters = [p.detach().clone() for p in model.parameters()]
    assert not torch.equal(degraded[0], true[0])
    optimizer.zero_grad()
    aim.backward(lambda: loss_of(model))
    head = {"average": (0.25, 0.5), "true": (0.0, 1.0), "auxiliary": (0.5, 0.0)}[head_from]
    for (name, p), x, y, master in zip(model.named_parameters(), degraded, true, masters, strict=True):
        of_aux, of_true = {"a": (0.0, 1.0), "b": (0.5, 0.0)}.get(name[0], head)
        assert p.grad is not None
        torch.testing.assert_close(p.grad, of_aux * x + of_true * y, rtol=1e-6, atol=1e-8)
        assert torch.equal(p, master)
    optimizer.begin_live_pass()
    same_bits(model.state_dict(), live)


def test_accumulated_and_repeated_passes_see_the_same_weights() -> None:
    model, optimizer, aim = started()
    aim.update(*batch())
    run(model, optimizer, aim, 30)
    gradients = []
    for seeds in ((1,), (2,), (1, 2)):
        optimizer.zero_grad()  # as if a step had been skipped
        for seed in seeds:
            aim.backward(lambda seed=seed: loss_of(model, seed))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, two, both in zip(*gradients, strict=True):
        torch.testing.assert_close(one + two, both, rtol=1e-5, atol=1e-7)  # added in another order


def test_a_skipped_step_of_a_scaler_leaves_the_next_one_right() -> None:
    def scaled(model: Net, scaler: torch.amp.GradScaler, number: int) -> Tensor:
        return scaler.scale(loss_of(model, number) * (torch.inf if number == 6 else 1.0))

    results = []
    for fused in (False, True):
        model, optimizer, aim = started(fused_scaling=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        aim.update(*batch())
        for number in range(12):
            optimizer.zero_grad()
            aim.backward(functools.partial(scaled, model, scaler, number))
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**9
        results.append([optimizer.state[p].get("master", p).detach().clone() for p in model.parameters()])
    model, optimizer, aim = started()
    aim.update(*batch())
    for number in (*range(6), *range(7, 12)):
        run(model, optimizer, aim, 1, seed=number)
    for p, plain, fused in zip(model.parameters(), *results, strict=True):
        # powers of two scale without rounding
        assert torch.equal(plain, optimizer.state[p].get("master", p).detach())
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-8)


def test_what_overflows_in_a_pass_that_does_not_count() -> None:
    """The weak encoder overflows in the true pass only; its gradient is that of the auxiliary one."""
    model, optimizer, aim = started(Split(head_from="auxiliary"))
    aim.update(*batch())
    run(model, optimizer, aim, 5)
    expected = torch.autograd.grad(loss_of(model), list(model.b.parameters()))
    factors = iter((1.0, torch.inf))
    optimizer.zero_grad()
    aim.backward(lambda: loss_of(model) * next(factors))
    for p, grad in zip(model.b.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad)


def test_one_plain_pass_where_nobody_is_dominant() -> None:
    model, optimizer, aim = started()
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return loss_of(model)

    aim.backward(closure)
    optimizer.step()
    aim.update(*batch())
    run(model, optimizer, aim, 30)
    aim.probe = CustomProbe(function=NOBODY)
    aim.update(*batch())
    assert any(not torch.equal(p, optimizer.state[p]["master"]) for p in model.a.parameters() if p.dim() > 1)
    calls.clear()
    optimizer.zero_grad()
    loss = aim.backward(closure)
    assert len(calls) == 1
    with optimizer.true_parameters():
        assert torch.equal(loss, loss_of(model).detach())
    optimizer.step()
    assert all("master" not in optimizer.state[p] for p in model.parameters())


def test_a_resumed_run_continues_bit_for_bit() -> None:
    model, optimizer, aim = started()
    aim.update(*batch())
    run(model, optimizer, aim, 15)
    aim.backward(lambda: loss_of(model))  # in the middle of a step
    with optimizer.true_parameters():
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), aim.state_dict()))
    run(model, optimizer, aim, 5)
    again, resumed, aim_again = started(seed=3)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    aim_again.load_state_dict(saved[2])
    run(again, resumed, aim_again, 5)
    same_bits(list(model.parameters()), list(again.parameters()))
    same_bits([optimizer.state[p] for p in model.parameters()], [resumed.state[p] for p in again.parameters()])


def test_under_ddp_the_first_pass_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain = Net(nn.LayerNorm(8))
        wrapped = nn.parallel.DistributedDataParallel(plain)
        exchanging = []
        forward = plain.forward
        monkeypatch.setattr(
            plain, "forward", lambda *x: (exchanging.append(wrapped.require_backward_grad_sync), forward(*x))[1]
        )
        optimizer = AIMFusedOptimizer(block_param_groups(wrapped, {"a": list(plain.a), "b": list(plain.b)}))
        aim = AIM(wrapped, optimizer, CLASSES, probe=DOMINANT_A, mixing="split")
        aim.update(*batch())
        for _ in range(3):
            optimizer.zero_grad()
            aim.backward(lambda: loss_of(wrapped))
            found = [p.grad.clone() for p in plain.parameters() if p.grad is not None]
            optimizer.begin_live_pass()
            optimizer.zero_grad()
            with wrapped.no_sync():
                aim.backward(lambda: loss_of(wrapped))
            same_bits(found, [p.grad for p in plain.parameters()])
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert exchanging == [False, True, False, False] * 3


def test_what_is_refused() -> None:
    model, optimizer, aim = started()
    aim.update(*batch())
    run(model, optimizer, aim, 3)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\) before"):
        aim.backward(lambda: loss_of(model))
    optimizer.train()
    ak.step_in_backward(optimizer, model)
    with pytest.raises(RuntimeError, match=r"call release\.remove\(\)"):
        aim.backward(lambda: loss_of(model))
    with pytest.raises(ValueError, match="unknown head_from 'both'; it is one of 'average', 'true', 'auxiliary'"):
        Split(head_from="both")
    with pytest.raises(ValueError, match="auxiliary_weight must be"):
        Split(auxiliary_weight=-1.0)


def test_a_failing_closure_leaves_no_hook() -> None:
    model, optimizer, aim = started()
    aim.update(*batch())
    with pytest.raises(ZeroDivisionError):
        aim.backward(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert all(not p._backward_hooks for p in model.parameters())
    run(model, optimizer, aim, 1)


@pytest.mark.parametrize("mixing", ["alternate", "weights", "features", DropFeatures()])
def test_backward_is_one_pass_of_all_others(mixing: Any) -> None:
    model, optimizer = build(normalization=nn.LayerNorm(8))
    aim = AIM(model, optimizer, CLASSES, probe=DOMINANT_A, mixing=mixing)
    aim.update(*batch())
    seen = []
    aim.backward(lambda: loss_of(model), backward=lambda loss: (seen.append(loss), loss.backward()))
    assert len(seen) == 1
    assert all(p.grad is not None for p in model.parameters())
