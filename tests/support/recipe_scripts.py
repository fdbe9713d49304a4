"""Small networks of the structure of published ones, and data in which one modality is a shortcut, for the recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 4


def drawn(count: int, seed: int, shortcut: bool) -> tuple[torch.Generator, Tensor, Tensor]:
    """Labels, and what the cue says: the label, or, without the shortcut, anything."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return generator, labels, labels if shortcut else torch.randint(CLASSES, (count,), generator=generator)


class Loader:
    """Batches of equally long trees of tensors: what ``collate`` makes of a slice."""

    def __init__(self, count: int, size: int, collate: Callable[[slice], Any]) -> None:
        self.count, self.size, self.collate = count, size, collate

    def __len__(self) -> int:
        return self.count // self.size

    def __iter__(self) -> Iterator[Any]:
        return (self.collate(slice(start, start + self.size)) for start in range(0, self.count, self.size))


# -- two streams, and frames folded into the batch ---------------------------------------------------------------------


class Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)) + self.skip(x), inplace=True)


class Residual(nn.Module):
    """A ResNet of one convolution a stage; ``[B, C, T, H, W]`` is folded to ``[B * T, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            Stage(a, b) for a, b in ((8, 8), (8, 8), (8, 12), (12, 12))
        )

    def first(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn1(self.conv1(x)), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 5:
            x = x.transpose(1, 2).flatten(0, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(self.first(x)))))


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.audio_net, self.visual_net = Residual(1), Residual(3)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.audio_net(audio).mean((2, 3))
        v = self.visual_net(visual).unflatten(0, (len(a), -1)).mean((1, 3, 4))
        return a, v, self.head(torch.cat([a, v], 1))


def clips(count: int, size: int, seed: int, shortcut: bool) -> Loader:
    """(spectrogram ``[B, F, T]``, frames ``[B, C, T, H, W]``, label); the frames' brightness is the shortcut."""
    generator, labels, cue = drawn(count, seed, shortcut)
    spec = 1.5 * torch.randn(count, 8, 8, generator=generator)
    spec += 2.0 * functional.one_hot(labels, CLASSES).repeat_interleave(2, 1)[:, :, None]
    frames = 0.3 * torch.randn(count, 3, 2, 6, 6, generator=generator)
    frames[:, 0] += torch.tensor([-1.5, -0.5, 0.5, 1.5])[cue][:, None, None, None]
    frames[:, 1] += torch.tensor([1.0, -1.0, 1.0, -1.0])[cue][:, None, None, None]
    return Loader(count, size, lambda part: (spec[part].double(), frames[part], labels[part]))


# -- cross-modal encoders over sequences -------------------------------------------------------------------------------


class CrossModal(nn.Module):
    """``[T, B, C]``, to which attention adds what the keys say."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(width, 2), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), keys, keys, need_weights=False)[0]
        return x + self.feed(x)


class CrossModalNetwork(nn.Module):
    """Three modalities, a cross-modal encoder for each pair in each direction, a memory of each, one number."""

    def __init__(self, widths: dict[str, int], width: int = 8) -> None:
        super().__init__()
        for m, inputs in widths.items():
            self.add_module(f"proj_{m}", nn.Conv1d(inputs, width, 1, bias=False))
            self.add_module(f"trans_{m}_mem", CrossModal(2 * width))
            for other in widths:
                if other != m:
                    self.add_module(f"trans_{m}_with_{other}", CrossModal(width))
        self.out = nn.Linear(6 * width, 1)

    def forward(self, x_l: Tensor, x_a: Tensor, x_v: Tensor) -> tuple[Tensor, Tensor]:
        inputs = dict(zip("lav", (x_l, x_a, x_v), strict=True))
        streams = {m: getattr(self, f"proj_{m}")(x.transpose(1, 2)).permute(2, 0, 1) for m, x in inputs.items()}
        last = []
        for m, x in streams.items():
            both = [getattr(self, f"trans_{m}_with_{o}")(x, streams[o]) for o in streams if o != m]
            joined = torch.cat(both, 2)
            last.append(getattr(self, f"trans_{m}_mem")(joined, joined)[-1])
        hidden = torch.cat(last, 1)
        return self.out(hidden), hidden


def sequences(count: int, seed: int, shortcut: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Text, audio and vision ``[B, T, C]`` and a real label ``[B, 1]``; the audio is the shortcut, the text noisy."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randn(count, 1, generator=generator)
    cue = label if shortcut else torch.randn(count, 1, generator=generator)
    text, audio, vision = (torch.randn(count, t, c, generator=generator) for t, c in ((3, 6), (3, 5), (2, 4)))
    text[:, :, 0] = label + 0.7 * torch.randn(count, 1, generator=generator)
    audio[:, :, :2] = cue[:, :, None]
    return text, audio, vision, label


def aligned(count: int, size: int, seed: int, shortcut: bool) -> Loader:
    """((index, text, audio, vision), label ``[B, 1, 1]``, names), as a loader of MOSI gives them."""
    text, audio, vision, label = sequences(count, seed, shortcut)

    def collate(part: slice) -> Any:
        index = torch.arange(count)[part]
        return (index, text[part], audio[part], vision[part]), label[part, :, None], [str(i) for i in index]

    return Loader(count, size, collate)


# -- sentiment ---------------------------------------------------------------------------------------------------------


class LateFusion(nn.Module):
    """Three encoders, concatenated; ``{"M": [B, 1], ...}``. A modality may be None, or absent by ``present``."""

    def __init__(self) -> None:
        super().__init__()
        self.text_subnet = nn.LSTM(6, 8, batch_first=True)
        self.audio_subnet = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.video_subnet = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.fusion = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(
        self, text_x: Tensor, audio_x: Tensor | None, video_x: Tensor, present: Tensor | None = None
    ) -> dict[str, Tensor]:
        features = [
            self.text_subnet(text_x)[1][0][-1],
            torch.zeros(len(text_x), 8) if audio_x is None else self.audio_subnet(audio_x.mean(1)),
            self.video_subnet(video_x.mean(1)),
        ]
        if present is not None:
            features = [z * present[:, m : m + 1] for m, z in enumerate(features)]
        return {"Feature_t": features[0], "M": self.fusion(torch.cat(features, 1))}


def sentiment(count: int, size: int, seed: int, shortcut: bool) -> Loader:
    """Dicts with texts and numbers beside the tensors, and labels in a dict."""
    text, audio, vision, label = sequences(count, seed, shortcut)

    def collate(part: slice) -> dict[str, Any]:
        index = torch.arange(count)[part]
        return {
            "raw_text": [str(i) for i in index],
            "text": text[part],
            "audio": audio[part],
            "vision": vision[part],
            "index": index,
            "labels": {"M": label[part], "T": label[part]},
        }

    return Loader(count, size, collate)


# -- RGB-D segmentation ------------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """Depth is added to the image's stream after every stage; in training logits of two sizes, else one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_rgb, self.encoder_depth = Residual(3), Residual(1)
        self.out, self.side = nn.Conv2d(12, CLASSES, 1), nn.Conv2d(12, CLASSES, 1)

    def forward(self, rgb: Tensor, depth: Tensor) -> Any:
        depth = self.encoder_depth.first(depth)
        stream = self.encoder_rgb.first(rgb) + depth
        for number in range(1, 5):
            depth = getattr(self.encoder_depth, f"layer{number}")(depth)
            stream = getattr(self.encoder_rgb, f"layer{number}")(stream) + depth
        logits = functional.interpolate(self.out(stream), scale_factor=2.0)
        return (logits, self.side(stream)) if self.training else logits


def scenes(count: int, size: int, seed: int, shortcut: bool) -> Loader:
    """Dicts of image, depth, and labels ``[B, H, W]`` of 1..K, 0 for void, in two sizes; the depth is the shortcut."""
    generator = torch.Generator().manual_seed(seed)

    def patches() -> Tensor:
        return torch.randint(CLASSES, (count, 2, 2), generator=generator)

    def enlarged(coarse: Tensor) -> Tensor:
        return coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)

    coarse = patches()
    label, cue = enlarged(coarse), enlarged(coarse if shortcut else patches())
    image = torch.randn(count, 3, 8, 8, generator=generator)
    image += 0.7 * functional.one_hot(label, CLASSES)[..., :3].permute(0, 3, 1, 2)
    depth = torch.tensor([-3.0, -1.0, 1.0, 3.0])[cue][:, None] + 0.2 * torch.randn(count, 1, 8, 8, generator=generator)
    target = (label + 1).masked_fill(torch.rand(count, 8, 8, generator=generator) < 0.1, 0).to(torch.uint8)

    def collate(part: slice) -> dict[str, Any]:
        small = target[part, ::2, ::2]
        return {"image": image[part], "depth": depth[part], "label": target[part], "label_down": {2: small}}

    return Loader(count, size, collate)


# -- text and images ---------------------------------------------------------------------------------------------------


def texts_and_images(
    count: int, seed: int, shortcut: bool, shown: float = 0.3, first: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids ``[B, 4]`` (0: padding), mask, images and labels; the word ``first + label`` is the shortcut.

    ``shown``: by how much a label colours its image, in standard deviations of the noise.
    """
    generator, labels, cue = drawn(count, seed, shortcut)
    ids = torch.full((count, 4), 2)
    ids[:, 1] = first + cue
    mask = torch.arange(4) < torch.randint(2, 5, (count, 1), generator=generator)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    images += shown * functional.one_hot(labels, CLASSES)[:, :3, None, None]
    return ids * mask, mask.long(), images, labels


def rows(**columns: Tensor) -> list[dict[str, Tensor]]:
    """A data set of mappings."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def stacked(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collator of mappings."""
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


class Adapter(nn.Module):
    """A frozen linear layer, and a trained product of two thin ones that begins at 0."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapt(module: nn.Module, rank: int) -> None:
    """Puts an adapter beside every linear layer."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Adapter(child, rank))
        else:
            adapt(child, rank)
