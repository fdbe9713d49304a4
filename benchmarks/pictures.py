"""Draws every picture of the documentation anew, each from the lines that are recorded in benchmarks/results.

    python benchmarks/pictures.py                      # all of them, where they lie
    python benchmarks/pictures.py demo.png --out here  # some of them, elsewhere

What a picture shows goes along in it (``aim_kernels.aim.plots.numbers_of``). A test (test_pictures.py) compares that
with the lines and with the tables of the pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from aim_kernels import command_line
from aim_kernels.bench import report as bench_report
from aim_kernels.experiments.compare import pictures as compare_pictures
from aim_kernels.experiments.compare import report as compare_report
from aim_kernels.experiments.compare.results import Folder as CompareFolder
from aim_kernels.experiments.demo.pictures import draw_accuracy, draw_modulation
from aim_kernels.experiments.demo.results import Folder as DemoFolder
from aim_kernels.experiments.precision.configurations import Folder as PrecisionFolder
from aim_kernels.experiments.precision.summary import plot
from aim_kernels.experiments.runs import Run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: The run that modulation-digits.png shows, and the commit of the run that results.png does.
MODULATION = Run("digits", "aim", 0, 100, 40)
SPEED = "9b44676aca3c-dirty"


def _comparison(path: Path) -> None:
    lines = CompareFolder(RESULTS / "compare").lines()
    compare_pictures.overview(path, compare_report.standings(compare_report.reported(lines)))


def _speed(path: Path) -> None:
    lines = [line for line in bench_report.read(RESULTS / "results.csv", bench_report.Result) if line.commit == SPEED]
    bench_report.plot(path, lines, bench_report.title_of(vars(lines[0])))


#: Picture (below the root) to what draws it.
PICTURES: dict[str, Callable[[Path], None]] = {
    "docs/images/demo.png": lambda path: draw_accuracy(path, DemoFolder(RESULTS / "demo").lines()),
    "docs/images/modulation-digits.png": lambda path: draw_modulation(
        path, MODULATION, DemoFolder(RESULTS / "demo").history(MODULATION)
    ),
    "docs/images/comparison.png": _comparison,
    "docs/images/precision.png": lambda path: plot(path, PrecisionFolder(RESULTS).lines()),
    "benchmarks/results/results.png": _speed,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 1 where a picture cannot be written, 2 for a wrong argument."""
    names = {Path(name).name: name for name in PICTURES}
    p = command_line.Parser("python benchmarks/pictures.py", (__doc__ or "").partition("\n")[0])
    p.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(names)} (default: all)")
    p.add_argument("--out", type=command_line.folder, help="a folder for all of them (default: where each lies)")
    options = p.parse_args(argv)
    for name in options.names:
        if name not in names:
            p.refuse("NAME", f"{command_line.shown(name)} is none of: {', '.join(names)}")

    def draw() -> int:
        for name in options.names or names:
            path = ROOT / names[name] if options.out is None else command_line.make_folder(options.out) / name
            PICTURES[names[name]](path)
            print(path)
        return 0

    return command_line.run(p.prog, draw)


if __name__ == "__main__":
    command_line.leave("python benchmarks/pictures.py", main)
