"""More of mutant_list.py: arithmetic of the kernels, edits of weights that have a master, frozen parameters."""

from __future__ import annotations

from mutant_list import CHECKPOINT, ELEMENT, OPTIMIZER, PLAN, SHARED, STATES, STEP, Mutant

REFERENCE, TRITON_CHUNK = "aim_kernels/backends/reference.py", "aim_kernels/backends/triton/chunk.py"
TRITON_KERNELS, LIVE, CODEC = (
    "aim_kernels/backends/triton/kernels.py",
    "aim_kernels/optim/weights.py",
    "csrc/cpu/codec.h",
)
FEATURES = "aim_kernels/aim/features.py"
SIZES = "test_sizes.py::test_steps_are_those_of_torch"
MEANS = "test_sizes.py::test_means_that_are_not_finite_stay_so"
EDITS = "test_edits.py::test_edits_between_steps_count"
MEANWHILE = "test_edits.py::test_whatever_happens_before_the_next_step"
FROZEN = "test_frozen.py::test_a_strength_degrades_it_wholly"
TAKEN = "test_edits.py::test_every_kernel_takes_them"

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
    # -- edits of weights that have a master
    Mutant(
        "masters undo edits",
        STEP,
        "if (adopts(tensor, rows[tensor.group])) kernels.adopt(tensor, chunk.begin, chunk.end);",
        "",
        "loaded weights, clipping and new initial values are gone with the next step, as apex's master weights have it",
        (f"{EDITS}[bfloat16-load]", f"{EDITS}[kept-clip]"),
    ),
    Mutant(
        "masters undo edits, in the reference",
        REFERENCE,
        'adopt_edits(p, state["master"])',
        "pass",
        "the same",
        (f"{TAKEN}[bfloat16-adamw-reference]",),
    ),
    Mutant(
        "masters undo edits, in Triton",
        TRITON_KERNELS,
        "if _adopts(tensor, row):",
        "if _adopts(tensor, row) & (size < 0):",
        "the same",
        (f"{TAKEN}[bfloat16-adamw-triton]",),
    ),
    Mutant(
        "degraded weights pass for edits",
        SHARED,
        "row.emitted[kUnder] == 1 &&\n         row.emitted[kWell] == 1",
        "true",
        "the step after a strength was undone takes what the module still holds for the true weights",
        (f"{MEANWHILE}[kept-after_a_strength]",),
    ),
    Mutant(
        "edits of some phases count",
        PLAN,
        "always_has_master(group, p) or tables.keeps_masters(number) or not tables.degrades(number)",
        "True",
        "what is written in a true phase stays, what is written in an auxiliary one is lost",
        ("test_edits.py::test_degraded_weights_are_no_edits",),
    ),
    Mutant(
        "kept masters undo edits",
        PLAN,
        "always_has_master(group, p) or tables.keeps_masters(number) or not tables.degrades(number)",
        "always_has_master(group, p)",
        "the kind, not the example: keep_masters=True has masters while nothing is degraded, too",
        (f"{EDITS}[kept-set_one]",),
    ),
    Mutant(
        "edits cost the rest its lower bits",
        CODEC,
        "master[i] = edited ? widened_one(param[i]) : master[i];",
        "master[i] = edited || true ? widened_one(param[i]) : master[i];",
        "one element was written, and all masters of its chunk are rounded to 16 bits",
        (f"{EDITS}[bfloat16-set_one]",),
    ),
    Mutant(
        "edits in evaluation cost the rest its lower bits",
        STATES,
        "torch.where(edited, here.to(kept.dtype), kept)",
        "here.to(kept.dtype)",
        "the same between eval() and train()",
        ("test_edits.py::test_true_weights_changed_in_evaluation_keep_the_rest",),
    ),
    Mutant(
        "eval() undoes edits",
        LIVE,
        'self.optimizer._refuse_open_step("eval()")\n        self.restore_astray()\n        self.adopt_edits()',
        'self.optimizer._refuse_open_step("eval()")\n        self.restore_astray()',
        "the master is copied over what was written",
        (f"{MEANWHILE}[bfloat16-after_eval]",),
    ),
    Mutant(
        "checkpoints lack edits",
        OPTIMIZER,
        "            self._weights.adopt_edits()\n",
        "            pass\n",
        "the master that is saved is that of before the edit, and a resumed run has it",
        (f"{MEANWHILE}[bfloat16-after_state_dict]",),
    ),
    Mutant(
        "checkpoints of frameworks lack edits",
        "aim_kernels/optim/weights.py",
        "        self.adopt_edits()\n        return dict(self.present())\n",
        "        return dict(self.present())\n",
        "the module's entries are replaced by masters of before the edit",
        (f"{MEANWHILE}[bfloat16-after_a_writer_of_checkpoints]",),
    ),
    Mutant(
        "ties pass for edits",
        STATES,
        "local_of(p).data.copy_(local_of(theta))",
        "pass",
        "split and rounded weights differ where two bfloat16 numbers are as near: half a unit of the master is lost",
        ("test_edits.py::test_a_master_that_takes_over_a_rest_is_no_edit",),
    ),
    Mutant(
        "masters that come in backward move versions",
        STATES,
        "local_of(p).data.copy_(local_of(theta))",
        "local_of(p).detach().copy_(local_of(theta))",
        "the backward that is under way needs the weights, and fails",
        ("test_release.py::test_16_bit_parameters[cpu-kahan]",),
    ),
    # -- frozen parameters
    Mutant(
        "frozen weights are under-optimized",
        SHARED,
        "if (is_frozen(tensor)) shared.u.live[kUnder] = live[kWell];",
        "",
        "what has never been stepped has no class but the first one: a strength changes nothing, and nobody says so",
        (f"{FROZEN}[adamw-cpu]",),
    ),
    Mutant(
        "frozen weights are under-optimized, in Triton",
        TRITON_CHUNK,
        "live_under = tl.where(frozen, live_well, live_under)",
        "live_under = tl.where(frozen, live_under, live_under)",
        "the same",
        (f"{FROZEN}[adamw-triton]",),
    ),
    Mutant(
        "frozen weights are under-optimized, in the reference",
        REFERENCE,
        "return (live[1], live[1]) if",
        "return (live[0], live[0]) if",
        "the same",
        (f"{FROZEN}[adamw-reference]",),
    ),
    Mutant(
        "frozen weights answer by features as they are",
        FEATURES,
        "under: Tensor | None = torch.zeros_like(p, dtype=torch.bool)",
        "under: Tensor | None = torch.ones_like(p, dtype=torch.bool)",
        "the same where the forward pass mixes",
        ("test_frozen.py::test_a_frozen_encoder_is_held_back_by_aim[features]",),
    ),
    Mutant(
        "neighbours of a frozen weight share its class",
        STEP,
        " && frozen == other.frozen;",
        ";",
        "what the elements of a tensor share is kept from one tensor to the next of the same age and rule",
        ("test_frozen.py::test_what_has_not_been_stepped_beside_it",),
    ),
    Mutant(
        "frozen weights are withdrawn to themselves",
        "aim_kernels/optim/preparation.py",
        'optimizer.state[p] = {"master": master_of(p)}',
        'optimizer.state[p] = {"master": master_of(p), "anchor": master_of(p)}',
        "with anchor='init' a strength changes nothing again",
        ("test_frozen.py::test_anchors_of_its_own_weights_are_zero[init]",),
    ),
    Mutant(
        "frozen weights keep moments",
        STATES,
        'return "step" not in state and (not p.requires_grad or "master" in state)',
        "return False",
        "as before: moments that nothing ever moves, and a step count of zero that makes everything under-optimized",
        (f"{FROZEN}[adamw-cpu]",),
    ),
    Mutant(
        "thawed weights lose their class at once",
        STATES,
        'return "step" not in state and (not p.requires_grad or "master" in state)',
        'return "step" not in state and not p.requires_grad',
        "whether a plan is built anew between thawing and the first gradient would decide what the module holds",
        ("test_frozen.py::test_thawing_alone_changes_nothing",),
    ),
    Mutant(
        "checkpoints lose frozen masters",
        CHECKPOINT,
        'if name != "anchor"}:  # frozen, or of others',
        'if name not in ("anchor", "master")}:',
        "a resumed run takes the degraded weights for the true ones",
        ("test_frozen.py::test_resumed_bit_for_bit",),
    ),
    Mutant(
        "checkpoints thaw",
        CHECKPOINT,
        'state.keys() - {"anchor", "master"}',
        'state.keys() - {"anchor"}',
        "a master alone gets a step count of one and moments of zero",
        ("test_frozen.py::test_resumed_bit_for_bit",),
    ),
    Mutant(
        "frozen masters stay for good",
        STATES,
        'return always_has_master(group, p) and "step" in state',
        "return always_has_master(group, p)",
        "a strength that is undone leaves a copy of the frozen encoder behind",
        ("test_frozen.py::test_every_type[float16-options4-cpu]",),
    ),
)
