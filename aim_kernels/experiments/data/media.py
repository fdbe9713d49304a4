"""From files to tensors: sound to log spectrograms, videos and folders of frames to ``[C, T, H, W]``.

Frames need Pillow, ``.wav`` files scipy, all other files PyAV; each is imported when it is first needed.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aim_kernels._extras import require
from aim_kernels.experiments.data.lists import entries

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
VIDEOS = (".mp4", ".avi", ".flv", ".mkv", ".webm", ".mov")
#: Mean and standard deviation of ImageNet's channels, for values in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class BrokenFileError(ValueError):
    """A file is there, but what was wanted of it cannot be read; the message begins with its path."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes :class:`BrokenFileError` of whatever a decoder raises over the content of ``path``.

    What is not the content's fault stays as it is: a missing file or package, no permission, no memory, a disk's error.
    """
    try:
        yield
    except (BrokenFileError, ImportError, MemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # decoders raise nearly everything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BrokenFileError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def waveform(path: Path, rate: int) -> Tensor:
    """The sound of a ``.wav`` file or of a video: float32 ``[n]`` in [-1, 1], mono, at ``rate`` samples a second.

    Raises MissingPackageError without scipy (``.wav``) or PyAV (other files), BrokenFileError for a file without sound,
    one that cannot be decoded and a ``.wav`` file that ends before its header says so.
    """
    wav = path.suffix.lower() == ".wav"
    require("scipy" if wav else "av", "reading sound" if wav else "reading the sound of videos")
    with naming(path):
        samples = _wav(path, rate) if wav else _sound_of_video(path, rate)
        if not torch.isfinite(samples).all():
            raise BrokenFileError(f"{path} has sound that is not finite")
    return samples


def _wav(path: Path, rate: int) -> Tensor:
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    if path.stat().st_size == 0:
        raise BrokenFileError(f"{path} is empty")
    with warnings.catch_warnings():
        # chunks that are no sound (tags) may be skipped; sound that is cut off may not
        warnings.simplefilter("ignore", wavfile.WavFileWarning)
        warnings.filterwarnings("error", "Reached EOF prematurely", wavfile.WavFileWarning)
        own, samples = wavfile.read(_with_sizes(path))
    if samples.size == 0:
        raise BrokenFileError(f"{path} has no sound")
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float64) - 128.0) / 128.0
    elif np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    samples = samples.reshape(len(samples), -1).mean(1)
    if own != rate:
        common = math.gcd(own, rate)
        samples = resample_poly(samples, rate // common, own // common)
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


#: From here on the sizes in a header say that whoever wrote it did not know them.
_UNKNOWN_SIZE = 0x7FFFFF00


def _with_sizes(path: Path) -> Path | io.BytesIO:
    """A ``.wav`` file with the sizes in its header; one that was written to a pipe has none."""
    with path.open("rb") as file:
        head = file.read(12)
    size = int.from_bytes(head[4:8], "little")
    if head[:4] != b"RIFF" or 0 < size < _UNKNOWN_SIZE:
        return path
    content = bytearray(path.read_bytes())
    content[4:8] = (len(content) - 8).to_bytes(4, "little")
    at = 12
    while at + 8 <= len(content):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        if content[at : at + 4] == b"data":
            if size == 0 or size >= _UNKNOWN_SIZE:
                content[at + 4 : at + 8] = (len(content) - at - 8).to_bytes(4, "little")
            break
        at += 8 + size + size % 2
    return io.BytesIO(bytes(content))


def _sound_of_video(path: Path, rate: int) -> Tensor:
    import av

    with av.open(str(path)) as container:
        pieces = []
        if container.streams.audio:
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            for frame in container.decode(audio=0):
                pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
            pieces += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
    if not pieces:
        raise BrokenFileError(f"{path} has no sound; leave it out of the list, or ask for other modalities")
    return torch.from_numpy(np.concatenate(pieces))


@dataclass(frozen=True)
class LogSpectrogram:
    """``log(|STFT(x)| + 1e-7)`` of a file's sound: ``[1, n_fft / 2 + 1, 1 + floor(seconds * rate / hop)]``.

    The sound is repeated until it fills ``seconds``, cut there and clipped to [-1, 1]; Hann window, zeros beyond the
    ends. Source: the published code of OGM-GE (343dc1d) has these values for CREMA-D; it repeats three times at most,
    we as often as it takes.
    """

    rate: int = 22050
    seconds: float = 3.0
    n_fft: int = 512
    hop: int = 353

    def __call__(self, path: Path) -> Tensor:
        x = waveform(path, self.rate)
        wanted = round(self.seconds * self.rate)
        x = x.repeat(-(-wanted // len(x)))[:wanted].clamp(-1.0, 1.0)
        window = torch.hann_window(self.n_fft)
        spectrum = torch.stft(x, self.n_fft, self.hop, window=window, pad_mode="constant", return_complex=True)
        return (spectrum.abs() + 1e-7).log().unsqueeze(0)


def spaced(available: int, count: int) -> list[int]:
    """``count`` of ``available`` frames: those in the middle of as many equal parts, some twice where there are too
    few."""
    return [min(available - 1, int((i + 0.5) * available / count)) for i in range(count)]


def pictures(path: Path, count: int) -> list[Any]:
    """``count`` evenly spaced Pillow images of a folder of frames (``2.jpg`` before ``10.jpg``) or of a video, or
    ``count`` times one image. Modes are ``RGB`` and ``L``, see :func:`plain`.

    Raises MissingPackageError without Pillow or, for videos, PyAV; BrokenFileError, which names the frame, for what
    cannot be decoded, and where there is no frame.
    """
    require("PIL", "reading frames")
    if not path.is_dir() and path.suffix.lower() not in IMAGES:
        require("av", "reading videos")
        with naming(path):
            return list(_video(path, count))
    from PIL import Image

    files = [file for file in entries(path) if file.suffix.lower() in IMAGES] if path.is_dir() else [path]
    if not files:
        raise BrokenFileError(f"{path} has no frames ({', '.join(IMAGES)})")
    found = []
    for number in spaced(len(files), count):
        with naming(files[number]), Image.open(files[number]) as image:
            found.append(plain(image))
    return found


def plain(image: Any) -> Any:
    """A Pillow image of 8 bits a channel, ``L`` (grey) or ``RGB``, decoded.

    16 bits become 8 by the PNG standard's scale, ``round(value / 257)``; palettes are looked up; alpha is dropped, not
    blended. Raises ValueError for grey values that are neither 8 nor 16 bits.
    """
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"pixels of the mode {image.mode!r} from {values.min()} to {values.max()}, neither 8 nor 16 bits"
            )
        return Image.fromarray(np.round(values / 257.0).astype(np.uint8))
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")  # by way of alpha: Pillow warns of transparent entries otherwise
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def _video(path: Path, count: int) -> Iterator[Any]:
    """Two passes, one frame in memory: the number of frames in a header is often missing or wrong."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise BrokenFileError(f"{path} has no picture")
        container.streams.video[0].thread_type = "AUTO"
        available = sum(1 for _ in container.decode(video=0))
    if not available:
        raise BrokenFileError(f"{path} has no frames")
    wanted = spaced(available, count)
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            to_image: Callable[[], Any] = frame.to_image
            for _ in range(wanted.count(number)):
                yield to_image()


@dataclass(frozen=True)
class Frames:
    """``count`` evenly spaced frames as ``[3, count, size, size]``, normalized with ImageNet's statistics.

    Frames are resized to a square as they are, as the published code of OGM-GE (343dc1d) does for testing. ``augment``:
    for training, a random part instead (8 to 100 % of the area, sides 3:4 to 4:3, flipped half of the time) from
    torch's default generator, the same part of all frames (ours; there each frame has its own).
    """

    count: int = 3
    size: int = 224
    augment: bool = False

    def __call__(self, path: Path) -> Tensor:
        part = random_part() if self.augment else None
        stacked = torch.stack(
            [square(image.convert("RGB"), self.size, part) for image in pictures(path, self.count)], 1
        )
        mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in IMAGENET)
        return (stacked - mean) / std


@dataclass(frozen=True)
class Picture:
    """One image as ``[3, size, size]``; options and statistics as for :class:`Frames`. Of a folder or a video the frame
    in the middle."""

    size: int = 224
    augment: bool = False

    def __call__(self, path: Path) -> Tensor:
        return Frames(1, self.size, self.augment)(path)[:, 0]


@dataclass(frozen=True)
class Flow:
    """Optical flow from two folders of grey frames, horizontal and vertical: ``[2, count, size, size]`` in [-1, 1].

    Called with a path in which ``{}`` stands for ``u`` and ``v``. Options as for :class:`Frames`, but never flipped: a
    mirrored horizontal flow would have to change its sign.
    """

    count: int = 3
    size: int = 224
    augment: bool = False

    def __call__(self, path: Path) -> Tensor:
        part = random_part() if self.augment else None
        if part is not None:
            part = (*part[:4], False)
        channels = []
        for axis in ("u", "v"):
            images = pictures(Path(str(path).replace("{}", axis)), self.count)
            channels.append(torch.stack([square(image.convert("L"), self.size, part)[0] for image in images]))
        return 2.0 * torch.stack(channels) - 1.0


Part = tuple[float, float, float, float, bool]


def random_part() -> Part:
    """Left, upper, right, lower as shares of the image, and whether to flip."""
    area, ratio, x, y, flip = torch.rand(5).tolist()
    area = 0.08 + 0.92 * area
    ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
    width, height = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
    left, upper = x * (1 - width), y * (1 - height)
    return left, upper, left + width, upper + height, flip < 0.5


def square(image: Any, size: int, part: Part | None) -> Tensor:
    """``[C, size, size]`` in [0, 1], bilinear."""
    from PIL import Image

    box = None
    if part is not None:
        width, height = image.size
        box = (part[0] * width, part[1] * height, part[2] * width, part[3] * height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box), dtype=np.float32) / 255.0
    tensor = torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1)
    return tensor.flip(2) if part is not None and part[4] else tensor.contiguous()


#: What a sample of one modality is made of: a file or folder, a text, or a row of a table in memory.
Source = Path | str | int
#: What makes a tensor of it. Readers of files take a Path only, so the argument has no common type.
Reader = Callable[[Any], Tensor]
