"""A few steps of every kind on a GPU, for compute-sanitizer (test_gpu.py)."""

from __future__ import annotations

import torch

import aim_kernels as ak

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RULES = {
    "adamw": {"rule": "adamw"},
    "adam": {"rule": "adam", "anchor": "init"},
    "sgd": {"rule": "sgd"},
    "nesterov": {"rule": "sgd", "momentum": 0.9, "nesterov": True},
}


def work(params: list[torch.Tensor], options: dict[str, object]) -> None:
    """Steps with every column of a row, one of them without one gradient; true and live weights."""
    groups = [{"params": params[:2], "modulated": True}, {"params": params[2:], "modulated": True}]
    optimizer = ak.AIMFusedOptimizer(groups, lr=torch.tensor(0.01, device="cuda"), backend="cuda", **options)
    optimizer.set_modulation(0, live_well=0.5, grad_well=0.5, step_well=0.5, noise=0.1)
    for number in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        if number == 1:
            params[0].grad = None
        optimizer.step()
    optimizer.eval()
    optimizer.train()
    assert all(bool(torch.isfinite(p).all()) for p in params)


def tensors(types: list[torch.dtype]) -> list[torch.Tensor]:
    """Tails, an address that is not that of a vector, and more than one chunk. All end where their allocation does, and
    the largest keeps its states in allocations of their own as well."""
    made = [torch.randn(n, device="cuda").to(t) for n, t in zip((1, 71, 70001), types, strict=True)]
    return [(t[1:] if number == 1 else t).requires_grad_() for number, t in enumerate(made)]


def main() -> None:
    for dtype in TYPES:
        for rule in ("adamw", "nesterov"):
            work(tensors([dtype] * 3), RULES[rule])
    for rule in ("adam", "sgd"):
        work(tensors([torch.float32, torch.bfloat16, torch.float16]), RULES[rule])
    beside = {"rule": "adamw", "ema_decay": 0.9, "zero_grad_in_step": True}
    work(tensors([torch.float64] * 3), beside)
    for dtype in TYPES[:3]:
        work(tensors([dtype] * 3), beside | {"state_dtype": "int8"})
        work(tensors([dtype] * 3), {"rule": "sgd", "momentum": 0.9, "state_dtype": "bfloat16"})
    for master in ("stochastic", "split", "kahan"):
        work(tensors([torch.bfloat16] * 3), beside | {"state_dtype": "int8", "master": master})
    torch.cuda.synchronize()
    print("steps taken")


if __name__ == "__main__":
    main()
