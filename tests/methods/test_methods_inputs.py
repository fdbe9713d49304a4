"""Inputs as trees, missing modalities, frames, and steps in parts: what every method takes, or refuses by name."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from method_helpers import CLASSES, EXACT, WIDTH, Net, assert_same, batch, made, network, sgd
from torch import Tensor, nn

import aim_kernels as ak
from aim_kernels.experiments.networks.fusion import Concatenation
from aim_kernels.experiments.networks.multimodal import MultimodalNetwork
from aim_kernels.methods import METHODS, make_method

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = pytest.mark.parametrize("name", METHODS)
SEVERAL_PASSES = ("mmpareto", "mla", "sam", "m-sam", "best-subset")
#: Of which every batch has draws, or weights, of its own.
BY_BATCH = ("opm", "modality-dropout", "train-on-held", "pmr", "drop")


class Keywords(nn.Module):
    """Tokens and a mask for one modality, an image for the other; ``present`` says who has which."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.image = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.head = nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor, image: Tensor, present: Tensor | None = None) -> Tensor:
        here = torch.ones(len(tokens), 2).to(tokens) if present is None else present.to(tokens)
        z = [self.words(tokens * mask) * here[:, :1], self.image(image) * here[:, 1:]]
        return self.head(torch.cat(z, 1))


ARGUMENTS = {"text": ("tokens", "mask"), "image": "image"}


def keywords(name: str, **options: Any) -> tuple[Keywords, Any]:
    torch.manual_seed(0)
    net = Keywords().double()
    blocks = ak.Blocks(
        net,
        {"text": [net.words], "image": [net.image]},
        lambda z: net.head(torch.cat(z, 1)),
        arguments=ARGUMENTS,
    )
    return net, make_method(name, blocks, sgd(blocks), **options)


def samples(seed: int = 0, count: int = 12) -> dict[str, Tensor]:
    (_, x), labels = batch(2, seed, count)
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(count, 5, generator=generator) > 0.2).double()
    return {"tokens": x, "mask": mask, "image": x.flip(1), "labels": labels}


@EVERY
def test_keywords_masks_and_missing_modalities(name: str) -> None:
    net, method = keywords(name)
    given = samples()
    inputs = {key: x for key, x in given.items() if key != "labels"}
    present = torch.rand(12, 2, generator=torch.Generator().manual_seed(1)) > 0.3
    if name == "mla":
        with pytest.raises(TypeError, match=r"the input of 'text' has several arguments \(tokens, mask\)"):
            method.step(given)
        return
    held = samples(1)
    method.update(given, held_out=held, present=present)
    before = copy.deepcopy(net)
    expected = nn.functional.cross_entropy(net(**inputs, present=present), given["labels"])
    found = method.step(inputs, given["labels"], present=present)
    if name in ("joint", "aim", "ogm", "sam", "best-subset", "weight-averaging"):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0.0)
    assert found.isfinite() and not torch.equal(before.head.weight, net.head.weight)
    assert method.step(given, present=present).isfinite(), "a loader's batch"
    with method.evaluating():
        net(**inputs)


def test_a_loaders_batch_is_a_batch() -> None:
    inputs, labels = batch(2)
    losses = []
    for given in (
        (inputs, labels),
        ([*inputs, labels],),
        ((inputs, labels),),
        ({"a": inputs[0], "b": inputs[1]}, labels),
        ([x.numpy() for x in inputs], labels.numpy()),
    ):
        _, method = made("joint")
        if isinstance(given[0], dict):
            method.blocks.model.forward = lambda a, b, net=method.blocks.model: net.head(
                torch.cat(net.features([a, b]), 1)
            )
        losses.append(method.step(*given).item())
    assert len(set(losses)) == 1
    _, method = made("joint")
    with pytest.raises(ValueError, match="inputs must be 2 tensors, one a modality"):
        method.step(torch.utils.data.DataLoader([1, 2]), labels)


def test_updates_take_loaders() -> None:
    inputs, labels = batch(2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*inputs, labels), batch_size=5)
    net, method = made("pmr")
    other, twin = made("pmr")
    method.update(loader, held_out=loader)
    twin.update(inputs, labels)
    for p, q in zip(method.prototypes, twin.prototypes, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0.0)
    method.step(inputs, labels)
    twin.step(inputs, labels)
    assert_same(net, other)


def test_held_out_samples_of_any_form_are_joined_and_saved() -> None:
    net, method = keywords("train-on-held", share=0.5)
    given, held = samples(), samples(1, count=6)
    method.update(given, held_out=held)
    present = torch.ones(12, 2, dtype=torch.bool)
    present[0, 0] = False
    path = io.BytesIO()
    torch.save(method.state_dict(), path)
    expected_inputs = {key: torch.cat([given[key], held[key][method_order(method)]]) for key in given}
    expected_present = torch.cat([present, torch.ones(6, 2, dtype=torch.bool)])
    labels = expected_inputs.pop("labels")
    expected = nn.functional.cross_entropy(net(**expected_inputs, present=expected_present), labels)
    torch.testing.assert_close(method.step(given, present=present), expected.detach(), rtol=1e-12, atol=0.0)

    other, resumed = keywords("train-on-held", share=0.5)
    path.seek(0)
    resumed.load_state_dict(torch.load(path, weights_only=True))
    resumed.step(given, present=present)
    assert_same(net, other, rtol=0.0, atol=0.0)
    resumed.update(given, held_out={**held, "labels": held["labels"].double()})
    with pytest.raises(ValueError, match="TrainOnHeld joins training and held-out samples, which differ: labels are"):
        resumed.step(given)


def method_order(method: Any) -> Tensor:
    """The order that the first draw will make, without a draw."""
    generator = torch.Generator()
    generator.set_state(method.generator.get_state())
    return torch.randperm(6, generator=generator)


def with_missing(name: str) -> tuple[MultimodalNetwork, Any]:
    torch.manual_seed(0)
    encoders = {m: [nn.Linear(5, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, WIDTH))] for m in "ab"}
    net = MultimodalNetwork(encoders, Concatenation([WIDTH, WIDTH], CLASSES)).double()
    blocks = net.as_blocks()
    return net, make_method(name, blocks, sgd(blocks))


def frames(name: str, count: int = 3, **options: Any) -> tuple[Net, Any]:
    """Every sample as several frames, folded into the batch, between the model's input and its fusion."""
    torch.manual_seed(0)
    net = Net(2).double()

    def fuse(z: list[Tensor]) -> Tensor:
        return net.head(torch.cat([x.unflatten(0, (-1, count)).mean(1) for x in z], 1))

    net.forward = lambda *inputs: fuse(net.features([x.repeat_interleave(count, 0) for x in inputs]))  # type: ignore
    blocks = ak.Blocks(net, dict(zip("ab", map(list, net.encoders), strict=True)), fuse=fuse)
    return net, make_method(name, blocks, sgd(blocks), **options)


@EVERY
def test_frames_of_a_sample_count_as_one(name: str) -> None:
    """Equal frames are the same network as one, so that training is the same, too."""
    net, method = frames(name)
    other, twin = frames(name, 1)
    if name == "mla":
        with pytest.raises(ValueError, match="MLA runs the blocks of 'a' one after the other"):
            method.step(*batch(2))
        return
    for step in range(4):
        if step % 2 == 0 and name not in ("aim", "feature-scale", "no-mask", "drop"):
            for each in (method, twin):
                each.update(*batch(2, seed=20 + step), held_out=batch(2, seed=30 + step))
        method.step(*batch(2, seed=step))
        twin.step(*batch(2, seed=step))
    # amss masks by ranks of gradients, which the order of sums may not turn here
    assert_same(net, other, rtol=1e-9, atol=1e-12)


def test_dropped_features_are_those_of_samples() -> None:
    net, method = frames("drop", probe=lambda model, inputs, labels: torch.tensor([[9.0, 9.0], [1.0, 1.0]]))
    method.update(*batch(2))
    assert method.aim.mixing_state["drop"]["a"] > 0.0
    method.aim.mixing_state["drop"]["a"] = 0.5
    seen: list[Tensor] = []
    handle = net.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    method.step(*batch(2))
    handle.remove()
    kept = seen[0][:, :WIDTH] != 0.0
    assert torch.equal(kept.all(1), kept.any(1)) and 0 < int(kept.any(1).sum()) < 12


class Recurrent(nn.Module):
    """A last block that returns what ``wrap`` makes of a tensor, taken apart again by the fusion."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = nn.Linear(8, WIDTH), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


def structured(name: str, wrap: Any, unwrap: Any, **options: Any) -> tuple[Net, Any]:
    torch.manual_seed(0)
    net = Net(2).double()
    torch.manual_seed(1)
    for encoder in net.encoders:
        encoder[1] = Recurrent(wrap).double()

    def fuse(z: list[Any]) -> Tensor:
        return net.head(torch.cat([unwrap(x) for x in z], 1))

    net.forward = lambda *inputs: fuse(net.features(inputs))  # type: ignore[method-assign]
    blocks = ak.Blocks(net, dict(zip("ab", map(list, net.encoders), strict=True)), fuse=fuse)
    return net, make_method(name, blocks, sgd(blocks), **options)


@EVERY
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_what_a_block_returns_is_put_together_again(name: str, kind: str) -> None:
    wrap, unwrap = {
        "tuple": (lambda z: (z, None), lambda x: x[0]),
        "dict": (lambda z: {"last": z, "kind": "text"}, lambda x: x["last"]),
    }[kind]
    net, method = structured(name, wrap, unwrap)
    other, twin = structured(name, lambda z: z, lambda x: x)
    for step in range(3):
        if step == 0:
            for each in (method, twin):
                each.update(*batch(2, seed=20), held_out=batch(2, seed=30))
        assert method.step(*batch(2, seed=step)) == twin.step(*batch(2, seed=step))
    assert_same(net, other, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ["opm", "modality-dropout"])
def test_features_of_which_nobody_says_what_counts_samples_are_refused(name: str) -> None:
    options = {"probability": 1.0, "base": 1.0} if name == "opm" else {}
    net, method = structured(name, lambda z: (z, z[None]), lambda x: x[0] + x[1][0], **options)
    before = copy.deepcopy(net)
    with pytest.raises(TypeError, match="the last block of 'a' returns a tuple with 2 tensors of floating point"):
        method.step(*batch(2))
    assert_same(net, before, rtol=0.0, atol=0.0)
    assert structured("joint", lambda z: (z, z[None]), lambda x: x[0])[1].step(*batch(2)).isfinite()


@pytest.mark.parametrize("name", ["opm", "modality-dropout", "pmr", "amss", "drop"])
@pytest.mark.parametrize("length", [5, 12, 24])
def test_sequences_first_are_refused(name: str, length: int) -> None:
    """``[T, B, C]``, also of as many steps as samples, which a batch alone cannot tell from ``[B, T, C]``."""

    def made_of(first: bool) -> Any:
        shape = (length, -1, -1) if first else (-1, length, -1)
        where = 0 if first else 1
        return structured(name, lambda z: z.unsqueeze(where).expand(shape), lambda x: x.mean(where))[1]

    method = made_of(True)
    with pytest.raises(ValueError, match="the last block of 'a' has features of shape"):
        method.step(*batch(2))
    assert made_of(False).step(*batch(2)).isfinite()


@EVERY
def test_a_last_block_that_is_called_twice_is_refused(name: str) -> None:
    net, blocks = network(2)
    net.forward = lambda a, b: net.head(torch.cat([net.encoders[0](a), net.encoders[1](b) + net.encoders[1](-b)], 1))
    method = make_method(name, blocks, sgd(blocks))
    before = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match=r"the last block of 'b' is called more than once .* give Blocks encode="):
        method.step(*batch(2))
    assert_same(net, before, rtol=0.0, atol=0.0)


class Between(nn.Module):
    """Blocks with a scale between them, small or none."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a, self.b = (nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, WIDTH)]) for _ in range(2))
        self.fusion = Concatenation([WIDTH, WIDTH], CLASSES)

    def forward(self, *inputs: Tensor) -> Tensor:
        z = [blocks[1](blocks[0](x) * (1.0 + self.scale)) for blocks, x in zip((self.a, self.b), inputs, strict=True)]
        return self.fusion(z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mla_refuses_a_network_with_something_between_its_blocks(dtype: torch.dtype) -> None:
    inputs, labels = [batch(2)[0][1].to(dtype) for _ in range(2)], batch(2)[1]
    for scale in (0.0, 0.5, 1e-3 if dtype == torch.float32 else 1.0):
        net = Between(scale).to(dtype)
        blocks = ak.Blocks(net, {"a": list(net.a), "b": list(net.b)}, net.fusion)
        method = make_method("mla", blocks, ak.AIMFusedOptimizer(blocks.param_groups(), lr=0.1))
        before, state = copy.deepcopy(net), torch.get_rng_state()
        if not scale:
            assert method.step(inputs, labels).isfinite()
            continue
        with pytest.raises(ValueError, match=r"MLA runs the blocks of 'a' one after the other.*something lies between"):
            method.step(inputs, labels)
        assert_same(net, before, rtol=0.0, atol=0.0)
        assert torch.equal(state, torch.get_rng_state())


def test_mla_refuses_present_and_steps_what_is_there() -> None:
    net, method = with_missing("mla")
    (_, x), labels = batch(2)
    with pytest.raises(ValueError, match=r"MLA steps one encoder at a time.*present="):
        method.step([x, x], labels, present=torch.ones(12, 2, dtype=torch.bool))
    before = copy.deepcopy(net)
    assert method.step([x, None], labels).isfinite() and method.compared == {0}
    assert torch.equal(net.encoders["b"][0].weight, before.encoders["b"][0].weight)
    assert method.step([x, x], labels).isfinite() and method.compared == {0, 1}


@EVERY
def test_batches_add_up_to_one_step(name: str) -> None:
    net, method = made(name)
    other, twin = made(name)
    inputs, labels = batch(2)
    if name in SEVERAL_PASSES:
        with pytest.raises(ValueError, match="is several passes, which cannot be accumulated or scaled"):
            method.backward(inputs, labels)
        with pytest.raises(ValueError, match="is several passes"):
            method.step(inputs, labels, scaler=torch.amp.GradScaler("cpu"))
        return
    with pytest.raises(RuntimeError, match=r"apply\(\) takes the step of gradients that backward\(\) left"):
        method.apply()
    for step in range(3):
        inputs, labels = batch(2, seed=step)
        if step == 0 and name not in BY_BATCH:
            for each in (method, twin):
                each.update(*batch(2, seed=20), held_out=batch(2, seed=30))
        if name in BY_BATCH:  # the same batch
            method.backward(inputs, labels)
        else:
            for part in (slice(0, 6), slice(6, 12)):
                method.backward([x[part] for x in inputs], labels[part], scale=0.5)
        method.apply()
        twin.step(inputs, labels)
    assert_same(net, other, **(EXACT if not name.startswith("ogm") else {"rtol": 1e-6, "atol": 1e-7}))


@EVERY
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_changes_nothing_but_the_scale(name: str, fused: bool) -> None:
    if name in SEVERAL_PASSES:
        return
    losses = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    nets = []
    for given in ({"scaler": scaler}, {}):
        torch.manual_seed(0)
        net, blocks = network(2)
        net.float()
        method = make_method(name, blocks, sgd(blocks, fused_scaling=fused and bool(given)))
        nets.append(net)
        for step in range(3):
            (inputs, labels), held = batch(2, seed=step), batch(2, seed=30)
            inputs, held = [x.float() for x in inputs], ([x.float() for x in held[0]], held[1])
            if step == 0:
                method.update(inputs, labels, held_out=held)
            losses.append(method.step(inputs, labels, **given).item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    # float32 with another factor, a power of two: equal but for what the kernels add up in another order
    assert_same(*nets, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["amss", "inforeg", "ogm"])
def test_a_step_that_a_scaler_skips_leaves_no_trace(name: str) -> None:
    scaler, factor = torch.amp.GradScaler("cpu", init_scale=2.0**8), [torch.inf]
    net, blocks = network(2)
    net.float()
    loss = lambda logits, labels: nn.functional.cross_entropy(logits, labels) * factor[0]  # noqa: E731
    method = make_method(name, blocks, sgd(blocks), loss=loss)
    inputs, labels = batch(2)
    inputs = [x.float() for x in inputs]
    method.update(inputs, labels, held_out=(inputs, labels))
    before = copy.deepcopy(net)
    method.step(inputs, labels, scaler=scaler)
    assert scaler.get_scale() == 2.0**7
    assert_same(net, before, rtol=0.0, atol=0.0)
    factor[0] = 1.0
    assert method.step(inputs, labels, scaler=scaler).isfinite()
    assert all(p.isfinite().all() for p in net.parameters())
    if name == "inforeg":
        assert method.trace.isfinite().all()
