"""Networks: shapes, gradients, fusions and their unimodal logits, missing modalities, and what methods see of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aim_kernels import AIMFusedOptimizer
from aim_kernels.experiments.data import MultimodalData, Split, coloured_digits
from aim_kernels.experiments.networks import (
    BACKBONES,
    FUSIONS,
    Concatenation,
    CrossAttention,
    FiLM,
    Gated,
    MultimodalNetwork,
    Sum,
    mlp_blocks,
    network_for,
    network_of,
    resnet18_blocks,
    transformer_blocks,
)
from aim_kernels.experiments.networks.transformer import Tokens, sinusoids
from aim_kernels.methods import Blocks, Method

pytestmark = pytest.mark.usefixtures("one_thread")

#: The same float32 sums in another order: a few units in the last place of values around one.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
SHAPES = {"table": (7,), "signal": (3, 40), "image": (1, 16, 20), "video": (3, 2, 16, 16)}
#: Blocks of every backbone for every type of sample; 0 where it does not take them.
DEPTHS = {
    "auto": (3, 3, 3, 5),
    "mlp": (3, 3, 3, 3),
    "conv": (0, 3, 3, 0),
    "resnet18": (0, 0, 5, 5),
    "transformer": (0, 3, 3, 3),
    "auto-batchnorm": (3, 3, 3, 5),
    "resnet18-batchnorm": (0, 0, 5, 5),
}


def features(count: int, batch: int = 5, widths: tuple[int, ...] = (8, 12, 6)) -> list[Tensor]:
    return [torch.randn(batch, width) for width in widths[:count]]


@pytest.mark.parametrize("sample", list(SHAPES))
@pytest.mark.parametrize("backbone", list(DEPTHS))
def test_backbones_give_features_and_reach_every_parameter(backbone: str, sample: str) -> None:
    assert set(DEPTHS) == set(BACKBONES)
    depth = dict(zip(SHAPES, DEPTHS[backbone], strict=True))[sample]
    shapes = {"first": SHAPES[sample], "second": SHAPES[sample]}
    if depth == 0:
        with pytest.raises(ValueError, match=f"backbone '{backbone}' does not take samples of the shape .* of 'first'"):
            network_of(shapes, 4, backbone)
        return
    model = network_of(shapes, 4, backbone)
    assert [len(blocks) for blocks in model.blocks().values()] == [depth, depth]
    inputs = [torch.randn(3, *SHAPES[sample]) for _ in range(2)]
    assert [z.shape for z in model.features(*inputs)] == [(3, 64)] * 2
    logits = model(*inputs)
    assert logits.shape == (3, 4)
    F.cross_entropy(logits, torch.tensor([0, 1, 3])).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    # a sample's logits do not depend on its neighbours in the batch, but for batch normalization in training
    if "batchnorm" in backbone:
        assert any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules())
        model.eval()
        logits = model(*inputs)
    torch.testing.assert_close(model(*(x[1:2] for x in inputs)), logits[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnet18_is_the_published_network(norm: str) -> None:
    blocks = resnet18_blocks(3, norm=norm)
    assert len(blocks) == 5
    # convolutions of torchvision's resnet18 without its classifier: 11,166,912 weights; 9,600 of its normalizations
    count = sum(p.numel() for block in blocks for p in block.parameters())
    assert count == 11_166_912 + 9_600
    sizes, x = [], torch.randn(2, 3, 64, 64)
    for block in blocks:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512,)]
    types = {type(m) for block in blocks for m in block.modules()}
    assert (nn.GroupNorm in types, nn.BatchNorm2d in types) == (norm == "group", norm == "batch")
    small = resnet18_blocks(1, 64, small=True)[0]
    assert small(torch.randn(2, 1, 12, 12)).shape == (2, 8, 12, 12)
    with pytest.raises(ValueError, match="width must be a multiple of 64, got 100"):
        resnet18_blocks(3, 100)
    with pytest.raises(ValueError, match="unknown norm 'layer'"):
        resnet18_blocks(3, norm="layer")


def test_a_video_is_the_mean_of_its_frames() -> None:
    blocks = nn.Sequential(*resnet18_blocks(3, 64, small=True)).double()
    video = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)
    each = torch.stack([blocks(video[:, :, t]) for t in range(4)])
    torch.testing.assert_close(blocks(video), each.mean(0), rtol=1e-10, atol=1e-12)


def test_tokens_are_patches_with_positions() -> None:
    tokens = Tokens(2, 8, (3, 2))
    x = torch.randn(2, 2, 7, 4)
    z = tokens(x)
    assert z.shape == (2, 6, 8)
    padded = F.pad(x, (0, 0, 0, 2))
    for n, (i, j) in enumerate((i, j) for i in range(3) for j in range(2)):
        patch = padded[:, :, 3 * i : 3 * i + 3, 2 * j : 2 * j + 2].flatten(1)
        torch.testing.assert_close(z[:, n], tokens.linear(patch) + sinusoids(6, 8)[n], **CLOSE)
    expected = torch.tensor([[f(t / 10000 ** (i / 2)) for f in (math.sin, math.cos) for i in (0, 1)] for t in range(5)])
    torch.testing.assert_close(sinusoids(5, 4), expected, **CLOSE)
    with pytest.raises(ValueError, match="need an input of 4 axes"):
        tokens(torch.randn(2, 2, 7))


def test_transformers_see_order_and_refuse_what_does_not_fit() -> None:
    encoder = nn.Sequential(*transformer_blocks(1, (1,), 16, 2, 2))
    x = torch.randn(3, 1, 6)
    assert encoder(x).shape == (3, 16)
    assert not torch.allclose(encoder(x), encoder(x.flip(2)), atol=1e-3)
    for options, message in (
        ({"width": 12}, "width must be a multiple of 8"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"patch": (0,)}, "patch must have"),
        ({"patch": (1, 1, 1, 1)}, "patch must have"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer_blocks(**{"channels": 1, "patch": (1,), "width": 16, **options})


# -- fusions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", list(FUSIONS))
def test_fusions_give_logits_of_all_and_of_each(name: str, count: int) -> None:
    z = [x.requires_grad_() for x in features(count)]
    fusion = FUSIONS[name]([x.shape[1] for x in z], 4)
    assert fusion.widths == (8, 12, 6)[:count]
    joint, alone = fusion(z), fusion.unimodal(z)
    assert joint.shape == (5, 4) and [x.shape for x in alone] == [(5, 4)] * count
    # the modality's own logits hang on its own features and on no other's
    for own, logits in enumerate(alone):
        gradients = torch.autograd.grad(logits.square().sum(), z, allow_unused=True, retain_graph=True)
        assert [g is not None and bool(g.any()) for g in gradients] == [m == own for m in range(count)]
    joint.square().sum().backward()
    assert all(x.grad is not None and x.grad.any(1).all() for x in z)
    assert all(p.grad is not None and p.grad.any() for p in fusion.parameters())
    if name in ("concat", "sum"):
        torch.testing.assert_close(sum(alone), joint, **CLOSE)
    else:
        zeros = [torch.zeros_like(x) for x in z]
        for own, logits in enumerate(alone):
            torch.testing.assert_close(logits, fusion([*zeros[:own], z[own], *zeros[own + 1 :]]), rtol=0, atol=0)


def test_fusions_follow_their_formulae() -> None:
    z = features(3)
    with torch.no_grad():
        concat = Concatenation((8, 12, 6), 4)
        torch.testing.assert_close(concat(z), torch.cat(z, 1) @ concat.head.weight.T + concat.head.bias, **CLOSE)
        added = Sum((8, 12, 6), 4)
        expected = torch.zeros(5, 4)
        for head, x in zip(added.heads, z, strict=True):
            expected += x @ head.weight.T + head.bias
        torch.testing.assert_close(added(z), expected, **CLOSE)
        film = FiLM((8, 12, 6), 4)
        h = film.project(z[0])
        for condition, x in zip(film.conditions, z[1:], strict=True):
            both = x @ condition.weight.T + condition.bias
            h = (1 + both[:, :8]) * h + both[:, 8:]
        torch.testing.assert_close(film(z), film.head(h.clamp_min(0)), **CLOSE)
        gated = Gated((8, 12, 6), 4)
        h, everything = torch.zeros(5, 12), torch.cat(z, 1)
        for m, x in enumerate(z):
            gate = torch.sigmoid(everything @ gated.gates.weight[12 * m : 12 * m + 12].T)
            h += gate * torch.tanh(x @ gated.values[m].weight.T)
        torch.testing.assert_close(gated(z), gated.head(h), **CLOSE)
        attention = CrossAttention((8, 12, 6), 4, tokens=2, width=10)
        found = []
        tokens = [attention.split[m](x).view(5, 2, 10) + attention.places[m] for m, x in enumerate(z)]
        for m in range(3):
            others = torch.cat([t for k, t in enumerate(tokens) if k != m], 1)
            scores = attention.query(tokens[m]) @ attention.key(others).transpose(1, 2) / math.sqrt(10)
            read = scores.softmax(2) @ attention.value(others)
            found.append(attention.norm(tokens[m] + attention.out(read)).mean(1))
        torch.testing.assert_close(attention(z), attention.head(torch.cat(found, 1)), **CLOSE)


def test_fusions_refuse_what_they_cannot_fuse() -> None:
    for widths, classes, message in (((8,), 4, "widths"), ((8, 0), 4, "widths"), ((8, 8), 1, "num_classes")):
        with pytest.raises(ValueError, match=message):
            Concatenation(widths, classes)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        CrossAttention((8, 8), 3, tokens=0)


# -- missing modalities ------------------------------------------------------------------------------------------------


def three(fusion: str = "concat", missing: str = "zeros") -> tuple[MultimodalNetwork, list[Tensor]]:
    shapes = {"a": (7,), "b": (3, 24), "c": (1, 8, 8)}
    return network_of(shapes, 4, fusion=fusion, width=16, missing=missing), [
        torch.randn(6, *shape) for shape in shapes.values()
    ]


@pytest.mark.parametrize("missing", ["zeros", "learnt"])
@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_a_missing_input_gives_its_encoder_no_gradient(fusion: str, missing: str) -> None:
    model, inputs = three(fusion, missing)
    if model.absent is not None:
        with torch.no_grad():
            model.absent[1].copy_(torch.arange(16.0))
    z = model.features(inputs[0], None, inputs[2])
    expected = torch.arange(16.0).expand(6, 16) if missing == "learnt" else torch.zeros(6, 16)
    assert torch.equal(z[1], expected)
    whole = model.features(*inputs)
    assert torch.equal(z[0], whole[0]) and torch.equal(z[2], whole[2])
    logits = model(inputs[0], None, inputs[2])
    assert torch.equal(logits, model.fuse([whole[0], expected, whole[2]]))
    logits.square().sum().backward()
    assert all(p.grad is None for p in model.encoders["b"].parameters())
    assert all(p.grad is not None for name in "ac" for p in model.encoders[name].parameters())
    if model.absent is not None:
        assert model.absent[1].grad is not None and model.absent[1].grad.any()
        assert model.absent[0].grad is None


@pytest.mark.parametrize("missing", ["zeros", "learnt"])
def test_samples_without_a_modality(missing: str) -> None:
    model, inputs = three("gated", missing)
    if model.absent is not None:
        with torch.no_grad():
            for m, vector in enumerate(model.absent):
                vector.fill_(0.5 + m)
    present = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.bool)
    holes = [x.masked_fill(~present[:, m].view(-1, *(1,) * (x.dim() - 1)), torch.nan) for m, x in enumerate(inputs)]
    z, whole = model.features(*holes, present=present), model.features(*inputs)
    for m in range(3):
        filler = torch.full((16,), 0.5 + m if missing == "learnt" else 0.0)
        for i in range(6):
            torch.testing.assert_close(z[m][i], whole[m][i] if present[i, m] else filler, **CLOSE)
    model(*holes, present=present).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # without a single sample of a modality, its gradients are zeros rather than rubbish
    model.zero_grad()
    nobody = present.clone()
    nobody[:, 1] = False
    model(inputs[0], torch.full_like(inputs[1], torch.nan), inputs[2], present=nobody).square().sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.encoders["b"].parameters())


def test_inputs_that_make_no_sense() -> None:
    model, inputs = three()
    with pytest.raises(ValueError, match="every input is None"):
        model(None, None, None)
    with pytest.raises(ValueError, match="give one input a modality"):
        model(*inputs[:2])
    with pytest.raises(ValueError, match="present must have the shape"):
        model(*inputs, present=torch.ones(6, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least two modalities"):
        MultimodalNetwork({"a": mlp_blocks(3)}, Concatenation((64, 64), 3))
    with pytest.raises(ValueError, match="fusion takes 3 modalities, encoders has 2"):
        MultimodalNetwork({"a": mlp_blocks(3), "b": mlp_blocks(3)}, Concatenation((64, 64, 64), 3))
    with pytest.raises(ValueError, match="unknown missing 'mean'"):
        MultimodalNetwork({"a": mlp_blocks(3), "b": mlp_blocks(3)}, Concatenation((64, 64), 3), missing="mean")
    for options, message in (
        ({"fusion": "max"}, "unknown fusion 'max'"),
        ({"backbone": "vgg"}, "unknown backbone 'vgg' of 'a'"),
        ({"backbone": {"a": "mlp"}}, "backbone must name the modalities"),
        ({"width": 20, "backbone": "conv"}, "width must be a multiple of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            network_of({"a": (3, 30), "b": (3, 30)}, 3, **options)  # type: ignore[arg-type]


# -- what methods see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_blocks_see_the_features_that_the_model_fuses(fusion: str) -> None:
    model, inputs = three(fusion)
    blocks = model.as_blocks()
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    for given in (inputs, [inputs[0], None, inputs[2]]):
        outputs = blocks.forward(given, labels)  # type: ignore[arg-type]
        assert torch.equal(outputs.logits, model(*given))
        assert torch.equal(blocks.fuse(blocks.encode(given)), model(*given))  # type: ignore[arg-type]
        assert all(map(torch.equal, outputs.features, blocks.encode(given)))  # type: ignore[arg-type]
        assert all(map(torch.equal, outputs.unimodal(), model.fusion.unimodal(outputs.features)))
    # the caught features are those of the graph: their gradients are there
    outputs = blocks.forward(inputs, labels)
    found = torch.autograd.grad(F.cross_entropy(outputs.logits, labels), outputs.features)
    assert all(g.any() for g in found)
    # and the hook is gone
    assert not model.fusion._forward_pre_hooks


def test_blocks_without_an_encode_of_their_own_stay_as_they_were() -> None:
    model, inputs = three()
    plain = Blocks(model, model.blocks(), model.fuse)
    outputs = plain.forward(inputs, torch.zeros(6, dtype=torch.int64))
    assert all(map(torch.equal, outputs.features, model.features(*inputs)))
    assert all(map(torch.equal, plain.encode(inputs), model.features(*inputs)))
    with pytest.raises(ValueError, match="encode needs a fuse that is a module of the model"):
        Blocks(model, model.blocks(), model.fuse, encode=model.features)


def test_methods_train_with_missing_modalities() -> None:
    model, inputs = three(missing="learnt")
    blocks = model.as_blocks()
    optimizer = AIMFusedOptimizer(blocks.param_groups(1e-2), lr=1e-2)
    method = Method(blocks, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    losses = [method.step([inputs[0], None, inputs[2]], labels).item() for _ in range(20)]  # type: ignore[list-item]
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    still = {name for name in before if name.startswith(("encoders.b.", "absent.0", "absent.2"))}
    assert moved == set(before) - still


def test_networks_for_data_sets() -> None:
    data = coloured_digits(0)
    model = network_for(data)
    assert {type(block[-1]) for blocks in model.blocks().values() for block in blocks} == {nn.ReLU}  # type: ignore[index]
    assert model(*(x[:3] for x in data.train.inputs)).shape == (3, 10)
    assert len(network_for(data, {"grey": "resnet18", "colour": "mlp"}, "film", 128).blocks()["grey"]) == 5
    torch.manual_seed(1)
    first = network_for(data)
    torch.manual_seed(1)
    second = [*mlp_blocks(64), *mlp_blocks(192), nn.Linear(128, 10)]
    expected = [p for module in second for p in module.parameters()]
    assert all(
        map(torch.equal, first.parameters(), expected)
    )  # encoder by encoder, then the head: the demo hangs on it
    many = Split(tuple(torch.randn(4, 5) for _ in range(6)), torch.tensor([0, 1, 2, 0]))
    six = MultimodalData("made", tuple("uvwxyz"), 3, many, many, many)
    for fusion in FUSIONS:
        assert network_for(six, fusion=fusion)(*many.inputs).shape == (4, 3)
