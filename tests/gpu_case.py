"""A few steps of every kind on a GPU, for compute-sanitizer (test_gpu.py)."""

from __future__ import annotations

import torch

import aim_kernels as ak


def main() -> None:
    for rule, options in (("adamw", {}), ("sgd", {"momentum": 0.9})):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            params = [torch.randn(n, device="cuda").to(dtype).requires_grad_() for n in (1, 70, 20001)]
            groups = [{"params": params[:2], "modulated": True}, {"params": params[2:], "modulated": True}]
            optimizer = ak.AIMFusedOptimizer(groups, lr=0.01, rule=rule, backend="cuda", **options)
            optimizer.set_modulation(0, live_well=0.5, grad_well=0.5, noise=0.1)
            for number in range(3):
                for p in params:
                    p.grad = torch.randn_like(p)
                if number == 1:
                    params[0].grad = None
                optimizer.step()
            optimizer.eval()
            optimizer.train()
            assert all(bool(torch.isfinite(p).all()) for p in params)
    torch.cuda.synchronize()
    print("steps taken")


if __name__ == "__main__":
    main()
