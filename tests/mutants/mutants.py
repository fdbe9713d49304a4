"""Plants the bugs of planted.py, one at a time, and tells which test catches each: ``make mutants``, or

    python tests/mutants/mutants.py [part of a name ...]

Everything happens in a copy of the tree under build/mutants, which keeps its objects between runs; bugs in Python run
on the extension of the working tree. The tests have to pass before anything is planted. Exit status 0 where every bug
was caught.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutant_list import Mutant
from planted import EVERYTHING

ROOT = Path(__file__).resolve().parents[2]
TREE, KEPT = (ROOT / "build" / "mutants" / name for name in ("tree", "kept"))
#: What a build makes, and a mutant may spoil.
MADE = ("build", "aim_kernels/*.so")
COMPILED = ("csrc/bench/", "csrc/common/", "csrc/cpu/", "csrc/include/", "python/", "setup.py")
LIMIT = 600  # seconds for the tests of one mutant


def sources() -> list[str]:
    """Files of the working tree that git knows or would know."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def sync() -> None:
    """Makes the copy equal to the working tree; files that did not change keep their time, so nothing is rebuilt."""
    wanted = set(sources())
    for name in wanted:
        here, there = ROOT / name, TREE / name
        if not there.exists() or there.read_bytes() != here.read_bytes():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here, there)
    for folder in ("aim_kernels", "csrc", "python", "tests"):
        for path in (TREE / folder).rglob("*.*"):
            name = path.relative_to(TREE).as_posix()
            if path.is_file() and name not in wanted and path.suffix in (".py", ".h", ".inl", ".cpp", ".cu"):
                path.unlink()


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(TREE),
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant of the same size and second would run as what it replaced
        "AIM_KERNELS_CUDA": "0",
        "AIM_KERNELS_CXXFLAGS": "-O2",  # compiles in half the time; the bits are the same
        "OMP_WAIT_POLICY": "passive",
    }


def build() -> str:
    """Builds the extension in the copy; returns the compiler's words where that fails."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=TREE, env=environment(), capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def run_tests(tests: Collection[str], *options: str) -> tuple[str, str]:
    """("passed" | "failed" | "broken", the failing test or what pytest said)."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not gpu", *options]
    command += [located(test) for test in tests]
    try:
        done = subprocess.run(
            command, cwd=TREE, env=environment(), capture_output=True, text=True, check=False, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return "broken", f"the tests took longer than {LIMIT} s"
    if done.returncode == 0:
        skipped = re.search(r"^(?!.*passed).*skipped", done.stdout.splitlines()[-1])
        return ("broken", "all tests were skipped") if skipped else ("passed", "")
    if done.returncode < 0:
        return "failed", f"a crash by signal {-done.returncode} in {' or '.join(tests)}"
    failed = re.search(r"^FAILED tests/\w+/(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return "failed", failed.group(1)
    return "broken", (done.stdout + done.stderr)[-1500:]


def located(test: str) -> str:
    """A test by its path from the root; mutants name its file only."""
    file, separator, function = test.partition("::")
    (path,) = TREE.glob(f"tests/*/{file}")
    return f"{path.relative_to(TREE).as_posix()}{separator}{function}"


def is_compiled(mutant: Mutant) -> bool:
    """Whether the extension has to be built anew. Programs of tests/native are built by their tests."""
    return mutant.file.startswith(COMPILED)


def plant(mutant: Mutant) -> tuple[str, str]:
    """("caught" | "survived" | "broken", the test or the reason). Leaves the copy as it was."""
    path = TREE / mutant.file
    text, times = path.read_text(), path.stat()
    if text.count(mutant.old) != 1:
        return "broken", f"its text stands {text.count(mutant.old)} times in {mutant.file}"
    native = mutant.file.startswith("csrc/") or is_compiled(mutant)
    if native:
        keep(TREE, KEPT)
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        if is_compiled(mutant) and (words := build()):
            return "broken", f"does not compile: {words[-1500:]}"
        result, detail = run_tests(mutant.tests, "-x")
        return {"passed": "survived", "failed": "caught"}.get(result, result), detail
    finally:
        path.write_text(text)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if native:
            keep(KEPT, TREE)


def keep(source: Path, target: Path) -> None:
    """Copies what builds made, with its times: what a mutant compiled must not pass for the original's."""
    for pattern in MADE:
        for old in target.glob(pattern):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for path in source.glob(pattern):
            there = target / path.relative_to(source)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, there) if path.is_dir() else shutil.copy2(path, there)


def bar(done: int, total: int, text: str) -> None:
    if sys.stderr.isatty():
        filled = 30 * done // total
        print(f"\r\033[K[{'#' * filled}{'-' * (30 - filled)}] {done}/{total} {text}", end="", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; none means all")
    parser.add_argument("--only", choices=("python", "native"), help="bugs in Python, or those that are compiled")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants", help="of the copy")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests as they are first")
    options = parser.parse_args()
    chosen, folder = options.names, options.folder.resolve()
    global TREE, KEPT
    TREE, KEPT = folder / "tree", folder / "kept"
    mutants = [m for m in EVERYTHING if not chosen or any(part in m.name for part in chosen)]
    if not mutants:
        parser.error(f"no mutant has {' or '.join(chosen)} in its name")
    if options.only:
        mutants = [m for m in mutants if is_compiled(m) == (options.only == "native")]
    sync()
    if any(map(is_compiled, mutants)):
        print("building ...", file=sys.stderr)
        if words := build():
            print(words)
            return 1
    else:
        for path in ROOT.glob("aim_kernels/*.so"):
            shutil.copy2(path, TREE / path.relative_to(ROOT))
    result, detail = "passed", ""
    if not options.unchecked:
        print("running the tests as they are ...", file=sys.stderr)
        result, detail = run_tests(list(dict.fromkeys(test for m in mutants for test in m.tests)))
    if result != "passed":
        print(f"the tests do not pass without a mutant: {detail}")
        return 1
    results = []
    for number, mutant in enumerate(mutants):
        bar(number, len(mutants), mutant.name)
        began = time.perf_counter()
        outcome, detail = plant(mutant)
        results.append(outcome)
        bar(number + 1, len(mutants), "")
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        print(f"{outcome:9} {mutant.name:42} {time.perf_counter() - began:5.1f} s  {detail}", flush=True)
    print(f"{len(results)} mutants: " + ", ".join(f"{results.count(x)} {x}" for x in ("caught", "survived", "broken")))
    return 0 if set(results) == {"caught"} else 1


if __name__ == "__main__":
    sys.exit(main())
