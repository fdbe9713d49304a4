"""The README holds: its code runs, its commands and links exist, its tables are complete. So do the examples."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aim_kernels import diagnostics

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def execute(code, folder):
    """Run the code as a person would who pasted it into a file elsewhere."""
    script = folder / "pasted.py"
    script.write_text(code)
    return subprocess.run([sys.executable, script], cwd=folder, text=True, capture_output=True, env={**os.environ})


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_python_block_runs(number, tmp_path):
    result = execute(blocks(README, "python")[number], tmp_path)
    assert result.returncode == 0, result.stderr


def test_there_is_a_python_block():
    assert blocks(README, "python")


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["-", "+"])
def test_both_sides_of_the_swap_run(sign, tmp_path):
    """The diff shows one line changed; the program runs before and after."""
    (diff,) = blocks(README, "diff")
    lines = [line[2:] for line in diff.splitlines() if line[:1] in (sign, " ")]
    setup = ["import torch", "import aim_kernels as ak", "model = torch.nn.Linear(3, 2)"]
    use = ["model(torch.ones(4, 3)).sum().backward()", "optimizer.step()"]
    result = execute("\n".join([*setup, *lines, *use]), tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose)
    local = [link for link in links if not link.startswith(("http://", "https://", "mailto:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named - targets == set()


def test_environment_variables_are_all_told():
    told = set(re.findall(r"^\| `(AIM_KERNELS_[A-Z_]+)` ", README, re.MULTILINE))
    assert told == set(diagnostics.VARIABLES)


def test_ci_runs_what_the_readme_says():
    commands = re.findall(r"^(?:exec )?(make .*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert commands == ["make lint", "make test test-all"]
    assert any("make test" in block for block in blocks(README, "bash"))
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# -- examples ------------------------------------------------------------------------------------------------------


def run_example(name, tmp_path):
    # One thread: beside other processes the waiting of small operations for each other's threads takes minutes.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / name]
    return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=one_thread)


@pytest.mark.slow
def test_drop_in_example_follows_torch(tmp_path):
    result = run_example("drop_in.py", tmp_path)
    assert result.returncode == 0, result.stderr
    (gap,) = re.findall(r"largest difference of a loss: (\S+)", result.stdout)
    # Fifty steps, a few ulp each, on losses of the order of one.
    assert float(gap) < 1e-4


@pytest.mark.slow
def test_two_modalities_example_gains_where_dominance_is_a_shortcut(tmp_path):
    result = run_example("two_modalities.py", tmp_path)
    assert result.returncode == 0, result.stderr
    joint, balanced = (float(value) for value in re.findall(r"([\d.]+)% of the test samples", result.stdout))
    # Four classes: a blind guess gives 25. The example exists to show a difference that nobody has to squint at.
    assert balanced > joint + 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp.py", "fsdp2.py"])
def test_distributed_examples(name, tmp_path):
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, ROOT / "examples" / name]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    epochs = re.findall(r"epoch (\d): strength", result.stdout)
    assert epochs == list("0123"), "one process prints, once an epoch"
    (share,) = re.findall(r"([\d.]+)% of the test samples", result.stdout)
    assert float(share) > 70, "joint training gets about half of them"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"), [("lightning_trainer.py", "lightning"), ("hugging_face_trainer.py", "transformers")]
)
def test_trainer_examples_gain_as_the_plain_loop_does(name, package, tmp_path):
    pytest.importorskip(package)
    result = run_example(name, tmp_path)
    assert result.returncode == 0, result.stderr
    joint, balanced = (float(value) for value in re.findall(r"([\d.]+)% of the test samples", result.stdout))
    assert balanced > joint + 5


@pytest.mark.slow
def test_accelerate_example_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("accelerate")
    result = run_example("accelerate_loop.py", tmp_path)
    assert result.returncode == 0, result.stderr
    ((accuracy, same),) = re.findall(r"([\d.]+)% of the test samples.*equal: (\w+)", result.stdout)
    assert same == "True"
    # Joint training reaches less than 70, see the other examples.
    assert float(accuracy) > 75


def test_every_example_is_run_here():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    trainers = {"lightning_trainer.py", "hugging_face_trainer.py", "accelerate_loop.py"}
    assert names == {"drop_in.py", "two_modalities.py", "ddp.py", "fsdp2.py", *trainers}
