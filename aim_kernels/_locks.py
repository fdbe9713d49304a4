"""Locks on files: the system gives them up when their process ends, however it ends, so none is ever stale."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator

#: What file systems without locks answer.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
#: What a lock that another process holds answers.
_HELD = {errno.EAGAIN, errno.EACCES, errno.EDEADLK, errno.EWOULDBLOCK}
_warned: set[str] = set()

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        # Far behind the end: there a lock is allowed, and keeps nobody from reading.
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def locked_now(descriptor: int, name: str) -> bool:
    """Takes the lock of an open file; False if another process, or another opening in this one, holds it.

    A file system without locks gives every lock, and one warning about the file ``name``.
    """
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        folder = os.path.dirname(os.path.abspath(name))
        if folder not in _warned:
            _warned.add(folder)
            sys.stderr.write(f"{folder}: its file system has no locks; run one process at a time in this folder\n")
    return True


@contextlib.contextmanager
def held(descriptor: int, name: str) -> Iterator[None]:
    """The lock of an open file, waited for."""
    while not locked_now(descriptor, name):
        time.sleep(0.01)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _unlock(descriptor)
