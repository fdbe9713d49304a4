"""AIM under FSDP2: parameters, moments and true weights in parts, thresholds and strengths those of whole blocks. A
checkpoint by torch.distributed.checkpoint is taken half-way; a second model goes on from it.

Run it: torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ddp import BATCH, EPOCHS, begin, end, shard
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from two_modalities import CLASSES, TwoModalities, samples

import aim_kernels as ak


def build(device: torch.device) -> tuple[nn.Module, ak.AIMFusedOptimizer, ak.AIM]:
    torch.manual_seed(0)
    model = TwoModalities().to(device)
    for block in (*model.shape, *model.colour):
        fully_shard(block)
    fully_shard(model)
    # After sharding, which makes other parameters. Masters at all times: checkpoints have the same states always.
    groups = ak.block_param_groups(model, {"shape": list(model.shape), "colour": list(model.colour)})
    optimizer = ak.AIMFusedOptimizer(groups, lr=3e-3, keep_masters=True)
    return model, optimizer, ak.AIM(model, optimizer, num_classes=CLASSES)


def save(folder: str, model: nn.Module, optimizer: ak.AIMFusedOptimizer, aim: ak.AIM) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    if dist.get_rank() == 0:  # it is the same everywhere
        torch.save(aim.state_dict(), f"{folder}/aim.pt")
    dist.barrier()


def load(folder: str, model: nn.Module, optimizer: ak.AIMFusedOptimizer, aim: ak.AIM) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    aim.load_state_dict(torch.load(f"{folder}/aim.pt"))


def main() -> None:
    device = begin()
    shape, colour, labels = shard(samples(1024, shortcut=True, seed=2), device)
    *held_out, held_out_labels = shard(samples(256, shortcut=False, seed=3), device)
    *test, test_labels = (tensor.to(device) for tensor in samples(2048, shortcut=False, seed=4))
    folder = [tempfile.mkdtemp()]  # that of rank 0, which all see
    dist.broadcast_object_list(folder)

    model, optimizer, aim = build(device)
    for epoch in range(EPOCHS):
        if epoch == EPOCHS // 2:
            save(folder[0], model, optimizer, aim)
            model, optimizer, aim = build(device)
            load(folder[0], model, optimizer, aim)
        table = aim.update((shape[:256], colour[:256]), labels[:256], held_out=(held_out, held_out_labels))
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: strength by depth {table.kappa}")
        for batch in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(shape[batch], colour[batch]), labels[batch]).backward()
            optimizer.step()

    optimizer.eval()
    with torch.no_grad():
        right = (model(*test).argmax(1) == test_labels).float().mean().item()
    if dist.get_rank() == 0:
        print(f"{right:.1%} of the test samples")


if __name__ == "__main__":
    main()
    end()
