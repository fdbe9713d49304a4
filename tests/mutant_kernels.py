"""More of mutant_list.py: arithmetic of the kernels, edits of weights that have a master, frozen parameters."""

from __future__ import annotations

from mutant_list import ELEMENT, Mutant

REFERENCE, TRITON_CHUNK = "aim_kernels/backends/reference.py", "aim_kernels/backends/triton/chunk.py"
SIZES = "test_sizes.py::test_steps_are_those_of_torch"
MEANS = "test_sizes.py::test_means_that_are_not_finite_stay_so"

KERNELS = (
    # -- gradients of every size
    Mutant(
        "square before its factor",
        ELEMENT,
        "(u.second_add * g) * g",
        "(g * g) * u.second_add",
        "the square of 2e19 is infinite in float32, and the element never moves again; torch has the factor first",
        (f"{SIZES}[adamw-cpu]",),
    ),
    Mutant(
        "square before its factor, in Triton",
        TRITON_CHUNK,
        "(second_add * g) * g",
        "(g * g) * second_add",
        "the same",
        (f"{SIZES}[adamw-triton]",),
    ),
    Mutant(
        "square before its factor, in the reference",
        REFERENCE,
        "(g * second[1]) * g",
        "(g * g) * second[1]",
        "the same",
        (f"{SIZES}[adamw-reference]", "test_sizes.py::test_second_moments_stay_finite[lion-reference]"),
    ),
    Mutant(
        "infinity less infinity",
        ELEMENT,
        "below = select(variance != variance, v + (m - m), below);",
        "",
        "centered RMSprop: the weight becomes NaN where torch, which does not round the mean's square, keeps it",
        (f"{SIZES}[rmsprop-centered-cpu]",),
    ),
    Mutant(
        "infinite means pass for finite ones",
        REFERENCE,
        "v + (m - m), spread",
        "v, spread",
        "an infinite gradient would freeze the weight without a trace; torch makes it NaN",
        (f"{MEANS}[reference]",),
    ),
)
