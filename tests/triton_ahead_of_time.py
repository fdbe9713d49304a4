"""Compiles the Triton kernels for an NVIDIA GPU that need not be there, and prints what came of it as JSON.

Run as a program, with TRITON_INTERPRET unset: `python triton_ahead_of_time.py 90`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aim_kernels.backends.triton import CHUNK, driver, kernels
from aim_kernels.rows import DTYPES

TYPES = {
    **dict.fromkeys(("tensors", "groups", "control", "spans", "following"), "*i64"),
    **dict.fromkeys(("rows", "statistics", "partials", "sums", "others"), "*fp64"),
    **dict.fromkeys(("grad_scale", "found_inf"), "*fp32"),
    "chunks": "*i32",
    **dict.fromkeys(("chunk_count", "others_count"), "i32"),
}


def compiled(
    function: Any, constants: dict[str, Any], options: dict[str, Any], capability: int, absent: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What a kernel is made of; arguments in ``absent`` are None."""
    constants = constants | dict.fromkeys(absent)
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in function.arg_names}
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, places)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    accesses = re.findall(r"\b(?:ld|st)\.global[\w.]*", ptx)
    return {
        "accesses": {name: accesses.count(name) for name in sorted(set(accesses))},
        "in_local_memory": re.findall(r"\b(?:ld|st)\.local\S*|\.local\b", ptx),
        "contracted": re.findall(r"\bfma\.\S*", ptx),
        "approximate": re.findall(r"\b\w+\.(?:approx|full|ftz)\S*", ptx),
        **{name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)},
    }


def main(capability: int) -> dict[str, Any]:
    made = {}
    for number, dtype in enumerate(DTYPES):
        constants = driver.specialization(number, CHUNK)
        options = driver.options(constants["BLOCK"], driver.REGISTERS[dtype])
        absent = ("grad_scale", "found_inf") if dtype == "float32" else ()
        main = constants | {"OTHER": False}
        made[f"update {dtype}"] = compiled(kernels.update_kernel, main, options, capability, absent)
        options = driver.options(constants["BLOCK"], driver.OTHER_REGISTERS[dtype])
        other = constants | {"OTHER": True}
        made[f"update other {dtype}"] = compiled(kernels.update_kernel, other, options, capability, absent)
        options = driver.options(constants["BLOCK"])
        made[f"emit {dtype}"] = compiled(kernels.emit_kernel, constants, options, capability)
    for name, absent in {"home": ("sums", "found_inf"), "with others": ("sums",), "away": ("others",)}.items():
        constants, options = {"BLOCK": driver.FINISH_BLOCK}, driver.options(driver.FINISH_BLOCK * 4)
        absent = (*absent, "others") if name == "home" else absent
        made[f"finish {name}"] = compiled(kernels.finish_kernel, constants, options, capability, absent)
    return made


if __name__ == "__main__":
    json.dump(main(int(sys.argv[1])), sys.stdout)
