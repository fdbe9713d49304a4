"""More of mutant_list.py: AIM's trials, its rivals and controls."""

from __future__ import annotations

from mutant_list import Mutant

TRIALS, SNAPSHOT, METHODS = "aim_kernels/aim/trials.py", "aim_kernels/aim/snapshot.py", "aim_kernels/methods/"
BY_HAND = "test_trials.py::test_losses_are_those_of_training_by_hand"
UNDONE = "test_trials.py::test_everything_is_as_it_was"

METHOD_BUGS = (
    # -- trials
    Mutant(
        "trials are judged by live weights",
        "aim_kernels/aim/aim.py",
        "with self.optimizer.true_parameters(), probing(self.model), refreshed(",
        "with probing(self.model), refreshed(",
        "the arm that is held back would be judged by its degraded network",
        (BY_HAND,),
    ),
    Mutant(
        "arms begin where the last one ended",
        TRIALS,
        "            back(gradients=False)\n",
        "",
        "three trials in a row instead of three trials from one state",
        (BY_HAND,),
    ),
    Mutant(
        "a growing difference counts as unsteady",
        TRIALS,
        "rest = looks - looks.mean() - time * (looks @ time) / (time @ time)",
        "rest = looks - looks.mean()",
        "what is looked for would be its own error; on coloured digits nobody is found then",
        (BY_HAND,),
    ),
    Mutant(
        "everybody is held back",
        TRIALS,
        "if len(held_back) == len(aim.modalities):",
        "if False:",
        "nobody would learn",
        ("test_trials.py::test_a_shortcut_is_held_back_and_let_go_when_it_is_none",),
    ),
    Mutant(
        "modalities that are not sure are held back",
        TRIALS,
        "if gain > confidence * errors[m] + dead_zone * abs(now)}",
        "if gain > dead_zone * abs(now)}",
        "chance decides",
        ("test_trials.py::test_one_sure_move",),
    ),
    Mutant(
        "states that a trial made stay",
        "aim_kernels/optim/snapshot.py",
        "        states.clear()\n",
        "",
        "masters that came in a trial would be the true weights of what is trained on",
        (f"{UNDONE}[before the first step]",),
    ),
    Mutant(
        "random numbers that a trial drew are gone",
        SNAPSHOT,
        "        torch.set_rng_state(self._random[0])\n",
        "",
        "dropout would differ from a run without trials, and from arm to arm",
        (UNDONE, BY_HAND),
    ),
    Mutant(
        "accumulated gradients are gone",
        SNAPSHOT,
        "p.grad = grad if gradients else None",
        "p.grad = None",
        "what was accumulated before the update",
        (UNDONE,),
    ),
    Mutant(
        "a failed trial leaves its features dropped",
        "aim_kernels/aim/aim.py",
        "            self._load_mixing_state(mixing_state)\n",
        "",
        "where the last arm was held back, training would go on as in it",
        ("test_trials.py::test_a_trial_that_fails_leaves_nothing",),
    ),
    # -- choices
    Mutant(
        "a probe that no trial asks is accepted",
        "aim_kernels/aim/aim.py",
        "if given[name] is not None and rule is not None and not rule.scores_blocks:",
        "if False:",
        "options that mean nothing were ignored in silence",
        ("test_choices.py::test_what_means_nothing_is_refused",),
    ),
    Mutant(
        "a named probe does not ask for scores",
        "aim_kernels/aim/aim.py",
        "labels is None or self.asks_for_scores else",
        "labels is None else",
        "the probe would be ignored where train= is given",
        ("test_choices.py::test_what_is_given_decides_the_rule",),
    ),
    Mutant(
        "strings in option objects",
        "aim_kernels/step/arguments.py",
        "            _check(field.name, getattr(options, field.name), types)\n",
        "            pass\n",
        "Trial(steps='16') fails in a comparison, without its name",
        ("test_numbers.py::test_numbers_of_option_objects",),
    ),
    Mutant(
        "a recorded confidence is that of the rule's default",
        "aim_kernels/experiments/arguments.py",
        '(confidence=arguments.pop("confidence"))',
        '(confidence=arguments.pop("confidence") * 0.0 + 3.0)',
        "the tuned configurations of a comparison would all be one",
        ("test_arguments_of_aim.py::test_recorded_options_become_objects",),
    ),
    # -- rivals
    Mutant(
        "gradients that agree are weighed as if they did not",
        f"{METHODS}mmpareto.py",
        "k = torch.where(mm_own > 0.0, torch.full_like(shortest, 0.5), shortest)",
        "k = shortest",
        "MMPareto takes the shortest combination only where gradients point apart",
        ("test_methods_gradients.py::test_mmpareto",),
    ),
    Mutant(
        "the modality that is behind is held back",
        f"{METHODS}inforeg.py",
        "gap = scores - mean_of_others(scores)",
        "gap = mean_of_others(scores) - scores",
        "the sign of a difference",
        ("test_methods_gradients.py::test_inforeg",),
    ),
    Mutant(
        "a leader by training accuracy",
        f"{METHODS}pdmp.py",
        "xs, ys = (inputs, labels) if held_out is None else held_out",
        "xs, ys = inputs, labels",
        "the modality that is memorized first would lead",
        ("test_methods_rows.py::test_pdmp_ranks_modalities_by_held_out_accuracy",),
    ),
    Mutant(
        "the share of the weakest is flattened",
        f"{METHODS}sam.py",
        "v = self.share.max()",
        "v = self.share.min()",
        "M-SAM flattens the dominant modality's part of the loss",
        ("test_methods_gradients.py::test_m_sam",),
    ),
    Mutant(
        "options of scores are ignored by trials",
        "aim_kernels/aim/aim.py",
        "for given in (probe, alpha, targets, pool))",
        "for given in (probe,))",
        "alpha= in the quickstart's loop would change nothing",
        ("test_choices.py::test_what_is_given_decides_the_rule",),
    ),
    Mutant(
        "copies of AIM have no hooks",
        "aim_kernels/aim/aim.py",
        'self._handles = self.mixing.install(self) if state["_handles"] else ()',
        "self._handles = ()",
        "a deep copy would train jointly, and say that it modulates",
        ("test_copies.py::test_a_copy_mixes_by_itself",),
    ),
    Mutant(
        "features are mixed without a mask that is there",
        "aim_kernels/methods/controls.py",
        "        if not self.inner.tells_classes_by_rows:",
        "        if False:",
        "the control would be the treatment",
        ("test_methods_controls.py",),
    ),
)
