"""Bugs to plant: memory, states and groups that change behind the optimizer's back. Most of them were there once."""

from __future__ import annotations

from mutant_list import CHECKS, OPTIMIZER, PLAN, STATES, WATCH, Mutant

TABLES = "aim_kernels/tables.py"
RESETS, SUPPORTED, OVERLAP = "aim_kernels/resets.py", "aim_kernels/supported.py", "aim_kernels/overlap.py"
MOVES = "test_binding.py::test_a_watch_notices_whatever_moves"
RESET = "test_resets.py::test_a_reset_leaves_the_true_weights_in_the_module"
ANY = "test_any_parameter.py::test_a_frozen_parameter_of_any_kind_is_left_alone"

PLAN_BUGS = (
    Mutant(
        "sizes are not looked at",
        WATCH,
        "           std::equal(shape.begin(), shape.end(), sizes) && !ask.strides(tensor, &steps) &&\n",
        "           !ask.strides(tensor, &steps) &&\n",
        "a parameter is cut where it lies: the kernel writes past its end",
        (
            f"{MOVES}[quick]",
            "test_memory.py::test_a_parameter_of_another_size_at_the_same_address_is_refused_until_its_state_is_new",
        ),
    ),
    Mutant(
        "types are not looked at",
        WATCH,
        "!ask.dtype(tensor, &type) && type == dtype &&",
        "!ask.dtype(tensor, &type) &&",
        "a parameter is viewed as another type where it lies",
        (f"{MOVES}[quick]", "test_memory.py::test_a_parameter_of_another_type_at_the_same_address_is_noticed"),
    ),
    Mutant(
        "states are known by their objects alone",
        WATCH,
        "if (kept && states_seen_[at].is(*functions_, kept)) continue;",
        "if (kept) continue;",
        "state.data = ... gives other memory to the same object: the kernel goes on in the old one",
        (f"{MOVES}[quick]", "test_memory.py::test_any_state_that_is_given_other_memory_is_read_there"),
    ),
    Mutant(
        "states are looked at without their strides",
        WATCH,
        "           lies_as(other.strides);",
        "           true;",
        "a state that was transposed where it lies is read in the wrong order",
        (f"{MOVES}[by methods]",),
    ),
    Mutant(
        "a negated gradient is read as it lies",
        WATCH,
        "                    is_negative(local.ptr());",
        "                    false;",
        "torch's lazy negative bit is ignored: one-element parameters of complex models go uphill",
        (
            "test_memory.py::test_a_gradient_that_is_negated_when_it_is_read",
            "test_memory.py::test_one_element_of_a_complex_model_goes_downhill",
        ),
    ),
    Mutant(
        "a gradient without memory is read",
        PLAN,
        "            if not has_memory(grad):\n                return False\n",
        "",
        "a gradient whose storage was freed is read at address 8",
        ("test_memory.py::test_a_gradient_whose_storage_was_freed_is_refused[False]",),
    ),
    Mutant(
        "zeros without memory are read",
        PLAN,
        "plain = not (grad.is_neg() or grad._is_zerotensor())",
        "plain = not grad.is_neg()",
        "a ZeroTensor has no address",
        ("test_memory.py::test_a_gradient_of_zeros_without_memory_is_read_as_zeros[adamw-cpu]",),
    ),
    Mutant(
        "parameters that share memory race",
        OVERLAP,
        "    if not pairs:\n",
        "    if pairs:\n",
        "threads step the same elements at the same time, from the same old values",
        ("test_memory.py::test_parameters_over_one_memory_take_turns[same-adamw-cpu]",),
    ),
    Mutant(
        "turns in any order",
        OVERLAP,
        "wave[later] = max(wave[later], wave[first] + 1)",
        "wave[later] = 1",
        "the third of three parameters over one memory is stepped with the second",
        ("test_memory.py::test_parameters_over_one_memory_take_turns[three-adamw-cpu]",),
    ),
    Mutant(
        "a shared gradient is cleared by its first reader",
        PLAN,
        '            records["zero_grad"][list(pair)] = 0\n',
        "            pass\n",
        "zero_grad_in_step leaves zeros for the parameters that come later",
        ("test_memory.py::test_a_gradient_of_several_parameters_is_cleared_after_all_have_read_it[one tensor-cpu]",),
    ),
    Mutant(
        "small states share a storage",
        STATES,
        ".set_(own.untyped_storage(), 0, shape))",
        ".view(shape))",
        "who saves the state of one parameter saves those of all",
        ("test_memory.py::test_the_state_of_one_parameter_takes_its_own_bytes",),
    ),
    Mutant(
        "a reset loses the true weights",
        RESETS,
        '        gone = [p for p in self._kept if "master" not in state.get(p, ())]\n',
        "        gone: list[Tensor] = []\n",
        "the degraded weights in the module are taken for the true ones",
        (f"{RESET}[cleared-eval]", f"{RESET}[emptied-step]"),
    ),
    Mutant(
        "a reset undoes what was loaded",
        RESETS,
        "            true = torch.where((here == live) | (here.isnan() & live.isnan()), true, here)\n",
        "",
        "weights that were loaded around the reset are overwritten by the old ones",
        ("test_resets.py::test_weights_that_are_loaded_around_a_reset_are_kept",),
    ),
    Mutant(
        "rows stay where they were",
        TABLES,
        "        return len(groups) == len(self.groups) and all(map(operator.is_, groups, self.groups))\n",
        "        return len(groups) == len(self.groups)\n",
        "a group that moves in the list takes over the strengths of another block",
        ("test_resets.py::test_rows_follow_their_groups",),
    ),
    Mutant(
        "copied groups begin anew",
        TABLES,
        'by_dict.get(id(group), by_params.get(_identities(group)) if group["params"] else None)',
        "by_dict.get(id(group))",
        "frameworks that copy groups reset the thresholds",
        ("test_resets.py::test_rows_follow_their_groups[assign_copies]",),
    ),
    Mutant(
        "a group that was taken out is forgotten",
        TABLES,
        "        known = [*held, *self._away]\n",
        "        known = [*held]\n",
        "it comes back without its row",
        ("test_resets.py::test_a_group_that_was_taken_out_finds_its_row_when_it_comes_back",),
    ),
    Mutant(
        "the plan knows parameters but no groups",
        WATCH,
        "if (group != item(groups_, number) || !PyDict_Check(group)) return false;",
        "if (!PyDict_Check(group)) return false;",
        "two groups swap places while their parameters stay in order: each is stepped with the options of the other",
        (
            "test_resets.py::test_groups_that_swap_places_keep_their_options_though_their_parameters_stay_in_order",
            "test_resets.py::test_rows_follow_their_groups[replace_by_copies]",
        ),
    ),
    Mutant(
        "frozen parameters have to be of a kind that could be stepped",
        SUPPORTED,
        "    return (not p.requires_grad or is_lazy(p)) and p.grad is None\n",
        "    return is_lazy(p) and p.grad is None\n",
        "an optimizer over a quantized model cannot be made",
        (f"{ANY}[uint8-True-{{}}]",),
    ),
    Mutant(
        "tables are on the first parameter's device",
        SUPPORTED,
        "        if is_lazy(p) or not reason_against(p):\n",
        "        if True:\n",
        "a frozen parameter on the meta device takes the rows there",
        (f"{ANY}[meta-True-{{}}]",),
    ),
    Mutant(
        "a frozen parameter is never looked at again",
        CHECKS,
        "        if is_asleep(p):  # torch ignores it, whatever it is, until it has a gradient\n",
        "        if not p.requires_grad:\n",
        "it gets a gradient, and is stepped as what it is not",
        ("test_any_parameter.py::test_with_a_gradient_it_is_named",),
    ),
    Mutant(
        "shapes are computed with",
        OPTIMIZER,
        "            if any(is_estimated(p.grad) for group",
        "            if any(False for group",
        "an estimate of memory under FakeTensorMode asks for addresses",
        ("test_memory.py::test_a_step_of_shapes_makes_the_states_of_a_real_one",),
    ),
)
