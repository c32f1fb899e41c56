"""Train the digits VLM on colocated layouts: a ViT and a GPT share the ranks, each laid out its
way.

    python examples/digits.py demo                              everything, on this machine
    torchrun --nproc-per-node 8 examples/digits.py \\
        --layout images=tp1,dp8 --layout language=tp2,pp2,dp2   the same, layouts as you like
    python examples/digits.py                                   one process

Leaves in --out: loss.json, dumps/ (one page per compiler pass) and, beside the same run on one
process, loss.png. The last line says how many held-out scans the model names rightly.
"""

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the project is not

from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from tqdm import tqdm

import colocc
from colocc.runtime import cpu
from examples import digits_data, digits_report
from examples.digits_data import Batch, Scans
from examples.digits_model import build_model

Device = torch.device
MODULES = ("images", "language")
# What megatron-core says on import about packages that it can do without.
NOTICES = (
    "Transformer Engine and Apex are not",
    "Apex is not",
    "absl.logging is not",
    "MimoModelConfig is experimental",
)
DEMO_LANGUAGE = {2: "tp2", 4: "tp2,pp2", 8: "tp2,pp2,dp2"}


def main(argv: list[str] | None = None) -> int:
    """Train, decode, report; the exit status."""
    options = parse(argv)
    if options.mode == "demo":
        return demo(options)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layouts = {name: colocc.Layout(dp=world) for name in MODULES} | dict(options.layout)
    with ranks() as device:
        run = train_and_read(options, layouts, device)
        first = dist.get_rank() == 0
    if first:
        digits_report.write(run, options.out)
        if options.compare and world > 1:
            reference = one_process(options)
            digits_report.plot(run, reference, options.out / "loss.png")
            print(digits_report.difference(run, reference))
        print(digits_report.closing_line(run), flush=True)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Exits with a message for numbers that do not fit together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode", nargs="?", choices=("run", "demo"), default="run")
    parser.add_argument(
        "--layout", action="append", type=layout_argument, default=[], metavar="images=tp2,dp4"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="weights and activations; on by itself on GPUs",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/digits"))
    parser.add_argument(
        "--compare", action=argparse.BooleanOptionalAction, default=True,
        help="repeat the run on one process and draw both",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for name in ("steps", "global_batch", "microbatches"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}: at least 1")
    batch, microbatches = options.global_batch, options.microbatches
    if batch % microbatches:
        parser.error(
            f"--global-batch {batch} in --microbatches {microbatches}: {batch} % {microbatches} = "
            f"{batch % microbatches}; give a multiple of {microbatches}"
        )
    if batch > len(digits_data.load()[0]):
        parser.error(f"--global-batch {batch}: the training scans are fewer")
    return options


def layout_argument(text: str) -> tuple[str, colocc.Layout]:
    """``images=tp2,dp4`` as a name and a layout."""
    name, equals, axes = text.partition("=")
    if not equals or name not in MODULES:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no module: write images=tp2,dp4 or language=tp2,pp2,dp2"
        )
    try:
        return name, colocc.Layout.parse(axes)
    except colocc.LayoutError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
        with colocc.compile(model, layouts, groups=groups, example_inputs=question) as reader:
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


def one_process(options: argparse.Namespace) -> digits_report.Run:
    """The same run on one process, started afresh outside torchrun."""
    out = options.out / "one"
    alien = ("RANK", "WORLD_SIZE", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "TORCHELASTIC_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(alien)}
    environ.pop("COLOCC_DUMP", None)
    command = [sys.executable, __file__, *numbers(options), "--out", str(out)]
    subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True)
    return digits_report.read(out)


def numbers(options: argparse.Namespace) -> list[str]:
    """The options that any layout shares, as they are written on a command line."""
    names = ("steps", "global_batch", "microbatches", "learning_rate", "seed")
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(options, name))) for name in names]
    return [*(word for pair in pairs for word in pair), "--bf16" if options.bf16 else "--no-bf16"]


def demo(options: argparse.Namespace) -> int:
    """Run on 8 CPU ranks, or on the GPUs that torch sees; the exit status."""
    world = torch.cuda.device_count() or 8
    language = DEMO_LANGUAGE.get(world, f"dp{world}")
    layouts = dict(options.layout)
    words = [
        f"images={layouts.get('images') or f'tp1,dp{world}'}".replace(" ", ","),
        f"language={layouts.get('language') or language}".replace(" ", ","),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world), __file__, *numbers(options)]
    command += ["--out", str(options.out), *(w for word in words for w in ("--layout", word))]
    ignored = ",".join(f"ignore:{notice}:UserWarning" for notice in NOTICES)
    command += ["--compare" if options.compare else "--no-compare"]
    environ = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ignored, **os.environ}
    return subprocess.run(command, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
