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
from aim_kernels.step.layout import DTYPES, MOMENTS

TYPES = {
    **dict.fromkeys(("tensors", "groups", "control", "spans", "phases"), "*i64"),
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
    attributes = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, attributes)
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


#: Everything is compiled for the newest devices, for older ones only these types.
NEWEST, NARROWED = 90, ("float32", "bfloat16")

#: Of what is stored in fewer bytes: storage type, family "other" or not, moments. Those that need the most registers; a
#: compilation takes ten seconds.
GENERAL = (("bfloat16", False, "int8"), ("bfloat16", True, "int8"))


def updated(dtype: str, other: bool, general: bool, moments: str, capability: int) -> dict[str, Any]:
    """``update_kernel`` for such tensors, as the driver has it compiled."""
    number = DTYPES.index(dtype)
    constants = driver.specialization(number, CHUNK, general)
    options = driver.options(constants["BLOCK"], driver.registers_of(number, other, general))
    constants |= {"OTHER": other, "GENERAL": general, "MOMENTS": MOMENTS.index(moments)}
    absent = ("grad_scale", "found_inf") if dtype == "float32" else ()
    return compiled(kernels.update_kernel, constants, options, capability, absent)


def emitted(dtype: str, moments: str, capability: int) -> dict[str, Any]:
    """``emit_kernel`` for such tensors."""
    constants = driver.specialization(DTYPES.index(dtype), CHUNK, moments != "wide")
    options = driver.options(constants["BLOCK"])
    return compiled(kernels.emit_kernel, constants | {"MOMENTS": MOMENTS.index(moments)}, options, capability)


def main(capability: int) -> dict[str, Any]:
    made = {}
    for dtype in DTYPES if capability >= NEWEST else NARROWED:
        made[f"update {dtype}"] = updated(dtype, False, False, "wide", capability)
        made[f"emit {dtype}"] = emitted(dtype, "wide", capability)
    if capability >= NEWEST:  # they take a while
        for dtype in DTYPES:
            made[f"update other {dtype}"] = updated(dtype, True, False, "wide", capability)
        for dtype, other, moments in GENERAL:
            family = "other " if other else ""
            made[f"update general {family}{dtype} {moments}"] = updated(dtype, other, True, moments, capability)
        made["emit general bfloat16 int8"] = emitted("bfloat16", "int8", capability)
    for name, absent in {"primary": ("sums", "found_inf"), "with peers": ("sums",), "away": ("others",)}.items():
        constants, options = {"BLOCK": driver.FINISH_BLOCK}, driver.options(driver.FINISH_BLOCK * 4)
        absent = (*absent, "others") if name == "primary" else absent
        made[f"finish {name}"] = compiled(kernels.finish_kernel, constants, options, capability, absent)
    return made


if __name__ == "__main__":
    json.dump(main(int(sys.argv[1])), sys.stdout)
