"""Bugs to plant in how an optimizer comes to its groups and options, and in what its errors advise."""

from __future__ import annotations

from mutant_list import CHECKS, OPTIMIZER, PLAN, Mutant

RULE_CLASSES = "aim_kernels/optim/rules.py"
GROUPS, ZERO, TABLES = (
    "aim_kernels/optim/groups.py",
    "aim_kernels/optim/zero_redundancy.py",
    "aim_kernels/step/tables.py",
)
RELEASE, REENTRANT, ARGUMENTS = (
    "aim_kernels/optim/gradient_release.py",
    "aim_kernels/optim/reentrant.py",
    "aim_kernels/step/arguments.py",
)

CONSTRUCTION, NUMBERS, ADVICE = "test_construction.py", "test_numbers.py", "test_advice.py"
PARTS = f"{ADVICE}::test_weights_that_get_their_gradient_in_parts_are_refused_before_anything_is_written"
LINEAR = f"{CONSTRUCTION}::test_work_grows_with_the_number_of_groups_only"

MUTANTS = (
    # -- classes of one rule
    Mutant(
        "a class with another default",
        RULE_CLASSES,
        "        eps: float = 1e-10,\n",
        "        eps: float = 1e-8,\n",
        "Adagrad of torch.optim has an eps of its own; whoever changes one line trains with another",
        (
            "test_rules.py::test_signatures_are_those_of_torch[adagrad]",
            "test_torch_parity.py::test_a_few_ulp_a_step[class-adagrad-default-float32-cpu]",
        ),
    ),
    Mutant(
        "a class that drops an argument",
        RULE_CLASSES,
        "            dampening=dampening,\n",
        "",
        "an argument stands in the signature and goes no further",
        ("test_rules.py::test_an_argument_reaches_the_groups[sgd]",),
    ),
    Mutant(
        "groups of other rules in a class of one",
        RULE_CLASSES,
        '        if param_group.get("rule", rule) != rule:\n',
        "        if False:\n",
        "what a group says of its rule is overwritten in silence",
        ("test_rules.py::test_unknown_options_and_other_rules_are_refused[adamw]",),
    ),
    Mutant(
        "decoupled decay that torch does not learn of",
        RULE_CLASSES,
        '            complete["decoupled_weight_decay"] = True\n',
        "            pass\n",
        "torch.optim.Adam takes a checkpoint without the option for one of Adam, and couples the decay",
        ("test_rules.py::test_a_checkpoint_of_decoupled_adam_goes_to_torch_s_and_back",),
    ),
    # -- groups
    Mutant(
        "generators used up",
        OPTIMIZER,
        "        groups.listed(param_group)\n",
        "        param_group = dict(param_group)\n        groups.listed(param_group)\n",
        "the caller's dict keeps a generator that was read: the next optimizer of it has no parameters",
        (f"{CONSTRUCTION}::test_groups_can_be_passed_again[generator]",),
    ),
    Mutant(
        "a copy of the group",
        OPTIMIZER,
        "            super().add_param_group(param_group)\n",
        "            super().add_param_group(dict(param_group))\n",
        "what the caller changes in its dict later does not reach the optimizer, as it does in torch.optim",
        (f"{CONSTRUCTION}::test_groups_can_be_passed_again[list]",),
    ),
    Mutant(
        "options of a refused group",
        OPTIMIZER,
        "        groups.check(self, self.param_groups, self._members, complete)\n",
        "        param_group.update(complete)\n"
        "        groups.check(self, self.param_groups, self._members, complete)\n",
        "a dict that was refused keeps the options of that call, which are then taken for the caller's",
        (f"{CONSTRUCTION}::test_a_constructor_can_be_tried_again[constructor-list]",),
    ),
    Mutant(
        "a group that stays after its refusal",
        GROUPS,
        "        validation.check_parameters(group, number, params, here, self._numbers)\n",
        "        self._numbers.update(dict.fromkeys(map(id, params), number))\n"
        "        validation.check_parameters(group, number, params, here, {})\n",
        "parameters are noted before they are checked: they count as taken though nobody has them",
        (f"{CONSTRUCTION}::test_a_failed_add_param_group_changes_nothing",),
    ),
    Mutant(
        "members that are never looked at again",
        GROUPS,
        'if edited or any(id(p) in self._numbers for p in group["params"]):',
        "if edited:",
        "after groups were edited by hand, parameters that were taken out count as taken",
        (f"{CONSTRUCTION}::test_a_parameter_that_was_taken_out_can_join_another_group",),
    ),
    Mutant(
        "a look at all groups for each",
        OPTIMIZER,
        "        others, self.param_groups = self.param_groups, []  # what",
        "        others, self.param_groups = [], self.param_groups  # what",
        "torch goes through the parameters of all groups for each that is added: 4000 groups take a minute",
        (f"{LINEAR}[constructor]",),
    ),
    Mutant(
        "earlier groups gone through for each",
        OPTIMIZER,
        '            validation.check_parameters(group, number, group["params"], self._tables.rows.device, earlier)\n',
        '            earlier = {id(p): n for n in range(number) for p in self.param_groups[n]["params"]}\n'
        '            validation.check_parameters(group, number, group["params"], self._tables.rows.device, earlier)\n',
        "the first step takes time that grows with the square of the number of groups",
        (f"{LINEAR}[first step]",),
    ),
    Mutant(
        "a constructor of ZeRO that leaves its options",
        ZERO,
        "                entry.clear()\n                entry.update(own)\n",
        "                del own\n",
        "torch writes the options into the caller's groups before they are checked: no second try can succeed",
        (f"{CONSTRUCTION}::test_zero_takes_groups_again_too[list]",),
    ),
    Mutant(
        "groups of ZeRO checked too late",
        ZERO,
        "            check(self.optim, self.param_groups, self._members, full)\n",
        "            del full\n",
        "torch's class has the group already when the optimizer inside refuses it",
        (f"{CONSTRUCTION}::test_zero_takes_groups_again_too[list]",),
    ),
    # -- numbers
    Mutant(
        "strings that float() reads",
        CHECKS,
        "    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)",
        "    return isinstance(value, (int, float, str, np.integer, np.floating)) and not isinstance(value, bool)",
        "lr='1e-3' of a YAML file is taken by the check and fails, or is concatenated, somewhere else",
        (f"{NUMBERS}::test_what_is_no_number_is_refused_by_name[lr-string]",),
    ),
    Mutant(
        "truth values as numbers",
        CHECKS,
        "    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)",
        "    return isinstance(value, (int, float, np.integer, np.floating))",
        "weight_decay=True decays by 1 a step",
        (f"{NUMBERS}::test_what_is_no_number_is_refused_by_name[weight_decay-bool]",),
    ),
    Mutant(
        "strings as flags",
        CHECKS,
        "        if group[option] is not False:  # most are\n",
        "        if False:\n",
        "nesterov='False' is true",
        (f"{NUMBERS}::test_flags[nesterov-'False']",),
    ),
    Mutant(
        "numbers compared by their worth",
        PLAN,
        '            given = (lr, *group["betas"], *group["under_optimized"], *_READ(group))\n',
        "            lr = float(lr)\n"
        '            given = (lr, *group["betas"], *group["under_optimized"], *_READ(group))\n',
        "a learning rate that becomes a string between steps is converted before anybody looks",
        (f"{NUMBERS}::test_a_string_that_spells_the_number_that_was_there_is_none_either",),
    ),
    Mutant(
        "tensors that are read once",
        PLAN,
        "                self._in_tensors.add(number)\n",
        "                self._in_tensors.discard(number)\n",
        "a weight decay that is a tensor, written in place, stays what it was",
        (f"{NUMBERS}::test_a_tensor_that_is_written_between_steps_counts[weight_decay]",),
    ),
    Mutant(
        "arithmetic in the precision of an option",
        "aim_kernels/backends/reference.py",
        "group, row, state = in_floats(plan.param_groups[number]), rows[number], plan.state_of(index)",
        "group, row, state = plan.param_groups[number], rows[number], plan.state_of(index)",
        "with betas of np.float32 the bias corrections are powers in float32",
        (f"{NUMBERS}::test_numbers_of_numpy_and_torch_are_what_they_are_worth",),
    ),
    Mutant(
        "strings in methods",
        "aim_kernels/methods/base.py",
        "            cls.__init__ = numbers_checked(cls.__init__)  # type: ignore[method-assign]\n",
        "            pass\n",
        "alpha='1' fails in a comparison, without its name",
        (f"{NUMBERS}::test_numbers_of_methods",),
    ),
    Mutant(
        "an attribute that is not looked at",
        OPTIMIZER,
        '        validation.check_flag("zero_grad_in_step", self.zero_grad_in_step)\n        validation',
        "        checks",
        "zero_grad_in_step='false' clears gradients",
        (f"{NUMBERS}::test_attributes_that_are_set_later_are_looked_at_by_the_next_step",),
    ),
    Mutant(
        "sync_every of the first step",
        PLAN,
        "            and self._sync_every == optimizer.sync_every\n",
        "",
        "sync_every that is set later has no effect, and is not checked",
        (f"{NUMBERS}::test_attributes_that_are_set_later_are_looked_at_by_the_next_step",),
    ),
    # -- implementations
    Mutant(
        "implementations taken on trust",
        GROUPS,
        '    _check_implementation(group, f" (group {number})", optimizer.backend, device or torch.device("cpu"))\n',
        "    del device\n",
        "differentiable=True, without gradients through the step",
        (f"{CONSTRUCTION}::test_implementations_that_are_not[differentiable]",),
    ),
    Mutant(
        "implementations forgotten",
        OPTIMIZER,
        "        defaults |= {option: value for option, value in asked.items() if value is not",
        "        asked = {}\n        {option: value for option, value in asked.items() if value is not",
        "fused=True is not in optimizer.defaults, where frameworks look, and foreach=True is taken",
        (f"{CONSTRUCTION}::test_implementations_that_are_so_anyway",),
    ),
    # -- advice
    Mutant(
        "reentrant checkpoints not looked for",
        RELEASE,
        "                output.register_hook(lambda _grad: self._refuse_parts(p))\n",
        "                pass\n",
        "half of the gradient of a shared weight is stepped before the other half is refused",
        (f"{PARTS}[twice]",),
    ),
    Mutant(
        "weights around a checkpoint",
        REENTRANT,
        "    several = [p for p in among if times[p] + (p in around) > 1]\n",
        "    several = [p for p in among if times[p] > 1]\n",
        "a weight that is used in a checkpoint and outside of it is stepped by one of the two gradients",
        (f"{PARTS}[after]",),
    ),
    Mutant(
        "functions whose weights are not found",
        REENTRANT,
        "            left += _contents(value.__closure__ or ())\n",
        "",
        "a lambda around a module hides its weights",
        (f"{PARTS}[a closure]",),
    ),
    Mutant(
        "all reentrant checkpoints refused",
        REENTRANT,
        "    return min(several, key=lambda p: p in around and times[p] > 1, default=None)\n",
        "    return min(several or [p for p in among if times[p]], key=lambda p: p in around, default=None)\n",
        "weights of one checkpoint get their gradient whole, and were stepped well",
        (f"{ADVICE}::test_weights_of_one_reentrant_checkpoint_are_stepped_in_it[once each]",),
    ),
    Mutant(
        "parts that only add up refused",
        RELEASE,
        "        if not self._accumulating and p in self._names:\n",
        "        if p in self._names:\n",
        "inside of accumulate() nothing is stepped, and nothing needs to be refused",
        (f"{ADVICE}::test_gradients_that_only_add_up_may_come_in_parts",),
    ),
    Mutant(
        "a model that counts as inside for ever",
        RELEASE,
        "        self._forget_passes()\n        if open_step is None:\n",
        "        if open_step is None:\n",
        "one checkpoint in each of two steps is taken for two in one",
        (f"{ADVICE}::test_the_model_itself_in_two_checkpoints",),
    ),
    Mutant(
        "advice for states on anchors",
        OPTIMIZER,
        ', anchors, "make a new optimizer, of the weights as they are now")',
        ", anchors)",
        "there is no optimizer.state[parameter] to delete before the first step",
        (f"{ADVICE}::test_states_that_do_not_fit",),
    ),
    Mutant(
        "a view as the parameter",
        "aim_kernels/step/supported.py",
        "make torch.view_as_real(parameter).detach() the nn.Parameter",
        "make torch.view_as_real(parameter) the nn.Parameter",
        "a view is no leaf, and refused in its turn",
        (f"{ADVICE}::test_complex_parameters_as_real_ones",),
    ),
)
