"""The arms: each one runs training steps of a case in its own way, and tells its loss and norm."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

import colocc
from colocc.runtime import megatron
from colocc.runtime.data import Batches
from colocc.runtime.schedule import Chunks, Encoded, Schedule
from examples.benchmark import model as models
from examples.benchmark.cases import Case, family

Batch = dict[str, Any]


def loss_func(output: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any, dict[str, Any]]:
    """Megatron's contract for per-token losses; the log stays on the device."""
    losses, mask = output
    total, tokens = (losses * mask).sum(), mask.sum()
    return total, tokens.int(), {"loss": torch.stack([total.detach(), tokens])}


def loss_per_token(logs: list[Any], collection: Any) -> float:
    """The loss of a step, from the logs of the last stages; the same on every rank."""
    total = torch.zeros(2, device=torch.cuda.current_device())
    if logs and collection.tp.rank() == 0:
        total += torch.stack([log["loss"] for log in logs]).sum(dim=0)
    dist.all_reduce(total)
    return float(total[0] / total[1])


class Shared:
    """One MimoModel with its optimizer and a step of data, for all arms that can share them."""

    def __init__(
        self,
        case: Case,
        groups: Any,
        dtype: torch.dtype,
        overlap: bool,
        *,
        distributed: bool = True,
    ) -> None:
        self.case, self.groups = case, groups
        options = models.ddp_config(overlap=overlap, distributed=distributed)
        self.mimo = models.build_mimo(case.sizes, case.layouts, groups, dtype, options)
        self.batches = batches_of(case, dtype)
        self.modules: dict[str, Any] = {
            "images": self.mimo.modality_submodules["images"],
            "language": self.mimo.language_model,
        }
        self.config = optimizer_config(dtype, distributed=distributed)
        self.optimizer = megatron.mimo_optimizer(self.modules, groups, self.config)

    def compile(self, schedule: str) -> colocc.Program:
        schedule, *options = schedule.split("+")
        if unknown := set(options) - {"graphs", "first"}:
            raise ValueError(f"no such option of an arm: {', '.join(sorted(unknown))}")
        return colocc.compile(
            self.mimo,
            self.case.layouts,
            groups=self.groups,
            schedule=schedule,
            cuda_graphs="graphs" in options,
            check="first" if "first" in options else "every",
        )


def batches_of(case: Case, dtype: torch.dtype) -> list[Batch]:
    size = case.batch // case.microbatches
    return models.make_batches(case.sizes, size, case.microbatches, dtype)


def optimizer_config(dtype: torch.dtype, *, distributed: bool = True) -> OptimizerConfig:
    """Adam that does all its work and moves nothing, so that every step sees the same weights."""
    return OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        weight_decay=0.0,
        clip_grad=1.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )


class Arm(ABC):
    """A way to run a training step: zero gradients, forward, backward, optimizer."""

    modules: list[Any]
    optimizer: Any

    def step(self) -> tuple[list[Any], float | None]:
        """Run one step; return this rank's logs and the norm of all gradients."""
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        logs = self.forward_backward()
        _, norm, _ = self.optimizer.step()
        return logs, norm

    @abstractmethod
    def forward_backward(self) -> list[Any]:
        """Leave the gradients of a step in the modules; return this rank's logs."""

    def close(self) -> None:  # noqa: B027 - most arms open nothing
        """Give back what the arm opened."""


class Colocc(Arm):
    """The compiled program."""

    def __init__(self, shared: Shared, schedule: str) -> None:
        self.shared, self.modules = shared, list(shared.modules.values())
        self.optimizer = shared.optimizer
        self.program = shared.compile(schedule)

    def forward_backward(self) -> list[Any]:
        return self.program.forward_backward(
            self.shared.batches,
            num_microbatches=self.shared.case.microbatches,
            loss_func=loss_func,
        )

    def close(self) -> None:
        self.program.destroy()


class Megatron(Arm):
    """MimoModel.forward in Megatron's schedule; embeddings go through its own communicator."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.modules = shared, list(shared.modules.values())
        self.optimizer = shared.optimizer
        self.local = [self._cut(batch) for batch in shared.batches]
        self.stage = megatron.Stage(shared.mimo, self._finalize)
        self.stage.config.no_sync_func = shared.mimo.no_sync

    def _cut(self, batch: Batch) -> Batch:
        """What a data loader of this rank would read: its replica's text, its slot's images."""

        def narrow(value: Any, name: str) -> Any:
            dp = self.shared.groups[name].dp
            return value.chunk(dp.size())[dp.rank()]

        pixels = batch["modality_inputs"]["images"]["vit"]["x"]
        text = {k: narrow(v, "language") for k, v in batch.items() if k != "modality_inputs"}
        return text | {"modality_inputs": {"images": {"vit": {"x": narrow(pixels, "images")}}}}

    def _finalize(self, model: Any, tokens: torch.Tensor, **unused: Any) -> None:
        total = megatron.global_tokens(tokens, self.shared.groups["language"])
        for name, module in self.shared.modules.items():
            megatron.finish_gradients(module, self.shared.groups[name], force_all_reduce=False)
            megatron.scale_gradients(module, 1.0 / total)

    def forward_backward(self) -> list[Any]:
        def forward_step(batches: Iterator[Batch], stage: Any) -> tuple[Any, Any]:
            return self.shared.mimo(**next(batches)), loss_func

        return _scheduled(
            self.shared.case, self.stage, forward_step, self.shared.groups["language"], self.local
        )


class FirstStage(Arm):
    """The encoder inside the first pipeline stage, on the language module's groups alone."""

    def __init__(self, case: Case, groups: Any, layers: int, dtype: torch.dtype, overlap: bool):
        self.case, self.groups = case, groups["language"]
        module = models.build_first_stage(
            case.sizes, self.groups, dtype, layers, models.ddp_config(overlap=overlap)
        )
        self.modules = [module]
        self.optimizer = get_megatron_optimizer(
            config=optimizer_config(dtype),
            model_chunks=[module],
            pg_collection=self.groups,
            use_gloo_process_groups=False,
        )
        dp = self.groups.dp
        self.local = [_narrowed(batch, dp.size(), dp.rank()) for batch in batches_of(case, dtype)]
        self.stage = megatron.Stage(module, self._finalize)

    def _finalize(self, model: Any, tokens: torch.Tensor, **unused: Any) -> None:
        total = megatron.global_tokens(tokens, self.groups)
        megatron.finish_gradients(self.modules[0], self.groups, force_all_reduce=False)
        megatron.scale_gradients(self.modules[0], 1.0 / total)

    def forward_backward(self) -> list[Any]:
        def forward_step(batches: Iterator[Batch], stage: Any) -> tuple[Any, Any]:
            return self.modules[0](next(batches)), loss_func

        return _scheduled(self.case, self.stage, forward_step, self.groups, self.local)


def _narrowed(value: Any, count: int, index: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _narrowed(part, count, index) for key, part in value.items()}
    return value.chunk(count)[index]


def _scheduled(case: Case, stage: Any, forward_step: Any, groups: Any, batches: Any) -> list[Any]:
    return megatron.run_schedule(
        stage,
        forward_step,
        groups,
        num_microbatches=case.microbatches,
        seq_length=case.sizes.length,
        micro_batch_size=case.batch // case.microbatches // groups.dp.size(),
        forward_only=False,
        collect_non_loss_data=False,
        force_all_reduce=False,
        indices=iter(batches),
    )


class _Part(Arm):
    """One module alone, with its own optimizer."""

    def __init__(
        self, shared: Shared, name: str, at_once: int | None, schedule: str = "three_phase"
    ) -> None:
        self.shared, self.name = shared, name
        self.modules = [shared.modules[name]]
        self.optimizer = shared.optimizer.module_infos[name].optimizer
        self.program = shared.compile(schedule)
        chunks = Schedule("lookahead", at_once).chunks(shared.case.microbatches)
        self.chunks = [self._batches(chunk) for chunk in chunks]

    def _batches(self, chunk: range) -> Batches:
        program = self.program
        assert program.rank is not None
        microbatches = [self.shared.batches[index] for index in chunk]
        optional = megatron.optional_inputs(program.model)
        return Batches(program.graph, microbatches, program.rank, program.batch_dims, optional)

    def finish(self) -> None:
        megatron.finish_gradients(
            self.modules[0], self.shared.groups[self.name], force_all_reduce=False
        )

    def close(self) -> None:
        self.program.destroy()


class LanguageOnly(_Part):
    """The language module on embeddings that lie ready: what a step costs without encoders."""

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared, "language", None)
        with torch.no_grad():
            whole = self.program.encode(self.chunks[0])
        self.whole = [value.requires_grad_() for value in whole]

    def forward_backward(self) -> list[Any]:
        (batches,) = self.chunks
        encoded = Encoded(self.program.cut, self.whole)
        encoded.cut(len(batches.microbatches))
        self.program.look_ahead(batches)

        def forward_step(indices: Iterator[int], stage: Any) -> tuple[Any, Any]:
            index = next(indices)
            return self.program.language(batches, index, encoded.leaves[index]), loss_func

        stage = megatron.Stage(self.modules[0], lambda *unused, **named: None)
        indices = range(len(batches.microbatches))
        groups = self.shared.groups["language"]
        logs = _scheduled(self.shared.case, stage, forward_step, groups, indices)
        self.finish()
        return logs


class EncoderOnly(_Part):
    """Encoder and redistribution, forward and backward, from gradients of one."""

    def __init__(self, shared: Shared, at_once: int | None, *, graphs: bool) -> None:
        super().__init__(shared, "images", at_once, "three_phase" + "+graphs" * graphs)

    def forward_backward(self) -> list[Any]:
        with self.program.captured.steady():
            chunks = Chunks(self.program, self.chunks, train=True)
            for _ in self.chunks:
                chunks.turn()
                assert chunks.encoded is not None
                for leaves in chunks.encoded.leaves:
                    for leaf in leaves:
                        leaf.grad = torch.ones_like(leaf)
            chunks.finish()
        self.finish()
        return []


@contextlib.contextmanager
def opened(
    case: Case,
    arms: list[str],
    dtype: torch.dtype,
    overlap: bool,
    note: Callable[[str], object],
    *,
    distributed: bool = True,
) -> Iterator[dict[str, Arm]]:
    """The ``arms`` of one ``family``, built; inside, they share weights, data and groups.

    ``note`` gets the name of each arm before it is built. ``distributed``: the optimizer is, so
    each rank holds its part of the reduced gradients.
    """
    found: dict[str, Arm] = {}
    # What their layouts or their model fail with is the first one's.
    note(arms[0])
    kind = family(arms[0])
    case = case.homogeneous(kind) if kind.startswith("homogeneous") else case
    with colocc.process_groups(case.layouts) as groups:
        shared = None
        if not kind.startswith("first_stage"):
            shared = Shared(case, groups, dtype, overlap, distributed=distributed)
        for name in arms:
            note(name)
            found[name] = _build(name, case, groups, shared, dtype, overlap)
        yield found
        # Not after an error, which is to be seen whatever state the groups are in.
        for arm in found.values():
            arm.close()
        if shared is not None:
            shared.mimo.destroy()


def _build(
    name: str, case: Case, groups: Any, shared: Shared | None, dtype: torch.dtype, overlap: bool
) -> Arm:
    kind, _, number = name.partition("=")
    if shared is None:
        return FirstStage(case, groups, int(number), dtype, overlap)
    if kind == "megatron":
        return Megatron(shared)
    if kind == "language_only":
        return LanguageOnly(shared)
    if kind.startswith("homogeneous"):
        return Colocc(shared, number or "three_phase")
    if kind.removesuffix("+graphs") == "encoder_only":
        at_once, _, _ = number.partition("+")
        return EncoderOnly(
            shared, int(at_once) if at_once else None, graphs=name.endswith("+graphs")
        )
    return Colocc(shared, name)
