"""Small sounds, frames and videos that tests write, and the names of the clips that a loader finds."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
from PIL import Image

from aim_kernels.experiments.data import Clips


def sine(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def write_wav(path: Path, samples: np.ndarray, rate: int = 4000, width: int = 2) -> None:
    """PCM of ``width`` bytes; ``samples`` [n] or [n, channels] in [-1, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scaled = np.round(samples * (2 ** (8 * width - 1) - 1))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        data = (scaled + 128).astype(np.uint8) if width == 1 else scaled.astype(f"<i{width}")
        file.writeframes(data.tobytes())


def write_frames(folder: Path, levels: list[int], mode: str = "RGB", end: str = ".jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, level in enumerate(levels):
        colour = (level, 255 - level, 0) if mode == "RGB" else level
        Image.new(mode, (24, 20), colour).save(folder / f"{number:05d}{end}")


def write_video(path: Path, levels: list[int], sound: np.ndarray | None = None, rate: int = 8000) -> None:
    """Flat grey frames, and mono sound."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=rate) if sound is not None else None
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None and sound is not None:
            piece = av.AudioFrame.from_ndarray(np.round(sound * 32767).astype(np.int16)[None], "s16", "mono")
            piece.sample_rate = rate
            container.mux(audio.encode(piece))
            container.mux(audio.encode(None))


def names(clips: Clips) -> list[str]:
    return [clip.name for clip in clips.clips]
