"""More of mutant_list.py: what only a GPU, or the path that leads to one, would show."""

from __future__ import annotations

from mutant_list import Mutant

TRITON = "aim_kernels/backends/triton"
JIT = "test_triton_jit.py::test_every_rule_and_count_is_stepped_by_kernels_compiled_once"
GLOBALS = "test_triton_jit.py::test_globals_of_kernels_are_constants_that_equal_themselves"

GPU = (
    Mutant(
        "a constant that differs from itself",
        f"{TRITON}/uniforms.py",
        "_STEEP = tl.constexpr(2.0**80)",
        '_STEEP = tl.constexpr(float("nan"))',
        "Triton compares the globals of a kernel before every launch, and NaN is no NaN: no step is ever taken",
        (f"{GLOBALS}[_boundary]",),
    ),
    Mutant(
        "a constant that differs from itself, launched",
        f"{TRITON}/layout.py",
        'LION = tl.constexpr(RULES.index("lion"))',
        'LION = tl.constexpr(float("nan"))',
        "the same, found by a launch",
        (JIT,),
    ),
    Mutant(
        "a plain number as a global",
        f"{TRITON}/uniforms.py",
        "_STEEP = tl.constexpr(2.0**80)",
        "_STEEP = 2.0**80",
        "the interpreter takes it, the compiler does not",
        (JIT, f"{GLOBALS}[_boundary]"),
    ),
    Mutant(
        "a kernel for every number of chunks",
        f"{TRITON}/kernels.py",
        '@triton.jit(do_not_specialize=("chunk_count",), ',
        "@triton.jit(",
        "Triton makes a constant of 1 and tells multiples of 16 from others: compiled anew as parameters come and go",
        (JIT,),
    ),
    Mutant(
        "a kernel for every number of devices",
        f"{TRITON}/kernels.py",
        '@triton.jit(do_not_specialize=("others_count",), ',
        "@triton.jit(",
        "the same for devices",
        (JIT,),
    ),
    Mutant(
        "a kernel for every alignment of the tables",
        f"{TRITON}/kernels.py",
        '    *("sums", "others", "grad_scale", "found_inf"),\n',
        '    *("sums", "others", "grad_scale"),\n',
        "compiled anew where GradScaler's finding lies elsewhere",
        (JIT,),
    ),
    Mutant(
        "an option that Triton does not know",
        f"{TRITON}/driver.py",
        '{"maxnreg": registers}',
        '{"max_registers": registers}',
        "the interpreter ignores what it does not know",
        (JIT,),
    ),
    Mutant(
        "scales of any type",
        "aim_kernels/launch.py",
        "        return value.to(device=self.device, dtype=torch.float32, non_blocking=True)",
        "        return value.to(device=self.device, non_blocking=True)",
        "compiled anew, or read as something else, where a scale is no float32",
        (JIT,),
    ),
)
