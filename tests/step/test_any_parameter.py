"""Parameters of any kind: those that are frozen or have no shape yet are left alone until they get a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import frozen, same_bits
from tolerances import peer_error
from torch import Tensor, nn

import aim_kernels as ak


def _freed() -> Tensor:
    made = torch.zeros(3)
    made.untyped_storage().resize_(0)
    return made


def _wrapper() -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(3), torch.ones(3))  # type: ignore[no-any-return]


#: What no step could update, and how an error calls it.
PARAMETERS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "uint8": (lambda: torch.zeros(4, dtype=torch.uint8), "uint8"),
    "int8": (lambda: torch.zeros(4, dtype=torch.int8), "int8"),
    "int64": (lambda: torch.zeros(4, dtype=torch.int64), "int64"),
    "bool": (lambda: torch.zeros(4, dtype=torch.bool), "bool"),
    "float8": (lambda: torch.zeros(4).to(torch.float8_e4m3fn), "float8"),
    "complex": (lambda: torch.zeros(4, dtype=torch.complex64), "complex"),
    "meta": (lambda: torch.zeros(4, device="meta"), "meta"),
    "expanded": (lambda: torch.zeros(1).expand(4), "expanded"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
    "wrapper": (_wrapper, "TwoTensor"),
    "freed": (_freed, "memory"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"anchor": "init", "keep_masters": True},
    {"state_dtype": "int8", "master": "split", "ema_decay": 0.9},
    {"max_grad_norm": 1.0, "zero_grad_in_step": True},
    {"backend": "reference"},
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("which", PARAMETERS)
def test_a_frozen_parameter_of_any_kind_is_left_alone(which: str, first: bool, options: dict[str, Any]) -> None:
    """A life of an optimizer with it, beside one without it."""

    def life(beside: bool) -> list[Tensor]:
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))]
        odd = [nn.Parameter(PARAMETERS[which][0](), requires_grad=False)] if beside else []
        group = {
            "params": [*odd, *params] if first else [*params, *odd],
            "modulated": True,
            "modality": "a",
            "depth": 0,
        }
        optimizer = ak.AIMFusedOptimizer([group], lr=0.1, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.eval()
        optimizer.train()
        assert optimizer.statistics()[0]["threshold"] == optimizer.modulation()[0]["tau"] and repr(optimizer)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert not any(p in optimizer.state for p in odd)
        return [p.detach() for p in params]

    # Random rounding goes by the number of an element among all, so then they may not be compared by bits.
    ours, alone = life(True), life(False)
    if options.get("state_dtype") is None or not first:
        same_bits(ours, alone)


def test_what_cannot_be_degraded_with_its_block_is_named() -> None:
    odd, p = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False), nn.Parameter(torch.ones(3))
    block = {"params": [("odd", odd), ("p", p)], "modality": "a", "depth": 0, "modulated": True}
    optimizer = ak.AIMFusedOptimizer([block])
    optimizer.set_strength("a", 0, 0.5)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"'odd'.*degraded.*int8"):
        optimizer.step()
    assert (p == 1).all()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    "which", [which for which in PARAMETERS if which != "nested"]
)  # of which torch makes no gradient
def test_with_a_gradient_it_is_named(which: str) -> None:
    make, word = PARAMETERS[which]
    odd = nn.Parameter(make(), requires_grad=False)
    p = nn.Parameter(torch.ones(3))
    optimizer = ak.AIMFusedOptimizer([("plain", p), ("odd", odd)], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    with torch.no_grad():
        odd.grad = torch.zeros(3) if which == "freed" else torch.zeros_like(odd)
    p.grad = torch.ones(3)
    before = p.detach().clone()
    with pytest.raises((RuntimeError, ValueError), match=rf"'odd'.*{word}"):
        optimizer.step()
    assert torch.equal(p, before)
    odd.grad = None
    optimizer.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_frozen_parameters_that_an_option_does_not_fit_are_left_alone(dtype: torch.dtype) -> None:
    odd, p = nn.Parameter(torch.zeros(4, dtype=dtype), requires_grad=False), nn.Parameter(torch.ones(3))
    options: dict[str, Any] = {"state_dtype": "int8"} if dtype == torch.float64 else {"master": "split"}
    optimizer = ak.AIMFusedOptimizer([("odd", odd), ("p", p)], **options)
    p.grad = torch.ones(3)
    optimizer.step()
    odd.grad, before = torch.ones(4, dtype=dtype), frozen(optimizer)
    with pytest.raises(ValueError, match="'odd'"):
        optimizer.step()
    same_bits(frozen(optimizer), before)


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"max_grad_norm": 1e9}], ids=str)
def test_lazy_modules_train_as_under_torch(options: dict[str, Any]) -> None:
    def trained(make: Callable[[Any], Any]) -> list[Tensor]:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
        optimizer = make(model.parameters())
        optimizer.zero_grad()
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(5, 4)).square().sum().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    theirs = trained(lambda params: torch.optim.AdamW(params, lr=0.01))
    ours = trained(lambda params: ak.AIMFusedOptimizer(params, lr=0.01, **options))
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=0.0, atol=peer_error(4))


def test_a_parameter_without_a_shape_is_stepped_by_nobody_before_it_has_one() -> None:
    p = nn.Parameter(torch.ones(3))
    lazy = nn.LazyLinear(2)
    optimizer = ak.AIMFusedOptimizer([p, *lazy.parameters()])
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.statistics()[0]["numel"] == 3
    lazy(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert optimizer.statistics()[0]["numel"] == 3 + 8 + 2
