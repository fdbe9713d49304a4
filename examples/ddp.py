"""AIM under DistributedDataParallel: every process trains on samples of its own, and all modulate alike.

The gradients that DDP averages are equal everywhere, so thresholds and statistics are too, without further messages.
``AIM.update`` averages the scores of all processes.

Run it: torchrun --nproc-per-node 2 examples/ddp.py
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_modalities import CLASSES, TwoModalities, samples

import aim_kernels as ak

EPOCHS, BATCH = 4, 32


def begin() -> torch.device:
    """Joins the process group of torchrun; this process's device."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    return device


def shard(tensors: tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """The samples of this process: every so many-th."""
    return [tensor[dist.get_rank() :: dist.get_world_size()].to(device) for tensor in tensors]


def main() -> None:
    device = begin()
    torch.manual_seed(0)  # equal weights everywhere, and equal shuffling of unequal samples
    shape, colour, labels = shard(samples(1024, shortcut=True, seed=2), device)
    *held_out, held_out_labels = shard(samples(256, shortcut=False, seed=3), device)
    *test, test_labels = (tensor.to(device) for tensor in samples(2048, shortcut=False, seed=4))

    plain = TwoModalities().to(device)
    groups = ak.block_param_groups(plain, {"shape": list(plain.shape), "colour": list(plain.colour)})
    model = DistributedDataParallel(plain)
    optimizer = ak.AIMFusedOptimizer(groups, lr=3e-3)
    aim = ak.AIM(model, optimizer, num_classes=CLASSES)

    for epoch in range(EPOCHS):
        table = aim.update((shape[:256], colour[:256]), labels[:256], held_out=(held_out, held_out_labels))
        if dist.get_rank() == 0:
            strengths = {modality: [round(kappa, 2) for kappa in row] for modality, row in table.kappa.items()}
            print(f"epoch {epoch}: strength by depth {strengths}")
        for batch in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(shape[batch], colour[batch]), labels[batch]).backward()
            optimizer.step()

    optimizer.eval()
    if dist.get_rank() == 0:
        with torch.no_grad():
            right = (plain(*test).argmax(1) == test_labels).float().mean().item()
        print(f"{right:.1%} of the test samples")


def end() -> None:
    """Once nothing holds the process group any more: one that outlives its end may abort the exit (torch 2.13, gloo,
    whose threads let go of Python objects while the interpreter goes)."""
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    end()
