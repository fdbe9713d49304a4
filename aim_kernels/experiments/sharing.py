"""Several processes that share the runs of one folder: each run is claimed before it begins, and done once."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from aim_kernels._locks import locked_now
from aim_kernels.command_line import make_folder, writing
from aim_kernels.experiments.runs import Run

WAIT = 0.2  # seconds between two looks at what others hold


class Claim:
    """One name in a folder, held by one process at a time.

    The file tells process and host; what counts is its lock, which ends with the process, also on another host whose
    file system passes locks on. :attr:`taken` is False if another process holds it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = -1
        with writing(file):
            make_folder(file.parent)
            self.taken = self._take()

    def _take(self) -> bool:
        while True:
            try:
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # the last of another process took the folder away
                make_folder(self.file.parent)
                continue
            except PermissionError:
                if os.name == "nt":  # being removed by its former holder
                    return False
                raise
            try:
                if not locked_now(descriptor, str(self.file)):
                    os.close(descriptor)
                    return False
                if not self._is_there(descriptor):  # its former holder removed it between opening and locking
                    os.close(descriptor)
                    continue
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
            except OSError:
                os.close(descriptor)
                raise
            self._descriptor = descriptor
            return True

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the name back, and removes its file."""
        if self._descriptor < 0:
            return
        removed = False
        with contextlib.suppress(OSError):  # Windows removes no open file
            os.unlink(self.file)
            removed = True
        os.close(self._descriptor)
        self._descriptor = -1
        if not removed:
            with contextlib.suppress(OSError):
                os.unlink(self.file)


@contextlib.contextmanager
def alone_in(folder: Path, name: str) -> Iterator[None]:
    """One process at a time within, among those that name the same."""
    claim = Claim(folder / name)
    while not claim.taken:
        time.sleep(WAIT)
        claim = Claim(folder / name)
    try:
        yield
    finally:
        _end(folder, [claim])


class Share:
    """What this process is to do of ``runs``, in their order; other processes do the rest.

    Args:
        folder: where claims are kept; it is gone once nobody has one.
        runs: all that is to be done in the end, by whomever.
        name: what tells a run from all others, as a file name.
        finished: the runs that the results hold now.
    """

    def __init__(
        self, folder: Path, runs: Sequence[Run], name: Callable[[Run], str], finished: Callable[[], Collection[Run]]
    ) -> None:
        self.folder, self._name, self._finished = folder, name, finished
        self.total = len(runs)
        self._left = list(dict.fromkeys(runs))
        self._claims: dict[Run, Claim] = {}
        self.look()

    @property
    def done(self) -> int:
        """How many of the runs have results, as last seen."""
        return self.total - len(self._left) - len(self._claims)

    def look(self) -> None:
        """Drops what has been done since, here or elsewhere."""
        finished = set(self._finished())
        self._left = [run for run in self._left if run not in finished]

    def __iter__(self) -> Iterator[Run | None]:
        """Runs, claimed; None as long as all that is left is held by others. Ends once every run is done or held by
        this process."""
        while self._left:
            run = self._claimed()
            if run is None and not self._left:
                return
            yield run

    def _claimed(self) -> Run | None:
        for run in list(self._left):
            claim = Claim(self.folder / self._name(run))
            if not claim.taken:
                continue
            # What its former holder gave is written by now: it releases after that.
            self.look()
            if run in self._left:
                self._left.remove(run)
                self._claims[run] = claim
                return run
            claim.release()
        self.look()
        return None

    def release(self, run: Run) -> None:
        """The result of a run is written."""
        self._claims.pop(run).release()

    def close(self) -> None:
        """Gives back what was claimed and not done."""
        _end(self.folder, list(self._claims.values()))
        self._claims.clear()


def _end(folder: Path, claims: Sequence[Claim]) -> None:
    for claim in claims:
        claim.release()
    with contextlib.suppress(OSError):  # others have claims still, or there never were any
        folder.rmdir()
