"""Facts of the package: what it needs, what it ships, what it must not contain, and that its style is the house's."""

import ast
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import wheel_contents
from packaging.requirements import Requirement

import aim_kernels

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SCRIPTS = Path(sysconfig.get_path("scripts"))

NATIVE = sorted(
    path for folder in ("csrc", "python", "tests/native") for path in (ROOT / folder).rglob("*") if path.is_file()
)
CXX = [path for path in NATIVE if path.suffix in {".cpp", ".cu", ".cuh", ".h", ".inl"}]
PYTHON = [
    path
    for folder in ("aim_kernels", "benchmarks", "examples", "tests", "python")
    for path in sorted((ROOT / folder).rglob("*.py*"))
    if path.suffix in {".py", ".pyi"}
]


def run(*command, cwd=ROOT, **options):
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def relative(path):
    return str(path.relative_to(ROOT))


# -- what pyproject.toml promises ----------------------------------------------------------------------------------


def test_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert importlib.metadata.version("aim-kernels") == aim_kernels.__version__
    assert f"## [{aim_kernels.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_wheels_are_built_for_every_python_that_is_promised():
    """cibuildwheel's selection starts at requires-python; the smoke test is what it runs."""
    settings = PYPROJECT["tool"]["cibuildwheel"]
    first = int(PROJECT["requires-python"].removeprefix(">=3."))
    assert settings["build"].split() == [f"cp3{minor}-*" for minor in range(first, first + 4)]
    assert settings["linux"]["archs"] == ["x86_64", "aarch64"]
    assert "tests/project/wheel_smoke.py" in settings["test-command"]
    assert settings["environment"] == {"AIM_KERNELS_CUDA": "0"}
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    assert "pypa/cibuildwheel@" in workflow


def test_torch_has_a_lower_bound_only():
    torch = next(Requirement(text) for text in PROJECT["dependencies"] if Requirement(text).name == "torch")
    assert [specifier.operator for specifier in torch.specifier] == [">="]


def test_build_needs_no_torch():
    names = {Requirement(text).name for text in PYPROJECT["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "ninja"}


def test_triton_is_never_a_hard_dependency():
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == {"torch", "numpy"}
    (triton,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["triton"])
    assert triton.marker is not None
    assert not triton.marker.evaluate({"sys_platform": "darwin"})


def test_constraints_pin_exactly_and_only_development():
    lines = [line for line in (ROOT / "constraints-dev.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {Requirement(line).name: Requirement(line).specifier for line in lines}
    assert "torch" in pins
    for name, specifier in pins.items():
        assert [part.operator for part in specifier] == ["=="], name
        # The Makefile hands torch's line to pip as it is: a local version or a marker would break it.
        assert re.fullmatch(r"==[\d.]+", str(specifier)), name


# -- importing -----------------------------------------------------------------------------------------------------

BLOCKED_IMPORT = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: importing it raises ModuleNotFoundError
import torch
import aim_kernels as ak
model = torch.nn.Linear(3, 2)
optimizer = ak.AIMFusedOptimizer(model.parameters(), lr=0.1, backend={backend!r})
model(torch.ones(1, 3)).sum().backward()
before = model.weight.detach().clone()
optimizer.step()
assert not torch.equal(model.weight, before)
print({{name: (b["available"] if isinstance(b, dict) else b.available) for name, b in ak.backends().items()}})
"""

EXTRAS = ["matplotlib", "sklearn", "rich", "seglearn", "triton", "pytest", "scipy"]
EXTRAS += ["lightning", "transformers", "accelerate", "tensorboard"]


@pytest.mark.slow
def test_imports_and_steps_without_any_extra():
    result = run(sys.executable, "-c", BLOCKED_IMPORT.format(blocked=EXTRAS, backend="auto"))
    assert result.returncode == 0, result.stdout
    assert "'cpu': True" in result.stdout


@pytest.mark.slow
def test_imports_and_steps_without_the_extension():
    result = run(sys.executable, "-c", BLOCKED_IMPORT.format(blocked=["aim_kernels._C"], backend="reference"))
    assert result.returncode == 0, result.stdout
    assert "'cpu': False" in result.stdout
    assert "'reference': True" in result.stdout


def test_public_names_exist_once():
    names = list(aim_kernels.__all__)
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(aim_kernels, name)] == []


def test_stub_tells_what_the_extension_has():
    """Every public name of _C stands in its stub, and the other way round."""
    from aim_kernels import _C

    tree = ast.parse((ROOT / "python" / "_C.pyi").read_text())
    told = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    told |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert told == {name for name in dir(_C) if not name.startswith("_")}


# -- sources -------------------------------------------------------------------------------------------------------

FOREIGN = re.compile(r'#\s*include\s*[<"](torch/|ATen/|c10/|caffe2/|Python\.h|pybind11/|numpy/)')


def test_kernels_include_no_torch_and_no_python():
    files = [path for path in CXX if path.is_relative_to(ROOT / "csrc")]
    assert files
    assert [relative(path) for path in files if FOREIGN.search(path.read_text())] == []


def test_foreign_include_would_be_found():
    assert FOREIGN.search("# include <torch/extension.h>")
    assert FOREIGN.search('#include "pybind11/pybind11.h"')
    assert not FOREIGN.search('#include "aim/step.h"')


def test_native_sources_are_ascii():
    assert [relative(path) for path in CXX if not path.read_bytes().isascii()] == []


# -- archives ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source archive, made from a copy so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    result = run(sys.executable, "-c", code, cwd=folder / "tree")
    assert result.returncode == 0, result.stdout
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_sdist_holds_everything_that_a_build_and_the_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    needed = {relative(path) for path in [*NATIVE, *PYTHON]}
    needed |= {"pyproject.toml", "setup.py", "LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints-dev.txt"}
    needed |= {"aim_kernels/py.typed", "docs/design.md"}
    assert needed - inside == set()
    assert [name for name in inside if name.endswith((".so", ".pyc", ".o"))] == []


@pytest.mark.nightly
def test_wheel_from_the_sdist(sdist, tmp_path):
    """Built from the archive alone: extension, stub and marker inside; sources and tests not."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path)
    # Only its contents matter here.
    unoptimized = {**os.environ, "AIM_KERNELS_CXXFLAGS": "-O0", "AIM_KERNELS_CUDA": "0"}
    result = run(sys.executable, "-m", "pip", "wheel", *options, sdist, env=unoptimized)
    assert result.returncode == 0, result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        metadata = archive.read(next(name for name in inside if name.endswith("/METADATA"))).decode()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    modules = {relative(path) for path in (ROOT / "aim_kernels").rglob("*.py")}
    assert {f"aim_kernels/_C{suffix}", "aim_kernels/_C.pyi", "aim_kernels/py.typed", *modules} - set(inside) == set()
    assert {name.split("/")[0] for name in inside} == {"aim_kernels", wheel.name.split("-cp")[0] + ".dist-info"}
    assert "License-Expression: MIT" in metadata
    assert f"Version: {aim_kernels.__version__}" in metadata
    assert wheel_contents.defects(wheel) == []
    # The wheel of a stranger's machine must run on another one.
    archive_folder = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(archive_folder)
    code = "import aim_kernels; from aim_kernels import _C; print(aim_kernels.__file__, _C.active_isa())"
    result = run(sys.executable, "-c", code, cwd=archive_folder)
    assert result.returncode == 0, result.stdout
    assert str(archive_folder) in result.stdout


def spoilt_wheel(folder, *, tag="cp311-cp311-manylinux_2_28_x86_64", needs="libm", without=(), more=()):
    """A wheel made by hand around a library that is linked to what is named."""
    python, _, platform = tag.split("-")
    library = folder / "library.so"
    (folder / "source.c").write_text("double cos(double); double f(double x) { return cos(x); }\n")
    run("gcc", "-shared", "-fPIC", folder / "source.c", "-o", library, "-Wl,--no-as-needed", f"-l{needs[3:]}", "-lm")
    info = "aim_kernels-1.0.dist-info"
    files = {
        "aim_kernels/py.typed": b"",
        "aim_kernels/_C.pyi": b"",
        f"aim_kernels/_C.cpython-{python[2:]}-x86_64-linux-gnu.so": library.read_bytes(),
        f"{info}/licenses/LICENSE": b"",
        f"{info}/METADATA": b"Version: 1.0\nLicense-Expression: MIT\nLicense-File: LICENSE\n",
        f"{info}/WHEEL": f"Root-Is-Purelib: false\nTag: cp311-cp311-{platform}\n".encode(),
        **{name: library.read_bytes() if name.endswith(".so") else b"" for name in more},
    }
    wheel = folder / f"aim_kernels-1.0-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            if name not in without:
                archive.writestr(name, data)
    return wheel


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"without": ["aim_kernels/py.typed"]}, ["aim_kernels/py.typed is missing"]),
        ({"without": ["aim_kernels-1.0.dist-info/licenses/LICENSE"]}, ["licenses/LICENSE is missing"]),
        ({"more": ["aim_kernels/update.cu"]}, ["update.cu does not belong"]),
        ({"more": ["aim_kernels/_cuda.cpython-311-x86_64-linux-gnu.so"]}, ["expected _C alone"]),
        ({"more": ["tests/test_x.py"]}, ["tests/test_x.py lies outside"]),
        ({"more": ["aim_kernels.libs/libgomp.so.1"]}, ["libgomp.so.1 lies outside"]),
        ({"tag": "cp312-cp312-manylinux_2_28_x86_64"}, ["WHEEL says"]),
        ({"needs": "libgomp"}, ["needs libgomp.so.1"]),
        ({"tag": "cp311-cp311-manylinux_2_1_x86_64"}, ["newer than its tag"]),
        ({"tag": "cp311-cp311-linux_x86_64"}, []),
    ],
    ids=[
        "sound",
        "py.typed",
        "licence",
        "cuda-source",
        "cuda-module",
        "tests",
        "vendored",
        "tag",
        "libgomp",
        "glibc",
        "plain-tag",
    ],
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="makes a wheel of x86-64")
def test_defects_of_a_wheel_are_named(options, expected, tmp_path):
    found = wheel_contents.defects(spoilt_wheel(tmp_path, **options))
    assert len(found) == len(expected)
    assert all(part in what for part, what in zip(expected, found, strict=True)), found
