"""Training the digits VLM through colocc, and reading the held-out scans with it."""

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch._C._distributed_c10d import HashStore
from tqdm import tqdm

import colocc
from colocc.runtime import cpu
from examples import digits_data, digits_report
from examples.digits_data import Batch, Scans
from examples.digits_model import build_model

Device = torch.device


@contextmanager
def ranks() -> Iterator[Device]:
    """The device of this rank inside an initialised torch.distributed: a GPU, or a CPU rank."""
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "nccl"
    else:
        cpu.enable()
        torch.set_num_threads(1)
        device, backend = torch.device("cpu"), "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()
        cpu.disable()


def train_and_read(
    options: argparse.Namespace, layouts: dict[str, colocc.Layout], device: Device
) -> digits_report.Run:
    """What came of training under ``layouts`` and of reading the held-out scans; on every rank."""
    train_scans, held_out = digits_data.load()
    lessons = digits_data.Lessons(
        train_scans, options.global_batch, options.microbatches, options.seed
    )
    with colocc.process_groups(layouts) as groups:
        model = build_model(groups, seed=options.seed, bf16=options.bf16)
        with dumps(options.out / "dumps"):
            program = colocc.compile(
                model, layouts, groups=groups, example_inputs=lessons.step(0)[0]
            )
        with program:
            losses = train(program, lessons, options, device)
        model.eval()
        question = digits_data.prompt(held_out.pixels, torch.zeros(len(held_out), 0).long())
        with colocc.compile(
            model, layouts, groups=groups, example_inputs=question, balance=False
        ) as reader:
            names = read_all(reader, held_out, device)
    right = sum(
        name == digits_data.NAMES[digit]
        for name, digit in zip(names, held_out.digits.tolist(), strict=True)
    )
    return digits_report.Run(
        losses,
        right / len(held_out),
        dist.get_world_size(),
        {n: str(x) for n, x in layouts.items()},
    )


def train(
    program: colocc.Program,
    lessons: digits_data.Lessons,
    options: argparse.Namespace,
    device: Device,
) -> list[float]:
    """The loss of every step, per token over the whole global batch; the same on every rank."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=options.bf16,
        params_dtype=torch.bfloat16 if options.bf16 else torch.float32,
    )
    optimizer = program.optimizer(config)
    model: Any = program.model
    losses: list[float] = []
    with tqdm(total=options.steps, desc="train", disable=dist.get_rank() != 0) as bar:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * warm_then_cool(step, options.steps)
            model.zero_grad_buffer()
            optimizer.zero_grad()
            batches = [to_device(batch, device) for batch in lessons.step(step)]
            logs = program.forward_backward(
                batches, num_microbatches=len(batches), loss_func=loss_of_names
            )
            optimizer.step()
            losses.append(loss_per_token(program, logs, device))
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            bar.update()
    return losses


def warm_then_cool(step: int, steps: int) -> float:
    """The factor on the learning rate: a linear warm-up over 5 %, then half a cosine."""
    return min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


def loss_of_names(
    output: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron's contract for per-token losses: the sum, the tokens it is over, and what to log."""
    losses, mask = output
    total, tokens = (losses * mask).sum(), mask.sum()
    return total, tokens.int(), {"loss": torch.stack([total.detach(), tokens])}


def loss_per_token(program: colocc.Program, logs: list[Any], device: Device) -> float:
    """The mean over all tokens of the step, from the logs of the last stages."""
    total = torch.zeros(2, device=device)
    if logs and program.collection("language").tp.rank() == 0:
        total += torch.stack([log["loss"] for log in logs]).sum(dim=0)
    dist.all_reduce(total)
    return float(total[0] / total[1])


@torch.no_grad()
def read_all(program: colocc.Program, scans: Scans, device: Device) -> list[str]:
    """The names that the model writes for scans, letter by letter, each the likeliest."""
    size = -(-len(scans) // dist.get_world_size()) * dist.get_world_size()
    pixels = scans.pixels[torch.arange(size) % len(scans)]
    tp = program.collection("language").tp
    mine = [row for _, row in program.samples(num_microbatches=1, batch_size=size)["language"]]
    written = torch.zeros(size, 0, dtype=torch.long)
    for place in range(digits_data.NAME_LENGTH):
        position = len(digits_data.PROMPT) - 1 + place

        def likeliest(
            output: tuple[torch.Tensor, Any], non_loss_data: bool, position: int = position
        ) -> torch.Tensor:
            whole = gather_from_tensor_model_parallel_region(output[0][:, position], group=tp)
            letters: torch.Tensor = whole.argmax(dim=-1)
            return letters

        question = digits_data.prompt(pixels, written[:, : digits_data.NAME_LENGTH - 1])
        answers = program.forward_backward(
            [to_device(question, device)],
            num_microbatches=1,
            loss_func=likeliest,
            forward_only=True,
            collect_non_loss_data=True,
        )
        letters = torch.zeros(size, dtype=torch.long, device=device)
        if answers and tp.rank() == 0:
            letters[mine] = answers[0]
        dist.all_reduce(letters)
        written = torch.cat([written, letters.cpu()[:, None]], dim=1)
    return [digits_data.read(row) for row in written[: len(scans)].tolist()]


def to_device(batch: Batch, device: Device) -> Batch:
    """The batch with its tensors on ``device``."""
    return {
        name: to_device(value, device) if isinstance(value, dict) else value.to(device)
        for name, value in batch.items()
    }


@contextmanager
def dumps(folder: Path) -> Iterator[None]:
    """Inside, the compiler writes a page per pass to ``folder``, or where COLOCC_DUMP says."""
    before = os.environ.get("COLOCC_DUMP")
    os.environ["COLOCC_DUMP"] = before or str(folder)
    try:
        yield
    finally:
        del os.environ["COLOCC_DUMP"]  # the pages of the training program stay
