"""Bugs to plant: for each the text it replaces, why anybody would write it, and the tests that are to catch it.

Most are bugs that other optimizers had, or have. ``mutants.py`` plants them one at a time and runs the tests;
``test_mutants.py`` sees to it that the list still fits the sources.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old`` stands exactly once in ``file``; ``new`` takes its place. ``tests`` are pytest node ids below tests/."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


PLAN, OPTIMIZER, STATES = "aim_kernels/step/plan.py", "aim_kernels/optim/optimizer.py", "aim_kernels/step/states.py"
CHECKPOINT, CHECKS, LAUNCH = (
    "aim_kernels/optim/checkpoint.py",
    "aim_kernels/step/validation.py",
    "aim_kernels/backends/device.py",
)
BINDING, WATCH = "python/bindings.cpp", "python/watch.cpp"
STEP, CHUNK = "csrc/cpu/step.cpp", "csrc/cpu/update.h"
ELEMENT, SHARED, SETUP = "csrc/common/element.h", "csrc/common/shared.h", "setup.py"

MOVED = "test_contract.py::test_whatever_moves_between_steps_is_noticed"
SIZES = "test_layouts.py::test_sizes_1_to_70[adamw-float32]"
LOCK_STEP = "test_trajectory.py::test_lock_step"
ISAS = "test_native.py::test_instruction_sets_agree_bit_for_bit[avx2]"

MUTANTS = (
    # -- memory that moves, layouts
    Mutant(
        "stale parameter pointer",
        WATCH,
        "if (!is_as_seen(p, seen_[i])) return false;",
        "",
        "a table of addresses is kept although parameter.data was replaced: the update goes to freed memory",
        (f"{MOVED}[replace_data-cpu]",),
    ),
    Mutant(
        "stale state pointer",
        WATCH,
        "if (!same_groups() || !same_states()) return false;",
        "if (!same_groups()) return false;",
        "the same for a state that somebody replaced, as loaders of checkpoints do",
        (f"{MOVED}[replace_moment-cpu]", f"{MOVED}[replace_master-cpu]"),
    ),
    Mutant(
        "copy without copying back",
        PLAN,
        "self.params[index].copy_(self.staged[index])",
        "self.params[index].contiguous().copy_(self.staged[index])",
        "DeepSpeed cpu_adam_impl.cpp: params.contiguous(), stepped in place, thrown away",
        ("test_layouts.py::test_parameter_layouts[sliced-ones]",),
    ),
    Mutant(
        "staging buffer not loaded",
        PLAN,
        "self.staged[index].copy_(self.params[index])",
        "pass",
        "the copy of the first step is stepped on, whatever was written to the parameter since",
        ("test_layouts.py::test_parameter_layouts[sliced-ones]",),
    ),
    Mutant(
        "gradient strides ignored",
        PLAN,
        "same = grad.is_contiguous() if flat else grad.stride() == p.stride()",
        "same = True",
        "torch's own fused CPU kernels (pytorch#106951 and after): silently wrong where the layouts differ",
        ("test_torch_parity.py::test_gradient_strides_differ_from_parameter_strides[transposed-contiguous]",),
    ),
    Mutant(
        "order of states ignored",
        "aim_kernels/step/arrangement.py",
        "return state.is_contiguous() if p.is_contiguous() or not fills_block(p) else state.stride() == p.stride()",
        "return True",
        "moments keep the memory order of a parameter that was laid out anew (channels_last)",
        (f"{MOVED}[change_layout-cpu]",),
    ),
    Mutant(
        "states are not arranged for a plan",
        "aim_kernels/optim/optimizer.py",
        "        arrange_all(sources)\n",
        "",
        "a plan only reads states: what is in another type or order has to be arranged before it is made",
        (f"{MOVED}[change_layout-cpu]",),
    ),
    Mutant(
        "empty tensor last drops the step",
        PLAN,
        'return bool(self.records["grad"].any())',
        'return bool(self.records["grad"].any()) and bool(self.records["numel"][-1])',
        "TransformerEngine#3207: an empty tensor in the last place of the table, and nothing was updated",
        ("test_layouts.py::test_empty_tensors_anywhere[3]",),
    ),
    Mutant(
        "gradients kept alive",
        PLAN,
        "self.grads = [None] * len(self.params)",
        "pass",
        "a cached list of gradients doubles their memory during the next backward",
        ("test_contract.py::test_gradients_are_not_kept_alive",),
    ),
    # -- what autograd is told
    Mutant(
        "no version bump",
        PLAN,
        "increment_version([*changed, *self._written])",
        "increment_version([])",
        "torch's fused kernels, Liger-Kernel#272: backward over an old graph takes the new weights without an error",
        ("test_contract.py::test_backward_over_an_old_graph_is_an_error",),
    ),
    Mutant(
        "no version bump of states",
        PLAN,
        "[*changed, *self._written]",
        "[*changed]",
        "the same for who differentiates through moments",
        ("test_contract.py::test_version_counters_of_parameters_and_states",),
    ),
    Mutant(
        "no version bump of emitted weights",
        PLAN,
        'touched = (self.records["grad"] != 0) | (self.records["master"] != 0)',
        'touched = self.records["grad"] != 0',
        "a parameter without a gradient is written too where it has live weights",
        ("test_contract.py::test_version_counter_of_a_parameter_that_is_only_emitted",),
    ),
    # -- the contract of step()
    Mutant(
        "closure without gradients",
        OPTIMIZER,
        "with torch.enable_grad():",
        "with torch.set_grad_enabled(torch.is_grad_enabled()):",
        "apex, DeepSpeed: the closure is called bare",
        ("test_contract.py::test_closure_runs_once_with_gradients_enabled",),
    ),
    Mutant(
        "a skipped step counts",
        OPTIMIZER,
        "if not backend.ON_DEVICE and inputs.is_skipped():",
        "if False:",
        "pytorch#95781: found_inf is ignored, step counts move on a step that GradScaler skips",
        ("test_scaling.py",),
    ),
    Mutant(
        "hyperparameters read once",
        PLAN,
        "if given == self._hyperparameters[number] and number not in self._in_tensors:",
        "if self._hyperparameters[number] is not None:",
        "a learning rate compiled or cached in the first step: schedulers have no effect",
        (f"{MOVED}[change_lr-cpu]", "test_schedulers.py"),
    ),
    Mutant(
        "a pool of threads after a fork",
        "aim_kernels/backends/cpu.py",
        "return _torch_thread_pool() if os.getpid() == _PROCESS else None",
        "return _torch_thread_pool()",
        "pytorch#19996, LightGBM#4751: the child waits for threads that the fork did not copy",
        ("test_native.py::test_a_forked_child_steps_on_its_own",),
    ),
    Mutant(
        "masters outlive their rows",
        "aim_kernels/optim/weights.py",
        'return any("master" in state and not keeps_master(group, p, state) for p, state in states)',
        "return False",
        "memory that grows with every block that was degraded once",
        ("test_live.py::test_masters_go_when_the_rows_are_one_again[float32]",),
    ),
    # -- checkpoints
    Mutant(
        "state cast on load",
        CHECKPOINT,
        "made = torch.empty_like(local, dtype=stored_dtype,",
        "made = torch.empty_like(local, dtype=p.dtype,",
        "pytorch#43706: float32 moments of 16-bit parameters rounded by load_state_dict",
        ("test_checkpoint.py::test_state_dtypes_are_kept_on_load[bfloat16]",),
    ),
    Mutant(
        "loading aliases",
        CHECKPOINT,
        "state[key] = _empty_state(p, key, value.dtype)",
        "state[key] = value",
        "pytorch#196083: two optimizers step one tensor",
        ("test_checkpoint.py::test_loading_does_not_alias",),
    ),
    Mutant(
        "masters not saved",
        CHECKPOINT,
        'for number, group in enumerate(state_dict["param_groups"]):',
        'state_dict["state"] = {k: {n: t for n, t in s.items() if n != "master"} for k, s in '
        'state_dict["state"].items()}\n    for number, group in enumerate(state_dict["param_groups"]):',
        "a resumed run takes degraded weights for true ones",
        ("test_checkpoint.py::test_resume_is_bit_for_bit[adamw-all-float32]",),
    ),
    Mutant(
        "tables not saved",
        CHECKPOINT,
        "group.update(tables.to_lists(number))",
        "pass",
        "thresholds, phases and noise start anew in a resumed run",
        ("test_checkpoint.py::test_resume_is_bit_for_bit[adamw-all-float32]",),
    ),
    Mutant(
        "anchors lost on load",
        CHECKPOINT,
        'values | ({"anchor": anchors[p]} if p in anchors else {})',
        "values",
        "a checkpoint of torch.optim has no anchors; those of the construction must stay",
        ("test_hooks.py::test_anchors_stay_where_a_checkpoint_has_none",),
    ),
    # -- what is refused
    Mutant(
        "gradients not looked at",
        OPTIMIZER,
        "validation.check_gradients(self.param_groups)",
        "pass",
        "flashoptim, bitsandbytes, HeavyBall: sparse gradients reach the kernel",
        ("test_errors.py::test_bad_gradients_change_nothing",),
    ),
    Mutant(
        "NaN passes for a number",
        CHECKS,
        "if not (low <= number < high if high_open else low <= number <= high):",
        "if number < low or number > high or (high_open and number == high):",
        "every comparison with NaN is false",
        ("test_errors.py::test_options",),
    ),
    Mutant(
        "blocks share a parameter",
        CHECKS,
        "if id(p) in earlier:",
        "if False:",
        "torch's own message does not say which parameter it is",
        ("test_errors.py::test_repeated_parameters",),
    ),
    Mutant(
        "tables of any size",
        BINDING,
        " || array.size() != wanted) {",
        ") {",
        "written past their end",
        ("test_native.py::test_tables_of_another_size_or_type_are_refused",),
    ),
    Mutant(
        "a watch that trusts its lists",
        WATCH,
        "if (!PyDict_Check(state) || !PyList_Check(names) || !PyList_Check(values)) return false;",
        "if (!PyDict_Check(state)) return false;",
        "the fast macros of CPython look at nothing",
        ("test_binding.py::test_any_arguments_work_or_raise",),
    ),
    Mutant(
        "copies with the arrays of the original",
        "aim_kernels/step/tables.py",
        'return {**self.__dict__, "_arrays": None}',
        "return dict(self.__dict__)",
        "pytorch#10906 and its like: a copy that writes where nobody reads",
        ("test_checkpoint.py::test_copies_go_on_as_the_original_and_alone",),
    ),
    # -- chunks, tails, threads, instruction sets
    Mutant(
        "32-bit chunks",
        LAUNCH,
        "counts = -(-numel // chunk_size)",
        "counts = -(-numel.astype(np.int32) // chunk_size)",
        "DeepSpeed#7640, apex#1825: weights beyond 2^31 elements silently never updated",
        ("test_launch.py::test_a_tensor_of_more_than_2_to_the_31_elements_is_covered",),
    ),
    Mutant(
        "32-bit element index",
        CHUNK,
        "const uint64_t index = static_cast<uint64_t>(first + i);",
        "const uint64_t index = static_cast<uint32_t>(first + i);",
        "the same in the noise: elements 2^32 apart draw the same",
        ("test_native.py::test_noise_of_elements_beyond_32_bits",),
    ),
    Mutant(
        "tail not stepped",
        CHUNK,
        "if (rest) {",
        "if (rest > 1) {",
        "pytorch#191763 the other way round: the vector body is right, the tail is not",
        (SIZES,),
    ),
    Mutant(
        "padding counted",
        CHUNK,
        "add(sums, rest, tile);",
        "add(sums, kLanes, tile);",
        "the lanes beyond the last element count as under-optimized",
        (SIZES,),
    ),
    Mutant(
        "shares of threads overlap",
        "csrc/cpu/parallel.h",
        "region.shares[k].end = count * (k + 1) / threads;",
        "region.shares[k].end = count * (k + 1) / threads + (k + 1 < threads);",
        "two threads step the same elements: a race, and one step too many",
        ("test_core.py::test_core_under_the_thread_sanitizer",),
    ),
    Mutant(
        "FMA contraction",
        SETUP,
        "-fvisibility=hidden -ffp-contract=off",
        "-fvisibility=hidden -ffp-contract=fast",
        "DeepSpeed cpu_adam_impl.cpp:404: a vector path with FMA beside a scalar one without",
        (ISAS,),
    ),
    Mutant(
        "approximate square root",
        "csrc/cpu/vector.h",
        "return (FloatVector)_mm256_sqrt_ps((__m256)x);",
        "return (FloatVector)_mm256_mul_ps((__m256)x, _mm256_rsqrt_ps((__m256)x));",
        "one instruction set is faster than the others, and another optimizer",
        (ISAS,),
    ),
    Mutant(
        "16-bit storage truncates",
        "csrc/common/convert.h",
        "const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);",
        "const uint32_t rounded = bits;",
        "the upper half of a float32 is a bfloat16, but rounded toward zero: weights drift",
        (f"{LOCK_STEP}[adamw-ones-bfloat16]",),
    ),
    # -- arithmetic
    Mutant(
        "step count of the group",
        STEP,
        "steps == other.steps && ",
        "",
        "apex: one bias correction for a group whose parameters are not of one age",
        ("test_contract.py::test_step_counts_are_kept_for_each_parameter",),
    ),
    Mutant(
        "decay after the step",
        ELEMENT,
        "theta = theta * u.decay - delta;",
        "theta = (theta - delta) * u.decay;",
        "what was subtracted decays too",
        ("test_torch_parity.py::test_a_few_ulp_a_step[adamw-float32-cpu]",),
    ),
    Mutant(
        "eps inside the root",
        ELEMENT,
        "square_root(below) + u.eps",
        "square_root(below + u.eps * u.eps)",
        "TensorFlow's reading of Adam",
        ("test_torch_parity.py::test_a_few_ulp_a_step[adamw-float32-cpu]", f"{LOCK_STEP}[adam-maximize-ones-float32]"),
    ),
    Mutant(
        "old class from new moments",
        ELEMENT,
        "select(is_under(m, v, u.old_c_v, u.old_c_0), u.grad[0], u.grad[1])",
        "select(is_under(m * u.first_keep + g * u.first_add, v, u.old_c_v, u.old_c_0), u.grad[0], u.grad[1])",
        "the gradient belongs to live weights that were made with the old moments",
        (f"{LOCK_STEP}[adamw-grad-float32]",),
    ),
    Mutant(
        "a held block fades",
        SHARED,
        "u->decay = u->first_keep = u->second_keep = u->extra_keep = 1;",
        "u->decay = u->first_keep = u->extra_keep = 1;",
        "moments that fade move the classes of a block that learns nothing",
        ("test_phases.py::test_a_held_block_stays_as_it_is[cpu-adamw-4]",),
    ),
    Mutant(
        "a held block ages",
        SHARED,
        "const double t = held ? steps_taken : steps_taken + 1;",
        "const double t = steps_taken + 1;",
        "its classes would be those of older moments",
        (f"{LOCK_STEP}[adamw-held-float32]",),
    ),
    Mutant(
        "tau instead of tau_prev",
        SHARED,
        "boundary(group, old, row.tau_prev, &u.old_c_v, &u.old_c_0);",
        "boundary(group, old, row.tau, &u.old_c_v, &u.old_c_0);",
        "the threshold has moved since the live weights were made",
        (f"{LOCK_STEP}[adamw-grad-float32]",),
    ),
    Mutant(
        "fisher decided by the first moment",
        SHARED,
        "inline constexpr double kSteep = 0x1p80;",
        "inline constexpr double kSteep = 0x1p20;",
        "the class would go by both moments, near the boundary",
        ("test_measures.py::test_fisher_goes_by_the_second_moment_alone[cpu-dtype0]",),
    ),
    Mutant(
        "withdrawn to the average of the step before",
        "csrc/cpu/update.h",
        "if (live && tensor.anchor == tensor.ema) {",
        "if (false) {",
        "emit would find another average and write other live weights",
        ("test_measures.py::test_weights_are_withdrawn_to_their_average[cpu-rmsprop-momentum-options3]",),
    ),
    Mutant(
        "a pass that does not count lets NaN through",
        "aim_kernels/aim/mixing.py",
        "return torch.zeros_like if factor == 0.0 else lambda grad: grad * factor",
        "return lambda grad: grad * factor",
        "infinity times zero; in half precision one pass may overflow and the other not",
        ("test_split.py::test_what_overflows_in_a_pass_that_does_not_count",),
    ),
    Mutant(
        "live weights are not put back after a skipped step",
        "aim_kernels/optim/weights.py",
        "if self.in_true_pass:",
        "if False:",
        "the next auxiliary pass would see true weights",
        ("test_split.py::test_accumulated_and_repeated_passes_see_the_same_weights",),
    ),
    Mutant(
        "threshold not clipped",
        SHARED,
        "row->tau = moved < 0 ? 0 : moved > 1 ? 1 : moved;",
        "row->tau = moved;",
        "a controller that winds up",
        ("test_trajectory.py::test_threshold_controller_at_its_limits",),
    ),
    Mutant(
        "gradient columns not latched",
        SHARED,
        "copy(row->phases[next].grad, row->grad);",
        "copy(row->phases[0].grad, row->grad);",
        "the gradient of auxiliary live weights is treated as that of true ones",
        (f"{LOCK_STEP}[adamw-alternate-float32]",),
    ),
    Mutant(
        "dampening on the first step",
        SHARED,
        "u.first_add = t > 1 ? 1 - group.dampening : 1;",
        "u.first_add = 1 - group.dampening;",
        "the first momentum buffer is the gradient itself",
        (f"{LOCK_STEP}[sgd-dampening-ones-float32]",),
    ),
    Mutant(
        "noise by the index in the tensor",
        CHUNK,
        "draw_noise(shared, tensor.first + at, count, noise_buffer)",
        "draw_noise(shared, at, count, noise_buffer)",
        "all tensors draw the same noise",
        ("test_phases.py::test_noise_is_philox_and_box_muller[dtype0-cpu]", f"{LOCK_STEP}[adamw-noise-float32]"),
    ),
    Mutant(
        "infinities not counted",
        CHUNK,
        "into.nonfinite += g - g != T{0};",
        "into.nonfinite += g != g;",
        "NaN only",
        ("test_property.py::test_odd_values_stay_where_they_are",),
    ),
    # -- devices, on the processor
    Mutant(
        "records not sent again",
        LAUNCH,
        "if content != self._sent or capturing(self.device):",
        'if self._sent == b"" or capturing(self.device):',
        "a device that goes on with the addresses and learning rates of the first step",
        ("test_device_step.py::test_oracle_in_lock_step[triton-adamw-ones]",),
    ),
    Mutant(
        "CUDA counts parameters without gradients",
        "csrc/cuda/finish.cu",
        "if (work.tensors[i].grad && !held) *work.tensors[i].step += 1;",
        "if (!held) *work.tensors[i].step += 1;",
        "DeepSpeed FusedAdam the other way round: one count for all parameters of a group",
        ("test_device_step.py::test_the_bits_of_the_cpu_kernels[cuda-adamw-chain-float32]",),
    ),
    Mutant(
        "CUDA forgets a group without gradients",
        "csrc/cuda/finish.cu",
        "if (sums.numel > 0) work.statistics[group] = sums;",
        "work.statistics[group] = sums;",
        "the deviation of its noise would be that of nothing",
        ("test_device_step.py::test_groups_without_gradients_keep_their_statistics[cuda]",),
    ),
    Mutant(
        "Triton truncates 16-bit storage",
        "aim_kernels/backends/triton/packing.py",
        "rounded = bits + 0x7FFF + ((bits >> 16) & 1)",
        "rounded = bits",
        "one backend rounds as the others do not",
        ("test_triton.py::test_emission_rounds_as_the_cpu_does[bfloat16]",),
    ),
    # -- slow to catch: 11 GiB, a minute
    Mutant(
        "32-bit end of a chunk",
        STEP,
        "const int64_t end = numel - begin < kChunk ? numel : begin + kChunk;",
        "const int64_t end = static_cast<int32_t>(numel - begin < kChunk ? numel : begin + kChunk);",
        "the same in the driver",
        ("test_huge.py",),
    ),
)
