"""Inputs of every form: trees, keywords, ragged and packed ones, loaders, samples with NaN, outputs of every layout."""

from __future__ import annotations

import math
import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from aim_helpers import CLASSES, batch, build
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from aim_kernels.aim import AIM, Prototypes, block_param_groups
from aim_kernels.aim import samples as samples_module
from aim_kernels.aim.inputs import Inputs, Layout, take
from aim_kernels.aim.samples import read_held_out, read_samples
from aim_kernels.optim.optimizer import AIMFusedOptimizer

B = 12
TWO = Layout.of(("a", "b"), None)


def same(found: Any, expected: Any) -> bool:
    """Whether two trees hold the same tensors."""
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, (list, tuple)) and not isinstance(expected, PackedSequence):
        return len(found) == len(expected) and all(map(same, found, expected))
    return torch.equal(found, expected) if isinstance(expected, Tensor) else bool(found == expected)


# -- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [slice(2, 7), slice(1, None, 3), torch.tensor([5, 0, 5, 11])])
def test_samples_are_cut_out_of_every_tree(index: Any) -> None:
    x = torch.randn(B, 3)
    numbers = list(range(B))[index] if isinstance(index, slice) else index.tolist()
    rows = x[numbers]
    assert same(take(x, index, B), rows)
    assert same(take((x, {"mask": x > 0}), index, B), (rows, {"mask": rows > 0}))
    assert same(take(UserDict({"ids": x}), index, B), {"ids": rows})
    assert same(take([str(n) for n in range(B)], index, B), [str(n) for n in numbers])
    ragged = [torch.randn(n % 4 + 1) for n in range(B)]
    assert same(take(ragged, index, B), [ragged[n] for n in numbers])
    packed = take(pack_sequence([torch.randn(n + 1, 2) for n in range(B)], enforce_sorted=False), index, B)
    lengths = torch.nn.utils.rnn.pad_packed_sequence(packed)[1]
    assert lengths.tolist() == [n + 1 for n in numbers]
    nested = torch.nested.nested_tensor(ragged, layout=torch.jagged)
    assert same(list(take(nested, index, B).unbind()), [ragged[n] for n in numbers])
    assert (
        take(torch.tensor(3.0), index, B) == 3.0 and take(None, index, B) is None and take("text", index, B) == "text"
    )
    assert same(take(torch.ones(1, 5), index, B), torch.ones(1, 5))  # one row for all
    assert same(take(x.to_sparse(), index, B).to_dense(), rows)


def test_packed_sequences_keep_their_values() -> None:
    sequences = [torch.randn(n % 5 + 1, 2) for n in range(B)]
    packed = take(pack_sequence(sequences, enforce_sorted=False), torch.tensor([4, 1]), B)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    assert torch.equal(padded[0, : lengths[0]], sequences[4]) and torch.equal(padded[1, : lengths[1]], sequences[1])


def test_a_tensor_of_another_number_of_samples_is_refused() -> None:
    x, y = torch.randn(B, 3), torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ValueError, match="input of 'b' has 5 samples, labels have 12; the first dimension of all"):
        read_samples("", TWO, [x, {"x": x, "mask": torch.ones(5, B)}], y)
    with pytest.raises(ValueError, match="labels have tensors of 12 and of 3 samples"):
        read_samples("", TWO, [x, x], {"boxes": y, "areas": torch.zeros(3)})


# -- forms of inputs and labels ---------------------------------------------------------------------------------------


class Keywords(nn.Module):
    """A model in the manner of those that take keywords: text with a mask, and an image; nothing positional."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.image = nn.Linear(5, 6)
        self.head = nn.Linear(12, CLASSES)

    def forward(
        self, *, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, scale: float = 1.0
    ) -> dict[str, Tensor]:
        mask = attention_mask[..., None].to(torch.float32)
        text = (self.embed(input_ids) * mask).sum(1) / mask.sum(1)
        return {"logits": scale * self.head(torch.cat([text, self.image(pixel_values)], 1))}


ARGUMENTS = {"text": ("input_ids", "attention_mask"), "image": "pixel_values"}


def keywords(count: int, seed: int) -> tuple[dict[str, Any], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    ids = torch.randint(20, (count, 4), generator=generator)
    ids[:, 0] = labels
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(count, 4, dtype=torch.int64),
        "pixel_values": torch.randn(count, 5, generator=generator),
        "scale": 2.0,
    }, labels


def loss_of(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"], labels)


def keyword_aim(**options: Any) -> tuple[Keywords, AIM]:
    torch.manual_seed(0)
    model = Keywords()
    optimizer = AIMFusedOptimizer(block_param_groups(model, {"text": [model.embed], "image": [model.image]}), lr=1e-2)
    return model, AIM(model, optimizer, loss=loss_of, arguments=ARGUMENTS, **options)


@pytest.mark.parametrize("form", ["pair", "batch", "loader"])
def test_keywords_in_every_form_decide_alike(form: str) -> None:
    model, aim = keyword_aim()
    train, held_out = keywords(48, 0), keywords(48, 1)
    seen: list[Any] = []

    def step(inputs: dict[str, Any], labels: Tensor) -> None:
        assert set(inputs) == {*train[0]}
        seen.append(labels)
        aim.optimizer.zero_grad()
        loss_of(model(**inputs), labels).backward()
        aim.optimizer.step()

    for _ in range(30):
        step(*train)

    def given(samples: tuple[dict[str, Any], Tensor]) -> Any:
        inputs, labels = samples
        whole = {**inputs, "labels": labels}
        if form == "loader":  # batches as a collator of mappings makes them
            tensors = {name: x for name, x in whole.items() if isinstance(x, Tensor)}
            return iter([{**{n: x[s : s + 16] for n, x in tensors.items()}, "scale": 2.0} for s in range(0, 48, 16)])
        return whole

    if form == "pair":
        table = aim.update(*train, held_out=held_out, train=step)
    else:
        table = aim.update(given(train), held_out=given(held_out), train=step)
    plain, other = keyword_aim()
    plain.load_state_dict(model.state_dict())
    expected = other.update(*train, held_out=held_out)
    assert table.scores == expected.scores and table.held_out_scores == expected.held_out_scores
    assert table.scores["text"][0] > 0.1  # the label stands in the first token


def test_positions_of_a_model_that_takes_several_tensors_per_modality() -> None:
    model, aim = keyword_aim()
    outer = nn.Module()
    outer.module = model  # as a wrapper would
    outer.forward = lambda ids, mask, pixels: model(input_ids=ids, attention_mask=mask, pixel_values=pixels, scale=2.0)
    arguments = {"text": (0, 1), "image": 2}
    positions = AIM(outer, aim.optimizer, loss=loss_of, arguments=arguments)
    train, held_out = keywords(24, 0), keywords(24, 1)

    def tuple_of(inputs: dict[str, Any]) -> tuple[Any, ...]:
        return inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]

    found = positions.update(tuple_of(train[0]), train[1], held_out=(tuple_of(held_out[0]), held_out[1]))
    assert found.scores == aim.update(*train, held_out=held_out).scores


def test_keywords_with_the_names_of_the_modalities() -> None:
    model, optimizer = build()
    outer = nn.Module()
    outer.module = model  # as a wrapper would
    outer.forward = lambda *, a, b: model(a, b)
    (a, b), labels = batch()
    outside = batch(seed=1)
    expected = AIM(model, optimizer, CLASSES).update([a, b], labels, held_out=outside)
    found = AIM(outer, optimizer, CLASSES).update(
        {"b": b, "a": a}, labels, held_out=({"a": outside[0][0], "b": outside[0][1]}, outside[1])
    )
    assert found.scores == expected.scores


@pytest.mark.parametrize(
    ("arguments", "inputs", "message"),
    [
        ({"a": "x"}, None, "arguments is given for"),
        ({"a": "x", "b": "x"}, None, "arguments gives x to more than one modality"),
        ({"a": (), "b": "x"}, None, "give the names of the model's keywords"),
        ({"a": 1.5, "b": "x"}, None, "give the names of the model's keywords|not iterable"),
        ({"a": "x", "b": "y"}, {"z": 1}, "none of the arguments that belong to a modality"),
        (None, {"a": torch.ones(3), "c": torch.ones(3)}, "inputs have c, the modalities are a, b"),
        (None, {"a": torch.ones(3)}, "inputs have no b; give None for a modality that is missing"),
        (None, [torch.ones(3)], "inputs must be 2 tensors, one a modality in the order a, b; got 1"),
    ],
)
def test_arguments_that_do_not_fit(arguments: Any, inputs: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        read_samples("", Layout.of(("a", "b"), arguments), inputs)


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y.tolist(),
        lambda y: y.numpy(),
        lambda y: {"class": y, "area": y.float()},
        lambda y: (y, {"area": y.float()}),
    ],
)
def test_labels_of_every_kind(make: Callable[[Tensor], Any]) -> None:
    model, optimizer = build()

    def loss(outputs: Tensor, labels: Any) -> Tensor:
        if isinstance(labels, dict):
            labels = labels["class"]
        elif isinstance(labels, tuple):
            labels = labels[0]
        return nn.functional.cross_entropy(outputs, labels)

    train, outside = batch(), batch(seed=1)
    aim = AIM(model, optimizer, loss=loss)
    found = aim.update(train[0], make(train[1]), held_out=(outside[0], make(outside[1])))
    expected = AIM(model, optimizer).update(*train, held_out=outside)
    assert found.scores == expected.scores


def test_a_loader_and_its_batch() -> None:
    model, optimizer = build()
    train, outside = batch(), batch(seed=1)
    loader = DataLoader(TensorDataset(*train[0], train[1]), batch_size=7)
    state = torch.get_rng_state()
    shuffled = DataLoader(TensorDataset(*outside[0], outside[1]), batch_size=7, shuffle=True)
    found = AIM(model, optimizer).update(loader, held_out=shuffled)
    assert torch.equal(torch.get_rng_state(), state)
    expected = AIM(model, optimizer).update([*train[0], train[1]], held_out=[*outside[0], outside[1]])
    assert found.scores == expected.scores
    # the held-out samples came in another order: means over all of them are the same, pieces are not
    assert found.held_out_scores is not None and expected.held_out_scores is not None
    for m in "ab":
        assert found.held_out_scores[m][0] == pytest.approx(expected.held_out_scores[m][0], abs=0.5)


def test_a_loader_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "FROM_LOADER", 20)
    drawn = []

    def loader() -> Any:
        while True:
            drawn.append(1)
            yield [torch.randn(8, 2), torch.randn(8, 2)], torch.zeros(8, dtype=torch.int64)

    assert read_samples("", TWO, loader()).size == 24 and len(drawn) == 3
    with pytest.raises(ValueError, match="the loader is empty"):
        read_samples("", TWO, iter(()))
    with pytest.raises(ValueError, match="cannot be joined; pad them to one length"):
        read_samples("", TWO, iter([[torch.ones(2, n), torch.ones(2, 1), torch.ones(2)] for n in (3, 4)]))
    with pytest.raises(ValueError, match="the loader yields a int"):
        read_samples("", TWO, iter([3]))


def test_present_reaches_the_model_and_goes_with_its_modality() -> None:
    class Present(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, CLASSES), nn.Linear(CLASSES, CLASSES)

        def forward(self, a: Tensor, b: Tensor, present: Tensor) -> Tensor:
            seen.append(present)
            return self.a(a) * present[:, :1] + self.b(b) * present[:, 1:]

    seen: list[Tensor] = []
    model = Present()
    aim = AIM(
        model, AIMFusedOptimizer(block_param_groups(model, {"a": [model.a], "b": [model.b]}), lr=1e-2), batch_size=64
    )
    (a, b), labels = batch(count=24)
    present = torch.arange(24)[:, None] % torch.tensor([2, 3]) != 0
    b = b.masked_fill(~present[:, 1:], math.nan)
    outside = batch(count=24, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what stands for an absent input may be NaN
        samples = read_samples("", aim.layout, [a, b], labels, present)
    assert samples.size == 24
    aim.update([a, b.nan_to_num()], labels, held_out=(*outside, torch.ones(24, 2, dtype=torch.bool)), present=present)
    assert all(len(x) == 24 for x in seen)
    orders = {tuple(x[:, m].tolist()) for x in seen for m in range(2) if not bool(x.all())}
    assert len(orders) == 4  # both columns as given, and each exchanged with its own modality's input


def test_samples_with_nan_are_counted_named_and_left_out() -> None:
    model, optimizer = build()
    train, outside = batch(), batch(seed=1)
    clean = AIM(model, optimizer).update(
        [x[torch.arange(24) != 5] for x in train[0]], train[1][torch.arange(24) != 5], held_out=outside
    )
    train[0][1][5, 0] = math.nan
    with pytest.warns(UserWarning, match=r"1 of 24 samples have NaN in the input of 'b' \(the first is number 5\)"):
        found = AIM(model, optimizer).update(*train, held_out=outside)
    assert found.scores == clean.scores and found.kappa == clean.kappa
    with pytest.raises(ValueError, match="all held-out samples have NaN"), pytest.warns(UserWarning, match="held-out"):
        read_held_out(TWO, ([torch.full((3, 2), math.nan), torch.ones(3, 2)], torch.zeros(3)))


def test_numpy_inputs() -> None:
    found = read_samples("", TWO, [np.ones((3, 2), dtype=np.float32), torch.ones(3, 2)], np.arange(3))
    assert isinstance(found.inputs[0], Tensor) and found.labels.tolist() == [0, 1, 2]


def test_inputs_is_read_only_once() -> None:
    inputs = TWO.read("", [torch.ones(3), None])
    assert TWO.read("", inputs) is inputs and isinstance(inputs, Inputs) and list(inputs)[1] is None


# -- outputs of blocks ------------------------------------------------------------------------------------------------


class Layouts(nn.Module):
    """Modality a returns ``[T, B, C]``, b ``[B * T, C]`` of frames, which the head averages."""

    def __init__(self, frames: int, length: int) -> None:
        super().__init__()
        self.a, self.b = nn.GRU(3, 5), nn.Linear(4, 6)
        self.head, self.frames, self.length = nn.Linear(11, CLASSES), frames, length

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        first = self.a(a.transpose(0, 1))[0].mean(0)
        second = self.b(b.flatten(0, 1)).unflatten(0, (len(b), self.frames)).mean(1)
        return self.head(torch.cat([first, second], 1))


def layouts(frames: int, length: int, count: int, pool: Any) -> tuple[Layouts, AIM, Any]:
    torch.manual_seed(0)
    model = Layouts(frames, length)
    optimizer = AIMFusedOptimizer(block_param_groups(model, {"a": [model.a], "b": [model.b]}), lr=1e-2)
    aim = AIM(model, optimizer, CLASSES, pool=pool, probe=Prototypes(steps=2))
    return model, aim, ([torch.randn(count, length, 3), torch.randn(count, frames, 4)], torch.arange(count) % CLASSES)


@pytest.mark.parametrize("length", [7, 12])
def test_sequence_first_and_frames_are_pooled_by_sample(length: int) -> None:
    pool = {"a": "sequence_first", "b": "frames"}
    model, aim, (inputs, labels) = layouts(4, length, 12, pool)
    with torch.no_grad():
        found = aim.scoring.features(aim.layout.read("", inputs))
        expected = model.a(inputs[0].transpose(0, 1))[0].mean(0), model.b(inputs[1]).mean(1)
    assert torch.allclose(found["a"][0], expected[0], atol=1e-6) and torch.allclose(
        found["b"][0], expected[1], atol=1e-6
    )
    aim.update(inputs, labels)


@pytest.mark.parametrize(
    ("pool", "length", "message"),
    [
        ({"a": "channels_last", "b": "frames"}, 7, r"block \('a', 0\) returns \[7, 3, 5\] for 3 samples"),
        # as many time steps as samples: which is which, only another batch tells (the prototypes are 3)
        ({"a": "channels_last", "b": "frames"}, 3, r"block \('a', 0\) returns \[3, 3, 5\] for 3 samples"),
        ({"a": "channels_first", "b": "frames"}, 3, r"pool='sequence_first' for \[T, B, C\]"),
        ({"a": "sequence_first", "b": "channels_first"}, 7, r"block \('b', 0\) returns \[12, 6\] for 3 samples"),
    ],
)
def test_another_layout_is_refused_with_block_and_shape(pool: Any, length: int, message: str) -> None:
    _, aim, (inputs, labels) = layouts(4, length, 12, pool)
    with pytest.raises(RuntimeError, match=message):
        aim.update(inputs, labels)


def test_an_encoder_that_is_called_twice_counts_with_its_mean() -> None:
    model, optimizer = build()
    forward = model.forward

    def twice(a: Tensor, b: Tensor) -> Tensor:
        model.a(a + 1.0)
        return forward(a, b)

    model.forward = twice
    inputs = TWO.read("", batch()[0])
    aim = AIM(model, optimizer, CLASSES)
    model.eval()
    with torch.no_grad():
        found = aim.scoring.features(inputs)["a"][0]
        assert torch.allclose(found, (model.a[0](inputs[0]) + model.a[0](inputs[0] + 1.0)) / 2, atol=1e-6)


def test_a_transformer_with_a_padding_mask() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.text = nn.TransformerEncoder(layer, 2)
            self.image, self.head = nn.Linear(4, 8), nn.Linear(16, CLASSES)

        def forward(self, text: Tensor, padding: Tensor, image: Tensor) -> Tensor:
            z = self.text(text, src_key_padding_mask=padding)
            keep = (~padding)[..., None].to(z)
            return self.head(torch.cat([(z * keep).sum(1) / keep.sum(1), self.image(image)], 1))

    torch.manual_seed(0)
    model = Text()
    groups = block_param_groups(model, {"text": list(model.text.layers), "image": [model.image]})
    aim = AIM(model, AIMFusedOptimizer(groups, lr=1e-3), arguments={"text": (0, 1), "image": 2})
    padding = torch.arange(6)[None] >= torch.arange(24)[:, None] % 5 + 1
    inputs = torch.randn(24, 6, 8), padding, torch.randn(24, 4)
    enabled = torch.backends.mha.get_fastpath_enabled()
    nested: list[bool] = []
    model.text.layers[0].register_forward_hook(lambda _module, _args, z: nested.append(z.is_nested))
    aim.update(inputs, torch.arange(24) % CLASSES, held_out=(inputs, torch.arange(24) % CLASSES))
    assert nested and not any(nested)
    assert torch.backends.mha.get_fastpath_enabled() == enabled


# -- classes ----------------------------------------------------------------------------------------------------------


def test_the_number_of_classes_is_asked_for_where_it_is_read() -> None:
    model, optimizer = build()
    AIM(model, optimizer).update(*batch(), held_out=batch(seed=1))  # reliance reads none
    with pytest.raises(ValueError, match="rule='gap' with probe='prototypes' scores classes; give num_classes"):
        AIM(model, optimizer, rule="gap")
    with pytest.raises(ValueError, match="probe='prototypes' scores classes; give AIM num_classes="):
        AIM(model, optimizer).update(*batch())  # without held-out samples it is the ratio's
    AIM(model, optimizer, rule="ratio", probe="gradient-norm").update(batch()[0])


@pytest.mark.parametrize("size", [512, 2, 1])
def test_prototypes_run_in_pieces(size: int) -> None:
    model, optimizer = build()
    model.eval()
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    aim = AIM(model, optimizer, CLASSES, probe=Prototypes(steps=3), batch_size=size)
    table = aim.update(*batch())
    handle.remove()
    assert max(calls) == min(size, 24)
    plain = AIM(model, optimizer, CLASSES, probe=Prototypes(steps=3)).update(*batch())
    for m, row in plain.scores.items():  # sums in another order; Adam's first steps amplify a sign near zero little
        assert table.scores[m] == pytest.approx(row, rel=1e-4)


# -- what strangers tried ---------------------------------------------------------------------------------------------


class Means(nn.Module):
    """A recurrent network or texts in a, a tensor in b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(4, 5), nn.Linear(10, CLASSES)

    def forward(self, a: Any, b: Tensor) -> Tensor:
        if isinstance(a, PackedSequence):
            z = self.a(a)[1][0]
        else:  # one tensor, text, or number in a box per sample
            rows = [torch.full((1, 3), float(len(x))) if isinstance(x, str) else x for x in a]
            z = torch.stack([self.a(row[None])[1][0, 0] for row in rows])
        return self.head(torch.cat([z, self.b(b)], 1))


def means() -> AIM:
    torch.manual_seed(0)
    model = Means()
    return AIM(model, AIMFusedOptimizer(block_param_groups(model, {"a": [model.a], "b": [model.b]}), lr=1e-2))


@pytest.mark.parametrize("kind", ["packed", "ragged", "texts", "tuple of texts"])
def test_an_update_takes_what_belongs_to_samples(kind: str) -> None:
    aim, y = means(), torch.arange(32) % CLASSES
    pieces = [torch.full((n % 5 + 1, 3), float(y[n])) for n in range(32)]
    texts = ["x" * (int(y[n]) + 1) for n in range(32)]
    of_kind = {"packed": pack_sequence(pieces, enforce_sorted=False), "ragged": pieces, "texts": texts}
    a = of_kind.get(kind, tuple(texts))
    table = aim.update([a, torch.randn(32, 4)], y, held_out=([a, torch.randn(32, 4)], y))
    assert table.scores["a"][0] != 0.0  # exchanged, and not the same for all


@pytest.mark.parametrize("kind", ["packed", "texts", "nested"])
def test_batches_of_a_loader_are_joined_by_samples(kind: str) -> None:
    pieces = [torch.randn(n % 5 + 1, 3) for n in range(12)]

    def loader() -> Any:
        for start in (0, 4, 8):
            part = pieces[start : start + 4]
            a = {
                "packed": lambda part=part: pack_sequence(part, enforce_sorted=False),
                "texts": lambda part=part: [str(len(x)) for x in part],
                "nested": lambda part=part: torch.nested.nested_tensor(part, layout=torch.jagged),
            }[kind]()
            yield [a, torch.randn(4, 2), torch.arange(4)]

    found = read_samples("", TWO, loader()).inputs[0]
    if kind == "packed":
        assert all(map(torch.equal, nn.utils.rnn.unpack_sequence(found), pieces))
    elif kind == "texts":
        assert found == [str(len(x)) for x in pieces]
    else:
        assert all(map(torch.equal, found.unbind(), pieces))


def test_what_nothing_can_be_exchanged_in_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input of 'a' \(str\) has nothing that counts 3 samples"):
        read_samples("", TWO, ["abc", torch.ones(3, 2)], torch.arange(3))


@pytest.mark.parametrize("shape", [(24, 1), (2, 24), (24, 3), (23, 2)])
def test_present_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    x = torch.ones(24, 2)
    with pytest.raises(
        ValueError, match=r"present (must be bool of shape \[B, 2\]|has 23 samples, the inputs have 24)"
    ):
        read_samples("", TWO, [x, x], torch.zeros(24), torch.ones(shape, dtype=torch.bool))


def test_blocks_in_another_order_than_the_model_takes_them() -> None:
    model, _ = build()
    groups = block_param_groups(model, {"b": list(model.b), "a": list(model.a)})
    aim = AIM(model, AIMFusedOptimizer(groups, lr=1e-2))
    (a, b), labels = batch()
    outside = batch(seed=1)
    with pytest.raises(ValueError, match="the model takes a, b, and the blocks are given in the order b, a"):
        aim.update([a, b], labels, held_out=outside)
    aim.update({"a": a, "b": b}, labels, held_out=({"a": outside[0][0], "b": outside[0][1]}, outside[1]))


def test_a_loader_sorted_by_class_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "FROM_LOADER", 8)
    x = torch.ones(12, 2)
    sorted_, shuffled = torch.arange(12) // 4, torch.arange(12) % 3
    with pytest.warns(UserWarning, match="the first 8 samples of the loader are sorted by class and have 2 of them"):
        read_samples("", TWO, iter([[x[:4], x[:4], sorted_[s : s + 4]] for s in (0, 4, 8)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_samples("", TWO, iter([[x[:4], x[:4], shuffled[s : s + 4]] for s in (0, 4, 8)]))


@pytest.mark.parametrize(("reduction", "message"), [("sum", "loss sums over samples"), ("none", "return one number")])
def test_losses_that_are_no_means_are_refused(reduction: str, message: str) -> None:
    model, optimizer = build()
    aim = AIM(model, optimizer, loss=lambda x, y: nn.functional.cross_entropy(x, y, reduction=reduction))
    with pytest.raises(ValueError, match=message):
        aim.update(*batch(), held_out=batch(seed=1))
