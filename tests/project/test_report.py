"""`python -m aim_kernels`: the report tells the truth, also about what is missing; commands go where they should."""

import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import aim_kernels
from aim_kernels import __main__ as command_line
from aim_kernels import diagnostics

ROOT = Path(__file__).parents[2]


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True)


def value_of(output, name):
    """The value on the report's line for ``name``."""
    (value,) = re.findall(rf"^  {re.escape(name)}  +(.*)$", output, re.MULTILINE)
    return value


# -- the report ----------------------------------------------------------------------------------------------------


def test_report_tells_versions_and_machine():
    result = python("-m", "aim_kernels")
    assert result.returncode == 0, result.stderr
    assert value_of(result.stdout, "aim_kernels") == aim_kernels.__version__
    assert value_of(result.stdout, "torch") == torch.__version__
    assert value_of(result.stdout, "numpy") == np.__version__
    assert value_of(result.stdout, "Python") == ".".join(map(str, sys.version_info[:3]))
    assert value_of(result.stdout, "CPU") == diagnostics.cpu_model()
    assert value_of(result.stdout, "threads").startswith(str(torch.get_num_threads()))
    assert value_of(result.stdout, "compiler")


def test_report_tells_every_backend_with_its_reason():
    sections = diagnostics.environment()
    assert list(sections["backends"]) == list(aim_kernels.backends())
    for name, backend in aim_kernels.backends().items():
        fields = backend if isinstance(backend, dict) else vars(backend)
        available, reason = fields["available"], fields["reason"]
        line = sections["backends"][name]
        assert line.startswith("available" if available else "not available")
        assert reason in line
        assert available or reason, f"{name} is missing without a reason"


def test_report_tells_the_forced_instruction_set(monkeypatch):
    monkeypatch.setenv("AIM_KERNELS_ISA", "scalar")
    sections = diagnostics.environment()
    assert sections["extension"]["active isa"] == "scalar"
    assert sections["extension"]["isa scalar"] == "available"
    assert sections["variables"]["AIM_KERNELS_ISA"] == "scalar"


def test_report_explains_an_impossible_instruction_set(monkeypatch):
    monkeypatch.setenv("AIM_KERNELS_ISA", "quantum")
    told = diagnostics.environment()["extension"]["active isa"]
    assert told.startswith("none: ")
    assert "quantum" in told


def test_report_tells_what_the_processor_lacks(monkeypatch):
    """Compiled, supported, both or neither: three different lines."""
    from aim_kernels import _C

    monkeypatch.setattr(_C, "isas", lambda: [("a", True, True), ("b", True, False), ("c", False, False)])
    extension = diagnostics.environment()["extension"]
    assert extension["isa a"] == "available"
    assert extension["isa b"] == "compiled, but this CPU lacks it"
    assert extension["isa c"] == "not compiled into this build"


def test_report_points_at_a_misspelt_variable(monkeypatch):
    monkeypatch.setenv("AIM_KERNELS_BACKENDS", "cpu")
    assert diagnostics.environment()["variables"]["AIM_KERNELS_BACKENDS"] == "cpu (unknown: nothing reads it)"


def test_report_works_without_the_extension():
    """As where the build failed: the report must say so, and stay a report."""
    code = (
        "import sys, runpy\n"
        "sys.modules['aim_kernels._C'] = None\n"
        "sys.argv = ['aim_kernels']\n"
        "runpy.run_module('aim_kernels', run_name='__main__', alter_sys=True)\n"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert value_of(result.stdout, "_C").startswith("not built: ")
    assert "make build" in value_of(result.stdout, "help")
    assert value_of(result.stdout, "cpu").startswith("not available")
    assert value_of(result.stdout, "reference").startswith("available")


def test_a_broken_part_does_not_hide_the_others(monkeypatch):
    def broken():
        raise RuntimeError("driver lost")

    monkeypatch.setattr(sys.modules["aim_kernels.backends"], "backends", broken)
    sections = diagnostics.environment()
    assert sections["backends"] == {"backends": "not available: RuntimeError: driver lost"}
    assert sections["versions"]["aim_kernels"] == aim_kernels.__version__


def test_render_aligns_the_values():
    text = diagnostics.render({"one": {"a": "1"}, "two": {"longer": "2"}})
    assert text == "one\n  a       1\ntwo\n  longer  2"


def test_variables_are_those_that_the_sources_read():
    files = [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("python/*.cpp"), ROOT / "setup.py"]
    files += [path for path in ROOT.glob("aim_kernels/**/*.py") if path.name != "report.py"]
    read = {name for path in files for name in re.findall(r"""["'](AIM_KERNELS_[A-Z_]+)["']""", path.read_text())}
    assert read == set(diagnostics.VARIABLES)


# -- the commands --------------------------------------------------------------------------------------------------


def test_unknown_command_gives_usage(capsys):
    assert command_line.main(["dmeo"]) == 2
    told = capsys.readouterr().err
    assert "unknown command 'dmeo'" in told
    assert "python -m aim_kernels demo" in told


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_help_names_every_command(flag, capsys):
    assert command_line.main([flag]) == 0
    told = capsys.readouterr().out
    for command in command_line.COMMANDS:
        assert f"python -m aim_kernels {command}" in told


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_command_hands_its_arguments_on(command, monkeypatch):
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append(argv))
    monkeypatch.setattr(command_line, "import_module", {command_line.COMMANDS[command]: module}.__getitem__)
    assert command_line.main([command, "--seeds", "3"]) == 0
    assert seen == [["--seeds", "3"]]


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_command_names_the_extra_that_is_missing(command, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(command_line, "import_module", missing)
    assert command_line.main([command]) == 1
    assert f"aim-kernels[{command}]" in capsys.readouterr().err


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_command_exists(command):
    module = command_line.import_module(command_line.COMMANDS[command])
    assert callable(module.main)
