"""What an installed wheel must do, whatever PyTorch it meets: ``python wheel_smoke.py``, needs nothing but the wheel.

Run by ``make check-wheel`` with the oldest and the newest PyTorch that are supported, and by cibuildwheel with each
wheel; it is not a pytest module, since neither has pytest.
"""

import inspect
import io
import pathlib
import sys

import torch
from torch import nn

import aim_kernels as ak
from aim_kernels import diagnostics

STEPS = 20
# Rounding of a few ulp a step, on weights of the order of one.
TOLERANCE = 2e-5
RULES = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
}


class Network(nn.Module):
    """Two encoders and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.Sequential(nn.Linear(9, 70), nn.Tanh())
        self.video = nn.Sequential(nn.Linear(5, 33), nn.Tanh())
        self.head = nn.Linear(103, 3)

    def forward(self, audio: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.audio(audio), self.video(video)], 1))


def made() -> Network:
    torch.manual_seed(0)
    return Network()


def blocks(network: Network) -> list[dict[str, object]]:
    return ak.block_param_groups(network, {"audio": [network.audio], "video": [network.video]})


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, count: int = STEPS, first: int = 0) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        inputs = [torch.randn(16, size, generator=generator) for size in (9, 5)]
        labels = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(*inputs), labels).backward()
        optimizer.step()


def check_rules() -> None:
    for rule, (theirs, options) in RULES.items():
        ours, by_class, other = made(), made(), made()
        steps(ours, ak.AIMFusedOptimizer(ours.parameters(), rule=rule, **options))
        steps(by_class, getattr(ak, theirs.__name__)(by_class.parameters(), **options))
        steps(other, theirs(other.parameters(), **options))
        for network in (ours, by_class):
            for (name, p), q in zip(network.named_parameters(), other.parameters(), strict=True):
                gap = (p - q).abs().max().item()
                assert gap <= TOLERANCE, f"{rule}: {name} differs from torch.optim by {gap}"


def check_signatures() -> None:
    """The classes take what this PyTorch's take."""
    for theirs in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop):
        ours = inspect.signature(getattr(ak, theirs.__name__)).parameters
        for name, expected in inspect.signature(theirs).parameters.items():
            assert name in ours, f"{theirs.__name__}: no {name}"
            found = ours[name].kind, ours[name].default
            assert found == (expected.kind, expected.default), f"{theirs.__name__}: {name} is {found}"


def check_live_weights_and_checkpoints() -> None:
    through, first, second = made(), made(), made()
    optimizers = []
    for network in (through, first, second):
        optimizer = ak.AIMFusedOptimizer(blocks(network), lr=1e-2)
        optimizer.set_strength("video", 0, 0.5)
        optimizers.append(optimizer)
    steps(through, optimizers[0])
    steps(first, optimizers[1], STEPS // 2)
    weight, state = first.video[0].weight, optimizers[1].state[first.video[0].weight]
    live = weight.detach().clone()
    assert not torch.equal(live, state["master"])
    optimizers[1].eval()
    assert torch.equal(weight, state["master"])
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizers[1].state_dict()], file)
    optimizers[1].train()
    assert torch.equal(weight, live)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    optimizers[2].load_state_dict(states)
    for network, optimizer in ((first, optimizers[1]), (second, optimizers[2])):
        steps(network, optimizer, STEPS - STEPS // 2, STEPS // 2)
        for (name, p), q in zip(network.named_parameters(), through.parameters(), strict=True):
            assert torch.equal(p, q), f"{name} after a checkpoint"


def check_modulation() -> None:
    network = made()
    optimizer = ak.AIMFusedOptimizer(blocks(network), lr=1e-2)
    aim = ak.AIM(network, optimizer, num_classes=3)
    steps(network, optimizer, 3)
    labels = torch.randint(3, (32,))
    inputs = torch.randn(32, 9), torch.randn(32, 5) * 0.1 + labels[:, None]
    for _ in range(3):
        aim.update(inputs, labels)
        steps(network, optimizer, 5)
    assert all(row["nonfinite"] == 0 and row["update_norm"] > 0.0 for row in optimizer.statistics())


def main() -> None:
    installed = pathlib.Path(ak.__file__).resolve()
    here = pathlib.Path(__file__).resolve().parents[2]
    assert not installed.is_relative_to(here / "aim_kernels"), f"{installed} is the checkout, not an installed wheel"
    assert ak.backends()["cpu"].available, ak.backends()["cpu"].reason
    check_rules()
    check_signatures()
    check_live_weights_and_checkpoints()
    check_modulation()
    told = diagnostics.environment()
    active = told["extension"].get("active isa", "none")
    print(f"aim-kernels {ak.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}, {active}: passed")


if __name__ == "__main__":
    main()
