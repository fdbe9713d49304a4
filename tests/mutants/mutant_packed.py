"""More of mutant_list.py: moments and weights in fewer bytes. Most of them were there once."""

from __future__ import annotations

from mutant_list import CHECKPOINT, STATES, Mutant

COMPILED, LIVE, PACKING = (
    "aim_kernels/optim/torch_compile.py",
    "aim_kernels/optim/weights.py",
    "aim_kernels/step/codecs.py",
)
IN_TWO = "test_distributed.py::test_scenario"
CONVERTED = "test_packed_checkpoint.py::test_true_weights_are_converted"

PACKED = (
    Mutant(
        "copies of a graph keep their masters' weights",
        LIVE,
        'master = plan.state[stepped]["master"]',
        'master = self.state[p]["master"]',
        "the weights of the step before are placed: the graph has yet to put back those of this one",
        ("test_packed_use.py::test_compiled_and_eager_agree",),
    ),
    Mutant(
        "a graph's new masters lack the rest",
        COMPILED,
        "copy_(true_weights(elsewhere[id(p)], rests[id(p)]))",
        "copy_(elsewhere[id(p)])",
        "the lower half of split weights is lost where live weights begin",
        ("test_packed_use.py::test_compiled_and_eager_agree",),
    ),
    Mutant(
        "options that change reach stepped parameters only",
        "aim_kernels/optim/preparation.py",
        ' or "step" in optimizer.state.get(p, ())]',
        "]",
        "a parameter without a gradient in that step has no remainder in the next",
        (f"{CONVERTED}[False-None-split-option]",),
    ),
    Mutant(
        "masters that no option asks for stay",
        "aim_kernels/optim/preparation.py",
        "            optimizer._weights.leaving.add(number)\n",
        "            pass\n",
        "after master='float32' was taken back the memory is never given back",
        (f"{CONVERTED}[False-float32-split-option]",),
    ),
    Mutant(
        "a remainder is taken for a number",
        CHECKPOINT,
        "            local = local.view(torch.int16)\n",
        "            pass\n",
        "bits that were saved as bfloat16 are converted to whole numbers",
        (f"{IN_TWO}[2-packed_under_fsdp2-int8-split]", f"{IN_TWO}[2-packed_and_flattened-int8-split]"),
    ),
    Mutant(
        "codes move without their exponents",
        "aim_kernels/step/arrangement.py",
        "            if dtype == torch.uint8:\n                # Blocks",
        "            if dtype == torch.int8:\n                # Blocks",
        "blocks go by memory order: after module.to(memory_format=...) moments are other numbers",
        (
            "test_packed_checkpoint.py::test_codes_follow_a_parameter_that_is_laid_out_anew[contiguous-transposed-moved]",
        ),
    ),
    Mutant(
        "codes are loaded without their exponents",
        CHECKPOINT,
        "        if fits and (",
        "        if not fits and (",
        "the same for a checkpoint of a parameter that was laid out, or cut, in another way",
        ("test_packed_checkpoint.py::test_codes_follow_a_parameter_that_is_laid_out_anew[contiguous-transposed-load]",),
    ),
    Mutant(
        "no carry to the next exponent",
        PACKING,
        "(greatest.clamp(max=_INFINITY) + (1 << _SHIFT) - 1) >> 23",
        "greatest.clamp(max=_INFINITY) >> 23",
        "what lies above the greatest code wraps around",
        ("test_packing.py::test_8_bits[first-False]",),
    ),
    Mutant(
        "second moments of zero",
        PACKING,
        "torch.where(magnitude != 0, code.clamp(min=1), code)",
        "code",
        "a root of zero is divided by",
        ("test_packing.py::test_8_bits[second-False]",),
    ),
    Mutant(
        "ties of split weights to even",
        PACKING,
        "upper = torch.where(nan, bits, bits + 0x8000) >> 16",
        "upper = torch.where(nan, bits, bits + 0x7FFF + (bits >> 16 & 1)) >> 16",
        "the remainder of a tie does not fit 16 bits with a sign",
        ("test_packing.py::test_split_is_exact",),
    ),
    Mutant(
        "averages of degraded weights",
        STATES,
        '        master: Tensor = state["master"]\n        return master\n',
        "        pass\n",
        "what a moving average begins with, and a checkpoint is converted from, is what the module holds",
        ("test_packed_use.py::test_averages_begin_with_true_weights",),
    ),
    Mutant(
        "kernels join what does not belong together",
        "csrc/common/packing.h",
        "select(stale, I{}, select(nan, lower, signed_lower))",
        "select(nan, lower, signed_lower)",
        "weights that were set to zero between steps become NaN by their old remainders",
        ("test_packed_use.py::test_weights_that_are_set_to_zero_between_steps",),
    ),
    Mutant(
        "zero redundancy leaves gradients of others",
        "aim_kernels/optim/zero_redundancy.py",
        "        if self.optim.zero_grad_in_step:\n",
        "        if False:\n",
        "the next backward adds to gradients that another process has stepped",
        (f"{IN_TWO}[2-zero_redundancy_clears_and_averages]",),
    ),
)
