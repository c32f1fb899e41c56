"""Megatron's own model, DDP, 1F1B and optimizers on CPU ranks, against the same on one rank."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colocc.runtime import cpu
from tests.harness import ProcessPool

SAMPLES, LENGTH, VOCABULARY, MICROBATCHES, STEPS = 4, 8, 64, 3, 4


@dataclasses.dataclass(frozen=True)
class Case:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    distributed: bool = False
    overlap: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp


def build(case: Case) -> Any:
    """A GPT in Megatron's DDP, its weights the same in any layout."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from colocc.runtime.attention import SdpaAttention
    from colocc.testing.names import seed_parameters

    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        params_dtype=case.dtype,
        pipeline_dtype=case.dtype,
        bf16=case.dtype == torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    ).to(device="cuda", dtype=case.dtype)
    seed_parameters(model, ProcessGroupCollection.use_mpu_process_groups())
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=case.distributed, overlap_grad_reduce=case.overlap
    )
    return DistributedDataParallel(config, ddp, model)


def build_optimizer(case: Case, model: Any) -> Any:
    """Megatron's Adam inside its MimoOptimizer, which names cuda literally."""
    from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        # Megatron clips float32 gradients only.
        clip_grad=0.0 if case.dtype == torch.float64 else 1.0,
        bf16=case.dtype == torch.bfloat16,
        params_dtype=case.dtype,
        use_distributed_optimizer=case.distributed,
    )
    inner = get_megatron_optimizer(config, [model])
    info = ModuleOptimizerInfo(
        optimizer=inner, grid=SimpleNamespace(), pg_collection=None, is_active=True
    )
    return MimoOptimizer({"language": info}, config)


def batches(case: Case, replica: int) -> Iterator[torch.Tensor]:
    """The replica's part of each microbatch; the whole is the same in any layout."""
    generator = torch.Generator().manual_seed(0)
    while True:
        whole = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
        yield whole.chunk(case.dp)[replica]


def forward_step(iterator: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    ids = next(iterator).cuda()
    positions = torch.arange(LENGTH, device="cuda").expand(ids.shape[0], -1)

    def loss_func(out: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return out.mean(), {"loss": out.mean().item()}

    return model(ids, positions, None, labels=ids), loss_func


def train(rank: int, case: Case) -> list[float]:
    """The losses of the steps on a last stage, nothing on another."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    losses = []
    with cpu.ranks():
        parallel_state.initialize_model_parallel(case.tp, case.pp)
        model_parallel_cuda_manual_seed(1)
        model = build(case)
        optimizer = build_optimizer(case, model)
        model.config.finalize_model_grads_func = finalize_model_grads
        iterator = batches(case, parallel_state.get_data_parallel_rank())
        for _ in range(STEPS):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            made = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterator,
                model=[model],
                num_microbatches=MICROBATCHES,
                seq_length=LENGTH,
                micro_batch_size=SAMPLES // case.dp,
                forward_only=False,
            )
            updated, norm, _ = optimizer.step()
            assert updated
            assert norm > 0
            losses += [sum(x["loss"] for x in made) / MICROBATCHES] if made else []
    return losses


def run(processes: ProcessPool, case: Case) -> torch.Tensor:
    """The losses of each step, over all replicas."""
    parts = [x for x in processes.run(case.world, partial(train, case=case), detail=True) if x]
    assert len(parts) == case.tp * case.dp, "one for each rank of the last stage"
    return torch.tensor(parts).mean(0)


@pytest.fixture(scope="module")
def alone(processes: ProcessPool) -> torch.Tensor:
    losses = run(processes, Case())
    assert losses[0] - losses[-1] > 0.1, "the steps must show in the losses"
    return losses


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, pp=2, dp=2),
        Case(tp=2, pp=2, dp=2, distributed=True),
        Case(dp=4, distributed=True, overlap=True),
        Case(pp=2, dp=2, overlap=True),
        Case(tp=4),
    ],
    ids=str,
)
def test_training_is_that_of_one_rank(
    processes: ProcessPool, alone: torch.Tensor, case: Case
) -> None:
    torch.testing.assert_close(run(processes, case), alone, rtol=2e-5, atol=0)


def test_bf16_with_the_distributed_optimizer(processes: ProcessPool, alone: torch.Tensor) -> None:
    case = Case(tp=2, pp=2, dp=2, distributed=True, dtype=torch.bfloat16)
    torch.testing.assert_close(run(processes, case), alone, rtol=0, atol=0.02)


def test_float64_of_any_layout_is_that_of_one_rank(processes: ProcessPool) -> None:
    expected = run(processes, Case(dtype=torch.float64))
    assert expected[0] - expected[-1] > 0.1
    found = run(processes, Case(tp=2, dp=2, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
