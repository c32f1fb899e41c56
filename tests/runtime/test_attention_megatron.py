"""Covers runtime/attention.py inside Megatron: its GPTModel and its MimoModel under context
parallelism, without colocc's graph, against the one-process float64 oracle.

The steps are Megatron's own: get_batch_on_this_cp_rank or MimoModel's partition adapter, its
schedules, its DDP over dp_cp and its finalize_model_grads.
"""

import contextlib
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_batch_on_this_cp_rank

import colocc
from colocc import Layout
from colocc.runtime import cpu, megatron
from colocc.testing import (
    Run,
    compare,
    float64,
    full_gradients,
    oracle,
    seed_parameters,
    watch_input,
    whole_input,
)
from tests import mimo
from tests.harness import ProcessPool

LENGTH, BATCH, MICROBATCHES = 16, 4, 2
ONE = Layout()
INPUTS = ("input_ids", "position_ids", "labels", "loss_mask")


def batches() -> list[dict[str, Any]]:
    return [mimo.batch(BATCH, seed=index, length=LENGTH) for index in range(MICROBATCHES)]


def replica_of(batch: dict[str, Any], layout: Layout, rank: int) -> dict[str, Any]:
    """The samples of this rank's replica of a global batch."""
    replica, size = int(layout.coordinates("dp")[rank]), BATCH // layout.dp
    rows = slice(replica * size, (replica + 1) * size)
    return {
        key: torch.utils._pytree.tree_map(lambda value: value[rows], value)
        for key, value in batch.items()
    }


@contextlib.contextmanager
def numbers(*, double: bool) -> Iterator[None]:
    """Megatron on CPU ranks, in float64 where ``double``."""
    with cpu.ranks(), float64() if double else contextlib.nullcontext():
        yield


def megatron_step(modules: dict[str, Any], groups: Any, layout: Layout, forward_step: Any) -> Run:
    """A step of Megatron's own schedule and finalisation; every module on its own groups."""

    def finalize(_: Any, tokens: Any, *args: Any, **kwargs: Any) -> None:
        for name, module in modules.items():
            count = None if tokens is None else tokens.clone()
            finalize_model_grads([module], count, groups[name], force_all_reduce=True)

    stage = megatron.Stage(modules["language"], finalize)
    for module in modules.values():
        module.zero_grad_buffer()
    logs = megatron.run_schedule(
        stage,
        forward_step,
        groups["language"],
        num_microbatches=MICROBATCHES,
        seq_length=LENGTH,
        micro_batch_size=BATCH // layout.dp,
        forward_only=False,
        collect_non_loss_data=False,
        force_all_reduce=True,
        indices=iter(range(MICROBATCHES)),
    )
    loss = sum(log["loss"][0] for log in logs) if logs else None
    return Run(loss=loss, gradients=full_gradients(modules, groups))


def check_losses(runs: list[Run], layout: Layout, wanted: Run) -> None:
    """The sums over dp and cp of the ranks' losses, over the tokens, are the oracle's loss."""
    places = [layout.coordinates(axis).tolist() for axis in ("dp", "cp")]
    shares: dict[tuple[int, int], float] = {}
    for run, dp, cp in zip(runs, *places, strict=True):
        if run.loss is not None:
            shares[dp, cp] = run.loss
    assert len(shares) == layout.dp * layout.cp
    tokens = sum(int(batch["loss_mask"].sum()) for batch in batches())
    assert sum(shares.values()) / tokens == pytest.approx(wanted.loss, rel=1e-5)


# ---------------------------------------------------------------- GPTModel


class Wrapped(torch.nn.Module):
    """A GPTModel that the oracle can run: it takes a batch and has no modality modules."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model
        self.modality_submodules = torch.nn.ModuleDict()

    def forward(self, **batch: Any) -> Any:
        ids, positions, labels, mask = (batch[name] for name in INPUTS)
        embedded = self.language_model.embedding(ids, positions)
        out = self.language_model(None, None, None, decoder_input=embedded, labels=labels)
        return out, mask


def gpt(layout: Layout, pg: Any, *, positions: str, sp: bool, per_token: bool) -> GPTModel:
    options = {"sequence_parallel": sp, "calculate_per_token_loss": per_token}
    config = mimo.config_of(layout, 4, mimo.HIDDEN, **options, num_query_groups=4)
    if sp:
        model_parallel_cuda_manual_seed(0, tp_rank=pg.tp.rank(), ep_rank=0, etp_rank=0)
    spec = mimo.sequence_parallel_block(layout, 4) if sp else mimo.layer_spec(AttnMaskType.causal)
    model = GPTModel(
        config,
        spec,
        vocab_size=mimo.VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=pg.pp.rank() == 0,
        post_process=pg.pp.rank() == pg.pp.size() - 1,
        share_embeddings_and_output_weights=False,
        position_embedding_type=positions,
        pg_collection=pg,
    )
    seed_parameters(model, pg)
    return model


def gpt_oracle_on_rank(_: int, positions: str, replicas: int, cp: int, per_token: bool) -> Run:
    layouts = {"language": ONE}
    with numbers(double=True), colocc.process_groups(layouts) as groups:
        model = gpt(ONE, groups["language"], positions=positions, sp=False, per_token=per_token)
        return oracle(
            Wrapped(model),
            batches(),
            mimo.loss_func,
            replicas=replicas,
            cp=cp,
            per_token=per_token,
        )


def gpt_on_rank(
    rank: int, layout: Layout, positions: str, sp: bool, per_token: bool, double: bool
) -> tuple[Run, int]:
    """The step, and colocc's count of its tokens."""
    layouts = {"language": layout}
    with numbers(double=double), colocc.process_groups(layouts) as groups:
        pg = groups["language"]
        model = gpt(layout, pg, positions=positions, sp=sp, per_token=per_token)
        ddp = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(), model, pg_collection=pg
        )
        counted: list[torch.Tensor] = []

        def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> Any:
            total, count, log = mimo.loss_func((losses, mask))
            counted.append(count)
            return total, count, log

        def forward_step(indices: Iterator[int], stage: Any) -> tuple[Any, Any]:
            batch = replica_of(batches()[next(indices)], layout, rank)
            part = get_batch_on_this_cp_rank(
                {name: batch[name] for name in INPUTS}, is_hybrid_cp=False, cp_group=pg.cp
            )
            out = stage.module(part["input_ids"], part["position_ids"], None, labels=part["labels"])
            return out, partial(loss_func, part["loss_mask"])

        run = megatron_step({"language": ddp}, groups, layout, forward_step)
        mine = torch.tensor(sum(int(count) for count in counted))
        return run, int(megatron.global_tokens(mine, pg))


@pytest.fixture(scope="module")
def gpt_oracle(processes: ProcessPool) -> Any:
    def get(positions: str, replicas: int, cp: int, per_token: bool) -> Run:
        work = partial(
            gpt_oracle_on_rank,
            positions=positions,
            # A sum over tokens has one oracle, whoever holds them.
            replicas=1 if per_token else replicas,
            cp=1 if per_token else cp,
            per_token=per_token,
        )
        return processes.run(1, work)[0]

    return cache(get)


@pytest.mark.parametrize(
    ("layout", "sp", "positions", "per_token", "double"),
    [
        (Layout(cp=2), False, "learned_absolute", True, True),
        (Layout(cp=2), False, "rope", True, False),
        (Layout(cp=4), False, "rope", True, True),
        (Layout(cp=2, dp=2), False, "rope", False, True),
        (Layout(cp=2, dp=2, pp=2), False, "learned_absolute", False, False),
        (Layout(cp=2, dp=2, pp=2, order="cp-pp-dp-tp"), False, "rope", True, True),
        (Layout(tp=2, cp=2), True, "learned_absolute", True, False),
        (Layout(tp=2, cp=2), True, "rope", True, True),
        (Layout(tp=2, cp=2, pp=2), True, "rope", False, True),
    ],
    ids=str,
)
def test_gpt_is_that_of_one_rank(
    processes: ProcessPool,
    gpt_oracle: Any,
    layout: Layout,
    sp: bool,
    positions: str,
    per_token: bool,
    double: bool,
) -> None:
    work = partial(
        gpt_on_rank, layout=layout, positions=positions, sp=sp, per_token=per_token, double=double
    )
    runs, counts = zip(*processes.run(layout.size, work), strict=True)
    wanted = gpt_oracle(positions, layout.dp, layout.cp, per_token)
    compare(runs, wanted, tolerance=1e-12 if double else 1e-5, noise=1e-9)
    if per_token:
        check_losses(list(runs), layout, wanted)
    assert set(counts) == {sum(int(batch["loss_mask"].sum()) for batch in batches())}


# ---------------------------------------------------------------- MimoModel


def mimo_oracle_on_rank(_: int, replicas: int, cp: int, per_token: bool) -> Run:
    layouts = {"images": ONE, "language": ONE}
    with numbers(double=True), colocc.process_groups(layouts) as groups:
        model = mimo.build(groups, layouts, wrap=False, length=LENGTH, per_token=per_token)
        return oracle(
            model, batches(), mimo.loss_func, replicas=replicas, cp=cp, per_token=per_token
        )


def mimo_on_rank(rank: int, layout: Layout, sp: bool, per_token: bool, double: bool) -> Run:
    """Each cp rank is given whole samples, encodes all of them and cuts the merged embeddings."""
    layouts = {"images": layout, "language": layout}
    with numbers(double=double), colocc.process_groups(layouts) as groups:
        model = mimo.build(
            groups, layouts, length=LENGTH, per_token=per_token, sequence_parallel=sp
        )

        def forward_step(indices: Iterator[int], _: Any) -> tuple[Any, Any]:
            batch = replica_of(batches()[next(indices)], layout, rank)
            losses, mask = model(**batch)
            assert losses.shape == mask.shape == (BATCH // layout.dp, LENGTH // layout.cp)
            return losses, lambda out: mimo.loss_func((out, mask))

        modules = {"images": model.modality_submodules["images"], "language": model.language_model}
        seen: list[torch.Tensor] = []
        with watch_input(model.language_model, seen):
            run = megatron_step(modules, groups, layout, forward_step)
        replica = int(layout.coordinates("dp")[rank])
        wholes = [whole_input(value, model.language_model, groups["language"]) for value in seen]
        run.inputs = {(index, replica): value for index, value in enumerate(wholes)}
        return run


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(
    ("layout", "sp", "double"),
    [
        (Layout(cp=2), False, True),
        (Layout(cp=2), False, False),
        (Layout(cp=4), False, True),
        (Layout(cp=2, dp=2), False, True),
        (Layout(tp=2, cp=2), True, True),
    ],
    ids=str,
)
def test_mimo_is_that_of_one_rank(
    processes: ProcessPool, layout: Layout, sp: bool, per_token: bool, double: bool
) -> None:
    work = partial(mimo_on_rank, layout=layout, sp=sp, per_token=per_token, double=double)
    runs = processes.run(layout.size, work)
    alone = partial(mimo_oracle_on_rank, replicas=layout.dp, cp=layout.cp, per_token=per_token)
    wanted = processes.run(1, alone)[0]
    compare(runs, wanted, tolerance=1e-12 if double else 1e-5, noise=1e-9)
    assert {place for run in runs for place in run.inputs} == wanted.inputs.keys()
    if per_token:
        check_losses(runs, layout, wanted)
