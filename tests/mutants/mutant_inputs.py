"""More of mutant_list.py: inputs of every form, outputs of every layout, live weights that are used by mistake."""

from __future__ import annotations

from mutant_list import Mutant

INPUTS, SAMPLES = "aim_kernels/aim/inputs.py", "aim_kernels/aim/samples.py"
PROTOTYPES, WATCHING = "aim_kernels/aim/prototypes.py", "aim_kernels/aim/watching.py"

INPUT_BUGS = (
    Mutant(
        "packed sequences are cut by time steps",
        INPUTS,
        "                padded[rows.to(padded.device)], lengths[rows], batch_first=True, enforce_sorted=False\n",
        "                padded[: len(rows)], lengths[: len(rows)], batch_first=True, enforce_sorted=False\n",
        "a PackedSequence has no batch dimension to slice",
        ("test_inputs.py::test_packed_sequences_keep_their_values",),
    ),
    Mutant(
        "the mask stays behind when its input trades places",
        INPUTS,
        'shared["present"] = torch.where(columns, others, present)',
        'shared["present"] = present',
        "a placeholder would be read as an input, and an input be hidden",
        ("test_inputs.py::test_present_reaches_the_model_and_goes_with_its_modality",),
    ),
    Mutant(
        "NaN that nobody reads counts",
        SAMPLES,
        "rows = rows & present[:, number].to(rows)",
        "rows = rows",
        "networks with a mask of present modalities bear NaN in place of an absent one",
        ("test_inputs.py::test_present_reaches_the_model_and_goes_with_its_modality",),
    ),
    Mutant(
        "one NaN sample spoils a batch",
        SAMPLES,
        "    return _without_nan(what, layout, samples)\n",
        "    return samples\n",
        "all scores were NaN, and nobody was ever held back",
        ("test_inputs.py::test_samples_with_nan_are_counted_named_and_left_out",),
    ),
    Mutant(
        "a loader moves the random state",
        SAMPLES,
        "    with torch.random.fork_rng(devices=[]):\n        for batch in loader:",
        "    with __import__('contextlib').nullcontext():\n        for batch in loader:",
        "a DataLoader draws its seed from torch's generator; dropout then differs with AIM on",
        ("test_inputs.py::test_a_loader_and_its_batch",),
    ),
    Mutant(
        "time steps pass for samples if they are as many",
        PROTOTYPES,
        "if pool is not None and first.dim() > 2 and first.shape[0] == first.shape[1] == count > 1:",
        "if False:",
        "[T, B, C] with T = B would be scored by time step, in silence",
        ("test_inputs.py::test_another_layout_is_refused_with_block_and_shape",),
    ),
    Mutant(
        "frames are averaged over samples",
        PROTOTYPES,
        "unflatten(0, (count, -1)).mean(1)",
        "unflatten(0, (-1, count)).mean(0)",
        "the frames of a sample lie one after the other",
        ("test_inputs.py::test_sequence_first_and_frames_are_pooled_by_sample",),
    ),
    Mutant(
        "padding takes the fast path",
        PROTOTYPES,
        "        torch.backends.mha.set_fastpath_enabled(False)\n",
        "",
        "torch's transformer makes nested tensors of padded ones in evaluation mode, which other operators refuse",
        ("test_inputs.py::test_a_transformer_with_a_padding_mask",),
    ),
    Mutant(
        "all prototypes run at once",
        PROTOTYPES,
        "for start in range(0, num_classes, batch_size)]",
        "for start in range(0, num_classes, num_classes)]",
        "150 classes took 4.4 GB whatever batch_size said",
        ("test_inputs.py::test_prototypes_run_in_pieces",),
    ),
    Mutant(
        "loaded weights are lost",
        WATCHING,
        "        aim.optimizer.adopt_loaded(lambda p: id(p) in inside)\n",
        "        return\n",
        "the best checkpoint became a mixture: blocks that were held back kept the latest weights",
        ("test_watching.py::test_weights_that_are_loaded_are_kept",),
    ),
    Mutant(
        "weights loaded into a part are lost",
        WATCHING,
        "        for module in model.modules():\n",
        "        for module in [model]:\n",
        "a pretrained encoder was overwritten by the next eval(), but for its biases",
        ("test_watching.py::test_weights_that_are_loaded_into_a_part_are_kept",),
    ),
    Mutant(
        "after loading the first step runs on true weights",
        "aim_kernels/optim/weights.py",
        "        if adopted:\n            self.emit()\n",
        "        if False:\n            self.emit()\n",
        "a run whose optimizer was loaded before its model did not go on bit for bit",
        ("test_watching.py::test_a_run_goes_on_whichever_is_loaded_first",),
    ),
    Mutant(
        "a loader's packed sequences are joined as they lie",
        INPUTS,
        "pack_sequence([x for part in parts for x in unpack_sequence(part)], enforce_sorted=False)",
        "parts[0]",
        "batches of sequences have no common time steps; an inconsistent one crashed the process",
        ("test_inputs.py::test_batches_of_a_loader_are_joined_by_samples",),
    ),
    Mutant(
        "sums of losses are compared",
        "aim_kernels/aim/reliance.py",
        "            if cut and not start and not number:\n",
        "            if False:\n",
        "with fewer held-out samples than others a shortcut was confirmed by their number",
        ("test_inputs.py::test_losses_that_are_no_means_are_refused",),
    ),
    Mutant(
        "loaded live weights become true ones",
        "aim_kernels/optim/weights.py",
        "            if not torch.equal(local, values):\n",
        "            if True:\n",
        "a run that goes on from the module's own state dict would go on degraded",
        ("test_watching.py::test_a_checkpoint_of_live_weights_does_not_become_the_true_ones",),
    ),
    Mutant(
        "evaluating live weights goes unnoticed",
        WATCHING,
        "if not torch.compiler.is_compiling() and not model.training and not _MEASURING.get() and self._live():",
        "if False:",
        "accuracies of a degraded network were reported",
        ("test_watching.py::test_evaluating_live_weights_is_said_once",),
    ),
)
