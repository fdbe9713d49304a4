"""Checkpoint files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch


def save(checkpoint: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` that a crash cannot spoil: a file of that name is replaced by a complete one, or stays as it was.

    The checkpoint is written beside ``path``, flushed to the disk, and renamed.

    Args:
        checkpoint: what ``torch.save`` takes, such as ``{"model": ..., "optimizer": optimizer.state_dict()}``.
        path: the file; its folder must exist.

    Raises:
        OSError: the folder cannot be written to. Nothing was changed.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp is for secrets; a checkpoint gets the rights that open() would have given it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
