"""Results in a folder: a CSV file grows by a line a run, everything else is drawn from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from aim_kernels.aim.strengths import ModulationTable
from aim_kernels.bench.report import append_csv, read
from aim_kernels.command_line import make_folder, write_text
from aim_kernels.experiments.runs import Run

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class RunLine(DataclassInstance, Protocol):
        """A line that tells which :class:`Run` it is of."""

        @property
        def run(self) -> Run: ...


L = TypeVar("L", bound="DataclassInstance")
RL = TypeVar("RL", bound="RunLine")


class Results(Generic[L]):
    """Reads and writes one file of lines. A run counts as done once its line is complete.

    What derives from it names the type of its lines, a dataclass whose fields are the columns, and may change the
    name of the file and how floats are written in it (``float_format``; empty: with all digits).
    """

    line_type: type[L]
    file_name: ClassVar[str] = "results.csv"
    float_format: ClassVar[str] = ".6g"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / self.file_name

    def make(self) -> None:
        """Makes the folder where it is missing: not before there is something to put into it."""
        make_folder(self.path)

    def lines(self) -> list[L]:
        """The finished runs. A line that was cut short is left out, and its run done again.

        Raises :class:`OtherVersionError` where the file has other columns.
        """
        return read(self.file, self.line_type)

    def append(self, line: L) -> None:
        """Adds what one run gave."""
        self.make()
        append_csv(self.file, [line], self.line_type, self.float_format)


class RunResults(Results[RL]):
    """Lines, and beside them AIM's history of every run that has one."""

    def make(self) -> None:
        make_folder(self.path / "history")

    def add(self, line: RL, history: list[dict[str, Any]]) -> None:
        """Adds what one run gave; the history first: a line promises that it is there."""
        self.make()
        if history:
            write_text(self.history_file(line.run), json.dumps(history))
        self.append(line)

    def history(self, run: Run) -> list[ModulationTable]:
        """What AIM did, update by update; empty where nothing of it was kept."""
        file = self.history_file(run)
        return [ModulationTable.from_dict(table) for table in json.loads(file.read_text())] if file.exists() else []

    def history_file(self, run: Run) -> Path:
        """Where the history of a run is kept."""
        return self.path / "history" / f"{self.file_stem(run)}.json"

    def file_stem(self, run: Run) -> str:
        """What tells a run from all others, as a file name without its ending."""
        return self.history_name(run).replace(" ", "").replace(":", "")

    @property
    def claims(self) -> Path:
        """The folder of what is being done: see :class:`~aim_kernels.experiments.sharing.Share`."""
        return self.path / "claims"

    def history_name(self, run: Run) -> str:
        """What tells a run from all others."""
        raise NotImplementedError
