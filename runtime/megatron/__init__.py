"""All that colocc knows of megatron-core's internals (0.19): what the rest of it asks of them."""

from colocc.runtime.megatron.engine import (
    Stage,
    finish_gradients,
    gather_parameters,
    global_tokens,
    mimo_optimizer,
    no_sync,
    prepare_buffers,
    reduction_of,
    require_ddp,
    run_schedule,
    scale_gradients,
    start_reductions,
    unwrapped,
)
from colocc.runtime.megatron.glue import MergeInPart, QuietGlue
from colocc.runtime.megatron.mimo import (
    batch_dims_of,
    check_sequence,
    cut_angles,
    is_mimo,
    no_rows,
    optional_inputs,
    traits_of,
)

__all__ = [
    "MergeInPart",
    "QuietGlue",
    "Stage",
    "batch_dims_of",
    "check_sequence",
    "cut_angles",
    "finish_gradients",
    "gather_parameters",
    "global_tokens",
    "is_mimo",
    "mimo_optimizer",
    "no_rows",
    "no_sync",
    "optional_inputs",
    "prepare_buffers",
    "reduction_of",
    "require_ddp",
    "run_schedule",
    "scale_gradients",
    "start_reductions",
    "traits_of",
    "unwrapped",
]
