"""More of mutant_list.py: what only a GPU, or the path that leads to one, would show."""

from __future__ import annotations

from mutant_list import Mutant

TRITON = "aim_kernels/backends/triton"
JIT = "test_triton_jit.py::test_every_rule_and_count_is_stepped_by_kernels_compiled_once"
PARTS, TARGETS = "benchmarks/gpu_parts.sh", "test_gpu_targets.py"
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
        "aim_kernels/backends/device.py",
        "        return value.to(device=self.device, dtype=torch.float32, non_blocking=True)",
        "        return value.to(device=self.device, non_blocking=True)",
        "compiled anew, or read as something else, where a scale is no float32",
        (JIT,),
    ),
    # -- what runs on a machine that has one
    Mutant(
        "a part that fails ends the target",
        PARTS,
        "|| failed=1",
        "|| finish 1",
        "one failing test, and nothing is measured",
        (f"{TARGETS}::test_a_part_that_fails_takes_no_other_along[gpu-first-3]",),
    ),
    Mutant(
        "a part that fails is forgotten",
        PARTS,
        "|| failed=1",
        "|| failed=$failed",
        "the target succeeds although nothing did",
        (f"{TARGETS}::test_a_part_that_fails_takes_no_other_along[gpu-bench-0]",),
    ),
    Mutant(
        "a target without a limit",
        PARTS,
        "((seconds > left)) && seconds=$left",
        "true",
        "a machine that is lent for minutes is gone before the results are written",
        (f"{TARGETS}::test_a_part_that_hangs_is_cut_off_and_said_so",),
    ),
    Mutant(
        "the first target that fails is the last",
        "Makefile",
        """|| failed="$$failed $$target"; done""",
        """|| exit 1; done""",
        "the same, between targets",
        (f"{TARGETS}::test_all_of_them_run_whatever_fails",),
    ),
    Mutant(
        "twenty failing tests end the rest",
        "Makefile",
        " -n $(GPU_WORKERS) --durations=10",
        " -n $(GPU_WORKERS) --maxfail=20 --durations=10",
        "one fault of a backend hides what the other can do",
        (f"{TARGETS}::test_tests_are_not_ended_by_a_failure_nor_by_a_warning",),
    ),
    Mutant(
        "a file of GPU tests is not named",
        "Makefile",
        "packed_device.py phases.py",
        "packed_device.py",
        "its tests never run anywhere",
        (f"{TARGETS}::test_every_file_with_tests_for_a_gpu_is_named",),
    ),
    Mutant(
        "kernels for all architectures",
        "Makefile",
        "export AIM_KERNELS_CUDA_ARCHS ?= native",
        "export AIM_KERNELS_CUDA_ARCHS ?= 80;90",
        "twice the time to compile, half of it for devices that are not there",
        (f"{TARGETS}::test_a_target_runs_its_parts_and_names_its_folder[gpu-first]",),
    ),
    Mutant(
        "figures are written when a set is done",
        "aim_kernels/bench/gpu.py",
        "[record.add(line) for line in lines]",
        "[record.add(line) for line in list(lines)]",
        "a crash takes along what was measured",
        (f"{TARGETS}::test_figures_are_written_as_they_come",),
    ),
    Mutant(
        "a page for each process",
        "aim_kernels/bench/gpu_report.py",
        "                    self._before.append(line)",
        "                    pass",
        "figures of the CUDA kernels vanish from the page as soon as Triton's are there",
        (f"{TARGETS}::test_figures_are_written_as_they_come",),
    ),
    Mutant(
        "kernels wait for the core",
        "setup.py",
        "                self.ninja([self.core(), self.kernels()])",
        "                self.ninja([self.kernels()])\n                self.ninja([self.core()])",
        "two builds, one after the other: half a minute of a machine that is lent for minutes",
        ("test_cuda_build.py::test_core_and_kernels_are_compiled_at_the_same_time",),
    ),
)
