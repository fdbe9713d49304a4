"""block_param_groups: every parameter once, blocks by identity, and errors that name what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aim_kernels.aim.blocks import block_param_groups


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.ModuleList(
            [nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4)), nn.Linear(4, 4, bias=False), nn.LayerNorm(4)]
        )
        self.video = nn.ModuleDict({"stem": nn.Linear(3, 4), "top": nn.Linear(4, 4)})
        self.fusion = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(()))


def pair_blocks(model: Pair) -> dict[str, list[nn.Module]]:
    return {"audio": list(model.audio), "video": [model.video["stem"], model.video["top"]]}


def test_weights_biases_and_the_rest() -> None:
    model = Pair()
    groups = block_param_groups(model, pair_blocks(model), weight_decay=0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    summary = [
        (g["modality"], g["depth"], g["module"], g["modulated"], g["weight_decay"], [names[id(p)] for p in g["params"]])
        for g in groups
    ]
    assert summary == [
        ("audio", 0, "audio.0", True, 0.3, ["audio.0.0.weight"]),
        ("audio", 0, "audio.0", False, 0.0, ["audio.0.0.bias", "audio.0.1.weight", "audio.0.1.bias"]),
        ("audio", 1, "audio.1", True, 0.3, ["audio.1.weight"]),
        ("audio", 2, "audio.2", False, 0.0, ["audio.2.weight", "audio.2.bias"]),
        ("video", 0, "video.stem", True, 0.3, ["video.stem.weight"]),
        ("video", 0, "video.stem", False, 0.0, ["video.stem.bias"]),
        ("video", 1, "video.top", True, 0.3, ["video.top.weight"]),
        ("video", 1, "video.top", False, 0.0, ["video.top.bias"]),
        (None, None, None, False, 0.3, ["scale", "fusion.weight", "fusion.bias"]),
    ]


def test_without_decay_the_rule_decides_except_for_biases() -> None:
    model = Pair()
    groups = block_param_groups(model, pair_blocks(model))
    assert [g.get("weight_decay") for g in groups] == [None, 0.0, None, 0.0, None, 0.0, None, 0.0, None]
    assert "weight_decay" not in groups[0]
    assert "weight_decay" not in groups[-1]


def test_no_plain_group_where_blocks_are_everything() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    groups = block_param_groups(model, {"a": [model["a"]], "b": [model["b"]]})
    assert all(g["modality"] is not None for g in groups)


def test_a_sequential_is_a_list_of_blocks() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    groups = block_param_groups(model, {"a": model["a"], "b": [model["b"]]})
    assert [(g["modality"], g["depth"]) for g in groups if g["modulated"]] == [("a", 0), ("a", 1), ("b", 0)]


def test_every_parameter_lies_in_one_group() -> None:
    model = Pair()
    listed = [id(p) for g in block_param_groups(model, pair_blocks(model)) for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_blocks_that_share_a_parameter() -> None:
    model = Pair()
    model.video["top"].weight = model.audio[1].weight
    with pytest.raises(
        ValueError, match=r"'audio\.1\.weight' belongs to blocks\['audio'\]\[1\] and to blocks\['video'\]\[1\]"
    ):
        block_param_groups(model, pair_blocks(model))


def test_a_block_inside_another() -> None:
    model = Pair()
    with pytest.raises(ValueError, match=r"'audio\.0\.0\.weight' belongs to"):
        block_param_groups(model, {"audio": [model.audio[0], model.audio[0][0]]})


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ({}, ValueError, "names no modality"),
        ({"audio": []}, ValueError, r"blocks\['audio'\] is empty"),
        ({"audio": [nn.Linear(2, 2)]}, ValueError, r"blocks\['audio'\]\[0\] \(Linear\) is not a module of the model"),
        ({"audio": ["audio.0"]}, TypeError, r"blocks\['audio'\]\[0\] is a str"),
        ({"audio": nn.Linear(2, 2)}, TypeError, r"blocks\['audio'\] is a Linear; give a list"),
    ],
)
def test_errors(blocks: dict[str, list[nn.Module]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        block_param_groups(Pair(), blocks)


def test_a_block_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match=r"blocks\['audio'\]\[1\] \('1', ReLU\) has no parameters"):
        block_param_groups(model, {"audio": model})
