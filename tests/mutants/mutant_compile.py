"""Bugs to plant: a step inside of a graph of torch.compile."""

from __future__ import annotations

from mutant_list import Mutant

COMPILE = "aim_kernels/optim/torch_compile.py"

COMPILE_BUGS = (
    Mutant(
        "copies that a graph hands over are passed by",
        COMPILE,
        "if mine is not other and (mine.data_ptr() != other.data_ptr() or mine.stride() != other.stride())",
        "if False",
        "the graph writes its own copies over what was stepped",
        ("test_compile_use.py::test_what_else_the_graph_does_with_a_parameter",),
    ),
    Mutant(
        "a graph leaves out what is only emitted",
        COMPILE,
        "        elif inputs.emits[index]:",
        "        elif False:",
        "the graph reads a parameter as it was before the step that emitted it",
        ("test_compile.py::test_a_graph_sees_what_was_only_emitted",),
    ),
    Mutant(
        "a graph does not say that it writes parameters",
        COMPILE,
        "Tensor(a!)[] params",
        "Tensor[] params",
        "the compiler reads them before the step and takes that for what they are after it",
        ("test_compile.py::test_opcheck", "test_compile.py::test_equals_the_eager_step_and_compiles_once"),
    ),
    Mutant(
        "a compiled step does not look whether true weights are in the module",
        COMPILE,
        "    optimizer._weights.refuse_true()\n",
        "",
        "gradients of the true weights train the degraded ones",
        ("test_compile_use.py::test_true_weights_in_the_module_are_an_error",),
    ),
    Mutant(
        "a graph goes on with lists that were edited",
        COMPILE,
        "    if not _same(given.params, _params_of(optimizer)):\n",
        "    if False:\n",
        "gradients go to the parameters that stand in the place of others",
        ("test_compile_use.py::test_an_edited_list_of_parameters_is_refused_once",),
    ),
    Mutant(
        "graphs keep optimizers alive",
        COMPILE,
        "_OPTIMIZERS: weakref.WeakValueDictionary[str, FusedOptimizer] = weakref.WeakValueDictionary()",
        "_OPTIMIZERS: dict[str, AIMFusedOptimizer] = {}",
        "a search over hyperparameters runs out of memory",
        ("test_compile_use.py::test_an_optimizer_that_was_compiled_can_be_collected",),
    ),
    Mutant(
        "graphs take DTensors",
        COMPILE,
        '    if any(hasattr(p, "device_mesh") for group in optimizer.param_groups for p in group["params"]):\n',
        "    if False:\n",
        "the operator is given wrappers, whose local parts it does not know",
        ("test_compile_use.py::test_distributed_parameters_are_refused",),
    ),
    Mutant(
        "schedulers are not told of a compiled step",
        COMPILE,
        "    optimizer._opt_called = True",
        "    pass",
        "every scheduler warns that it was called before the first step",
        ("test_compile.py::test_schedulers", "test_compile.py::test_a_scheduler_still_warns_of_the_wrong_order"),
    ),
    Mutant(
        "a compiled step needs gradients of its own process",
        COMPILE,
        "    if not grads and optimizer.process_group is None:",
        "    if not grads:",
        "the others wait for this one, for ever",
        ("test_compile_use.py::test_a_process_without_gradients_takes_its_step",),
    ),
    Mutant(
        "gradients of a graph are cleared in the step",
        COMPILE,
        "    _refuse_release(optimizer)\n    _refuse_clearing(optimizer)\n    if any(",
        "    _refuse_release(optimizer)\n    if any(",
        "the compiler's own buffers are zeroed, and no parameter has a gradient that is",
        ("test_compile_use.py::test_gradients_of_a_graph_are_not_cleared",),
    ),
    Mutant(
        "a graph is not given learning rates",
        COMPILE,
        '        self.lrs = _unique([g["lr"] for g in optimizer.param_groups if isinstance(g["lr"], Tensor)])',
        "        self.lrs = []",
        "a rate that the graph changes counts in the step after the next",
        ("test_compile.py::test_a_learning_rate_that_the_graph_changes_counts_at_once",),
    ),
)
