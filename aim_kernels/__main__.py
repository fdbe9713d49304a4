"""``python -m aim_kernels``: what is installed, and the jobs.

python -m aim_kernels                environment report: versions, backends and why one is missing, CPU instruction set
python -m aim_kernels demo [...]     main job: joint training beside AIM on small data sets, with pictures
python -m aim_kernels bench [...]    this machine's table: kernels, peers and the memory floor
python -m aim_kernels compare [...]  every method on the same data, networks and batches, with a report
python -m aim_kernels precision [...]  what fewer bytes cost in training, against float32
"""

from __future__ import annotations

import sys
from importlib import import_module

from aim_kernels import command_line, diagnostics

PROG = "python -m aim_kernels"
#: Commands, and the packages whose ``main`` they are.
COMMANDS = {
    "demo": "aim_kernels.experiments.demo",
    "bench": "aim_kernels.bench",
    "compare": "aim_kernels.experiments.compare",
    "precision": "aim_kernels.experiments.precision",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is 2 for one that does not exist."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["report"]
    if command in ("report", "-h", "--help", "help") and (not rest or rest in (["-h"], ["--help"])):
        return command_line.run(PROG, lambda: _told(usage() if rest or command != "report" else None))
    if command not in COMMANDS:
        known = ", ".join([PROG, *(f"{PROG} {name} [options]" for name in COMMANDS)])
        why = f"{command} takes no {rest[0]!r}" if command in ("report", "help") else ""
        print(f"usage: {known}\n{PROG}: error: {why or f'unknown command {command!r}'}", file=sys.stderr)
        return 2
    try:
        module = import_module(COMMANDS[command])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "aim_kernels":
            raise
        print(f"{error}: `pip install 'aim-kernels[{command}]'` brings what {command!r} needs", file=sys.stderr)
        return 1
    return module.main(rest) or 0


def _told(text: str | None) -> int:
    print(diagnostics.render(diagnostics.environment()) if text is None else text)
    return 0


def usage() -> str:
    """The commands, one a line."""
    return "usage:\n" + (__doc__ or "").partition("\n\n")[2].rstrip()


if __name__ == "__main__":
    command_line.leave(PROG, main)
