"""Pictures of every depth, and files that are broken."""

from __future__ import annotations

import errno
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from written_files import sine, write_frames, write_video, write_wav

from aim_kernels.experiments.data import BrokenFileError
from aim_kernels.experiments.data.media import IMAGENET, Flow, Frames, Picture, naming, pictures, plain, waveform

pytestmark = pytest.mark.usefixtures("one_thread")


def write_png16(path: Path, values: np.ndarray) -> None:
    """A PNG of 16 bits a channel, grey ``[H, W]`` or RGB ``[H, W, 3]``: Pillow cannot write the latter."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def pixels(path: Path) -> np.ndarray:
    """The first pixel as 0 to 255, RGB, of what a network would see."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return ((Picture(4)(path) * std + mean) * 255)[:, 0, 0].numpy()


def test_depths_and_modes_give_the_same_colours(tmp_path: Path) -> None:
    colour, grey = np.array([200, 100, 30]), 100
    flat = np.broadcast_to(colour, (6, 6, 3)).astype(np.uint8)
    rgb = Image.fromarray(flat)
    alpha = Image.fromarray(np.dstack([flat, np.full((6, 6), 40, np.uint8)]))
    palette = rgb.quantize(4)
    numbers = np.zeros((6, 6), np.uint8)
    numbers[5] = [0, 1, 1, 1, 2, 2]  # far from the pixel that is looked at
    clear = Image.fromarray(numbers).convert("P")
    clear.putpalette([*colour.tolist(), 1, 2, 3, 4, 5, 6])
    clear.info["transparency"] = bytes([0, 128, 200])  # Pillow warns when it converts such a palette to RGB
    for name, image in {"rgb": rgb, "alpha": alpha, "palette": palette, "clear": clear}.items():
        image.save(tmp_path / f"{name}.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(pixels(tmp_path / f"{name}.png"), colour, atol=1e-3, err_msg=name)
    write_png16(tmp_path / "rgb16.png", np.broadcast_to(colour * 257, (6, 6, 3)))
    # Pillow takes the upper byte: at most one of 256 levels off
    np.testing.assert_allclose(pixels(tmp_path / "rgb16.png"), colour, atol=1.0)
    for values in (grey * 257, grey * 257 + 128, grey * 257 - 128):  # half a level up and down
        write_png16(tmp_path / "grey16.png", np.full((6, 6), values))
        np.testing.assert_allclose(pixels(tmp_path / "grey16.png"), [grey] * 3, atol=1e-3)
    write_png16(tmp_path / "grey16.png", np.full((6, 6), 65535))
    np.testing.assert_allclose(pixels(tmp_path / "grey16.png"), [255] * 3, atol=1e-3)
    for name, mode, value in (("grey", "L", grey), ("two", "LA", (grey, 7)), ("bit", "1", 1)):
        Image.new(mode, (6, 6), value).save(tmp_path / f"{name}.png")
        shown = 255 if mode == "1" else grey
        np.testing.assert_allclose(pixels(tmp_path / f"{name}.png"), [shown] * 3, atol=1e-3, err_msg=name)


def test_wide_grey_is_scaled_or_refused() -> None:
    assert np.asarray(plain(Image.fromarray(np.full((2, 2), 257 * 9, np.int32)))).tolist() == [[9, 9], [9, 9]]
    for values in (np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32), np.full((2, 2), 0.5, np.float32)):
        with pytest.raises(ValueError, match="neither 8 nor 16 bits"):
            plain(Image.fromarray(values))


def test_flow_of_16_bits(tmp_path: Path) -> None:
    for axis, value in (("u", 0), ("v", 65535)):
        (tmp_path / axis / "clip").mkdir(parents=True)
        write_png16(tmp_path / axis / "clip" / "1.png", np.full((6, 6), value))
    found = Flow(1, 4)(tmp_path / "{}" / "clip")
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([-1.0, 1.0]))


def test_frames_in_natural_order_without_what_is_hidden(tmp_path: Path) -> None:
    for number in range(1, 13):
        Image.new("L", (4, 4), 10 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "._1.png").write_bytes(b"not a picture")
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    found = [np.asarray(image)[0, 0] for image in pictures(tmp_path, 12)]
    assert found == [10 * number for number in range(1, 13)]
    assert Frames(2, 4)(tmp_path / "3.png").shape == (3, 2, 4, 4)  # one picture, twice
    assert Picture(4)(tmp_path).shape == (3, 4, 4)


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_frames(tmp_path / "clip", [50, 60])
    frame = tmp_path / "clip" / "00001.jpg"
    frame.write_bytes(frame.read_bytes()[:-200])
    with pytest.raises(BrokenFileError, match=r"00001\.jpg cannot be read: .*[Tt]runcated"):
        Frames(2, 8)(tmp_path / "clip")
    frame.write_bytes(b"")
    with pytest.raises(BrokenFileError, match=r"00001\.jpg cannot be read"):
        Frames(2, 8)(tmp_path / "clip")
    wav = tmp_path / "x.wav"
    write_wav(wav, sine(0.1, 4000))
    whole = wav.read_bytes()
    for content, message in (
        (b"", r"x\.wav is empty"),
        (b"RIFF", r"x\.wav cannot be read"),
        (b"no sound" * 20, r"x\.wav cannot be read"),
        (whole[:44], r"x\.wav (cannot be read|has no sound)"),
        (whole[:20], r"x\.wav cannot be read"),
        (whole[:-100], r"x\.wav cannot be read: .*EOF"),  # else a shorter sound, in silence
    ):
        wav.write_bytes(content)
        with pytest.raises(BrokenFileError, match=message):
            waveform(wav, 4000)
    wav.write_bytes(whole[:12] + b"LIST\x04\0\0\0tags" + whole[12:])  # tags are no defect
    assert len(waveform(wav, 4000)) == 400
    write_wav(wav, np.zeros(0))
    with pytest.raises(BrokenFileError, match=r"x\.wav has no sound"):
        waveform(wav, 4000)


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_sound_that_was_written_to_a_pipe(tmp_path: Path, size: int) -> None:
    wav = tmp_path / "x.wav"
    write_wav(wav, sine(0.1, 4000))
    content = bytearray(wav.read_bytes())
    expected = waveform(wav, 4000)
    at = content.index(b"data")
    for place in (4, at + 4):  # the sizes of the file and of its sound, which the writer could not know
        content[place : place + 4] = struct.pack("<I", size)
    wav.write_bytes(content[:12] + b"LIST\x03\0\0\0tag\0" + content[12:])
    assert torch.equal(waveform(wav, 4000), expected)


def test_broken_videos_are_named(tmp_path: Path) -> None:
    video = tmp_path / "x.avi"
    for content in (b"", b"no video" * 50):
        video.write_bytes(content)
        with pytest.raises(BrokenFileError, match=r"x\.avi cannot be read"):
            pictures(video, 1)
        with pytest.raises(BrokenFileError, match=r"x\.avi cannot be read"):
            waveform(video, 4000)
    write_video(video, [20, 60])
    with pytest.raises(BrokenFileError, match=r"x\.avi has no sound"):
        waveform(video, 4000)
    for read in (lambda: pictures(tmp_path / "none.avi", 1), lambda: waveform(tmp_path / "none.wav", 4000)):
        with pytest.raises(FileNotFoundError, match="none"):
            read()


def test_what_is_not_the_files_fault_stays_as_it_is(tmp_path: Path) -> None:
    for error in (OSError(errno.EMFILE, "too many open files"), MemoryError("x"), ImportError("x")):
        with pytest.raises(type(error)) as caught, naming(tmp_path):
            raise error
        assert not isinstance(caught.value, BrokenFileError)
    with pytest.raises(BrokenFileError, match="cannot be read: KeyError"), naming(tmp_path):
        raise KeyError("x")
