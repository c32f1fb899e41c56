"""The test kit: is this model, on these layouts, trained as one process would train it?

    with float64():                                   # exact enough that 1e-12 is a real bound
        reference = oracle(model_on_one_rank, batches, loss_func, replicas=language_dp)

    seen = []                                         # on every rank of the compiled model
    with watch_input(model.language_model, seen):
        logs = program.forward_backward(batches, num_microbatches=..., loss_func=loss_func)
    losses = [log["loss"] for log in logs]            # where loss_func logs {"loss": (sum, tokens)}
    run = observed(program, losses, seen, microbatches=...)
    compare([run], reference, tolerance=1e-5)         # with the runs of all ranks none is missing

The oracle and ``observed`` are for a MimoModel, ``check_identity`` is for any program.
``mutations`` break a program on purpose: a suite that stays green under one of them cannot fail.
"""

from colocc.testing.identity import check_identity
from colocc.testing.mutations import MUTATIONS, mutated
from colocc.testing.names import full_gradients, full_weights, global_names, seed_parameters
from colocc.testing.oracle import (
    Run,
    compare,
    float64,
    observed,
    oracle,
    relative_l2,
    watch_input,
    whole_input,
)

__all__ = [
    "MUTATIONS",
    "Run",
    "check_identity",
    "compare",
    "float64",
    "full_gradients",
    "full_weights",
    "global_names",
    "mutated",
    "observed",
    "oracle",
    "relative_l2",
    "seed_parameters",
    "watch_input",
    "whole_input",
]
