"""What can be said of the CUDA kernels without a GPU: registers, machine code, tables, and how the build finds nvcc.

Where nvcc is, the kernels must have been built: these tests fail then rather than skip.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from aim_kernels import _C
from aim_kernels.step import layout

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90")
STORAGE = ("float32", "float64", "bfloat16", "float16")
#: The family "general" has another name in C++.
FAMILIES = ["packed" if family == "general" else family for family in layout.FAMILIES]
UPDATES = [f"update_{family}_{storage}" for family in FAMILIES for storage in STORAGE]
UNITS = [*(f"{unit}_{storage}" for unit in ("update", "packed") for storage in STORAGE), "finish"]
KERNELS = [*UPDATES, "finish", "emit", "copy_bytes"]


def setup_module_of(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, imported without being carried out."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("aim_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def objects() -> Path:
    """The folder of the build's object files."""
    with pytest.MonkeyPatch.context() as patch:
        nvcc, reason = setup_module_of(patch).choose_nvcc()
    if nvcc is None:
        pytest.skip(reason)
    assert _C.build_info()["cuda"] == "built"
    folders = sorted((ROOT / "build").glob("objects-*"))
    assert folders, "no object files: the extension was built elsewhere; run `make build`"
    return folders[-1]


def cuobjdump() -> str:
    triton = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin"
    found = shutil.which("cuobjdump", path=os.pathsep.join([str(triton), os.environ.get("PATH", "")]))
    assert found, "cuobjdump is needed: it comes with triton (pip install 'aim-kernels[triton]')"
    return found


@pytest.fixture(scope="module")
def assembler(objects: Path) -> dict[tuple[str, str], str]:
    """What ptxas said of every kernel, by name and architecture."""
    told = {}
    for path in objects.glob("csrc_cuda_*.ptxas.txt"):
        parts = re.split(r"Compiling entry function '(\w+)' for '(\w+)'", path.read_text())
        for mangled, architecture, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            match = re.match(r"_ZN3aim6device\d+([a-z_0-9]+?)EN?S?", mangled)
            assert match, mangled
            told[match[1], architecture] = text
    return told


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_spills(assembler: dict[tuple[str, str], str], kernel: str, architecture: str) -> None:
    text = assembler[kernel, architecture]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, text
    registers = re.search(r"Used (\d+) registers", text)
    assert registers
    # Two blocks of 256 threads on a multiprocessor, so that one computes while the other waits for memory.
    assert int(registers[1]) <= 128


def test_no_other_kernel_was_forgotten(assembler: dict[tuple[str, str], str]) -> None:
    assert {name for name, _ in assembler} == set(KERNELS)


@pytest.fixture(scope="module")
def machine_code(objects: Path) -> dict[tuple[str, str], str]:
    """Disassembly of every kernel, by name and architecture."""
    code = {}
    for path in sorted(objects.glob("csrc_cuda_*.cu.o")):
        text = subprocess.run([cuobjdump(), "-sass", str(path)], capture_output=True, text=True, check=True).stdout
        for part in re.split(r"(?=code for sm_\d+)", text)[1:]:
            architecture = re.match(r"code for (sm_\d+)", part)[1]  # type: ignore[index]
            for name, body in re.findall(
                r"Function : _ZN3aim6device\d+([a-z_0-9]+?)EN?S?\w*\n(.*?)(?=Function :|\Z)", part, re.S
            ):
                code[name, architecture] = body
    return code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code(machine_code: dict[tuple[str, str], str], kernel: str, architecture: str) -> None:
    """Global memory in accesses of 16 bytes; nothing in local memory."""
    code = machine_code[kernel, architecture]
    found = set(re.findall(r"\b((?:LD|ST)[GL]?(?:\.[A-Z0-9_]+)+)", code))
    assert not [name for name in found if name.startswith(("LDL", "STL"))], found
    if kernel not in ("finish", "emit"):  # small, or rare
        assert any(name.startswith("LDG") and ".128" in name for name in found), found
        assert any(name.startswith("STG") and ".128" in name for name in found), found
        # Through pointers that are known to be global, not by the generic instructions.
        assert not [name for name in found if re.match(r"(LD|ST)\.E.*128", name)], found


def test_later_architectures_get_ptx(objects: Path) -> None:
    listed = subprocess.run(
        [cuobjdump(), "--list-ptx", str(objects / "csrc_cuda_update_float32.cu.o")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "sm_80.ptx" in listed


def test_architectures_that_share_ptx_would_have_the_same(setup_py: ModuleType, tmp_path: Path, objects: Path) -> None:
    """What nvcc makes for 90 is what it makes for 80; every header takes part. (100 has another compiler.)"""
    nvcc, _ = setup_py.choose_nvcc()
    told = []
    for number in ("80", "90"):
        command = [nvcc, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", *setup_py.NVCCFLAGS]
        command += [f"-arch=compute_{number}", "-ptx", "-o", tmp_path / number]
        subprocess.run([*command, ROOT / "csrc" / "cuda" / "packed_float64.cu"], capture_output=True, check=True)
        told.append((tmp_path / number).read_text())
    assert told[0] == told[1].replace(".target sm_90", ".target sm_80")


@pytest.mark.parametrize("unit", UNITS)
def test_no_multiplication_is_contracted(objects: Path, unit: str) -> None:
    """Fused multiply-adds would round once where the CPU kernels round twice. Division and square root are made of
    them, by the assembler; what the compiler hands to it has none, and nothing that the assembler might fuse."""
    command = [cuobjdump(), "-ptx", str(objects / f"csrc_cuda_{unit}.cu.o")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\bmul\.rn\.f", text) and "div.rn.f" in text
    assert ("sqrt.rn.f" in text) == (unit != "finish")
    assert not re.findall(r"\bfma\..*", text)
    assert not re.findall(r"\b(?:mul|add|sub)\.f(?:32|64)\b.*", text), "without .rn it may be fused"
    assert not re.findall(r"\b(?:div|sqrt)\.(?:approx|full).*", text)
    assert ".ftz" not in text


@pytest.mark.parametrize(
    ("record", "name"), [(layout.WORK_RECORD, "work"), (layout.CHUNK_RECORD, "chunk"), (layout.SPAN_RECORD, "span")]
)
def test_records_have_the_compiled_offsets(objects: Path, record: np.dtype, name: str) -> None:
    from aim_kernels import _cuda

    layout = _cuda.layout()
    assert {field: record.fields[field][1] for field in record.names} == layout[name]
    assert record.itemsize == layout[f"{name}_size"]


def test_a_machine_without_a_device_says_so(objects: Path) -> None:
    """The static runtime loads anywhere; a call becomes an exception that names it."""
    import torch

    from aim_kernels import _cuda

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    work = np.zeros(1, layout.WORK_RECORD)
    work["chunk_size"], work["threads"] = 1024, 64
    with pytest.raises(RuntimeError, match=r"CUDA: choice of the device: .*(driver|device).* \(error \d+\)"):
        _cuda.update(work, 0, 0)
    work["threads"] = 48
    with pytest.raises(RuntimeError, match=r"launch of update: invalid argument"):
        _cuda.update(work, 0, 0)
    with pytest.raises(ValueError, match="work"):
        _cuda.update(np.zeros(2, layout.WORK_RECORD), 0, 0)


# -- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("NVCC", "CUDA_HOME", "AIM_KERNELS_CUDA", "AIM_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return setup_module_of(monkeypatch)


def compiler(folder: Path, text: str = "Cuda compilation tools, release 12.4, V12.4.99") -> Path:
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return path


def test_nvcc_is_looked_for_in_order(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, home, on_path = (compiler(tmp_path / name / "bin") for name in ("named", "home", "path"))
    monkeypatch.setenv("PATH", f"{on_path.parent}{os.pathsep}{os.environ['PATH']}")
    assert setup_py.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(home.parent.parent))
    assert setup_py.find_nvcc() == home
    monkeypatch.setenv("NVCC", str(named))
    assert setup_py.choose_nvcc() == (named, "12.4.99")


def test_a_missing_nvcc_is_told_or_an_error(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", str(tmp_path / "nowhere"))
    nvcc, reason = setup_py.choose_nvcc()
    assert nvcc is None and "does not run" in reason
    monkeypatch.setenv("AIM_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="AIM_KERNELS_CUDA=1"):
        setup_py.choose_nvcc()
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="no nvcc was found"):
        setup_py.choose_nvcc()
    monkeypatch.setenv("AIM_KERNELS_CUDA", "0")
    assert setup_py.choose_nvcc() == (None, "not built, as AIM_KERNELS_CUDA=0 asked")
    monkeypatch.setenv("AIM_KERNELS_CUDA", "maybe")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1"):
        setup_py.choose_nvcc()


def test_architectures(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those from 80 to 90 share a PTX."""

    def asked() -> list[str]:
        return [flag.removeprefix("-gencode=arch=compute_") for flag in setup_py.architectures()]

    assert asked() == ["80,code=sm_80", "80,code=sm_90", "80,code=compute_80"]
    monkeypatch.setenv("AIM_KERNELS_CUDA_ARCHS", "100;75")
    assert asked() == ["100,code=sm_100", "75,code=sm_75", "100,code=compute_100"]
    monkeypatch.setenv("AIM_KERNELS_CUDA_ARCHS", "90;86;75")
    assert asked() == ["86,code=sm_90", "86,code=sm_86", "75,code=sm_75", "86,code=compute_86"]
    monkeypatch.setenv("AIM_KERNELS_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match="AIM_KERNELS_CUDA_ARCHS"):
        setup_py.architectures()


@pytest.mark.parametrize(
    ("told", "expected"),
    [("9.0\n", ["sm_90", "compute_90"]), ("9.0\n8.0\n10.0\n9.0\n", ["sm_80", "sm_90", "sm_100", "compute_100"])],
)
def test_architectures_of_the_devices_that_are_there(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, expected: list[str]
) -> None:
    """As the driver's tool tells them; where there is none, as PyTorch does; or an error."""
    monkeypatch.setenv("AIM_KERNELS_CUDA_ARCHS", "native")
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [flag.rpartition("=")[2] for flag in setup_py.architectures()] == expected
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8 + device, 6 - device))
    assert setup_py.native_architectures() == ["86", "95"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit, match="neither nvidia-smi nor PyTorch"):
        setup_py.architectures()


#: Compilers that make empty files. nvcc waits until the core is being compiled, for at most ten seconds.
CXX = """#!/bin/sh
echo "$*" >> "$LOG"
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo 'release 13.0, V13.0.48'; exit; }
[ "$1" = --dryrun ] && { echo "#$ TOP=$TOP" >&2; exit; }
[ -n "$BROKEN" ] && { echo 'error: no such thing'; exit 2; }
for _ in 0 1 2 3 4 5 6 7 8 9; do
  grep -q csrc/cpu/ "$LOG" && { while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done; exit 0; }
  sleep 1
done
exit 1
"""


def built(folder: Path, **settings: str) -> tuple[int, str, set[str], str]:
    """A build of this tree in another place, by such compilers: (status, output, modules made, command of the core's
    binding)."""
    tree = folder / "tree"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "python", "aim_kernels/__init__.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, tree / name)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    for name, text in (("cxx", CXX), ("nvcc", NVCC)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AIM_KERNELS_")}
    paths = {"CXX": str(folder / "cxx"), "NVCC": str(folder / "nvcc"), "TOP": str(folder), "LOG": str(folder / "log")}
    environment = {**clean, **paths, "MAX_JOBS": "40", "PYTHONPATH": "", **settings}
    (folder / "log").touch()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    modules = {path.name.partition(".")[0] for path in (tree / "aim_kernels").glob("*.so")}
    binding = [line for line in (folder / "log").read_text().splitlines() if "python/bindings.cpp " in line]
    return done.returncode, done.stdout + done.stderr, modules, binding[-1]


def test_core_and_kernels_are_compiled_at_the_same_time(tmp_path: Path) -> None:
    status, text, modules, binding = built(tmp_path)
    assert status == 0, text
    assert modules == {"_C", "_cuda"} and '-DAIM_CUDA_BUILD="built"' in binding


def test_kernels_that_do_not_compile_leave_the_core(tmp_path: Path) -> None:
    status, text, modules, binding = built(tmp_path, BROKEN="1")
    assert status == 0, text
    assert modules == {"_C"} and "could not compile the kernels" in binding


def test_kernels_that_do_not_compile_are_an_error_where_they_were_asked_for(tmp_path: Path) -> None:
    status, text, _, _ = built(tmp_path, BROKEN="1", AIM_KERNELS_CUDA="1")
    assert status != 0 and "no such thing" in text


def test_reasons_survive_the_command_line(setup_py: ModuleType, tmp_path: Path) -> None:
    """Quotes of an error message must not end the macro that carries it."""
    text = "it said 'no' and \"never\"\n"
    macro = setup_py.quoted(text).replace("$ ", " ").replace("$:", ":").replace("$$", "$")
    source = tmp_path / "x.py"
    source.write_text("import sys; print(sys.argv[1])")
    told = subprocess.run(
        f"{sys.executable} {source} {macro}", shell=True, capture_output=True, text=True, check=True
    ).stdout
    assert told.strip() == '"it said no and never"'
