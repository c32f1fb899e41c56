"""Train the digits VLM on colocated layouts: a ViT and a GPT on the same ranks.

    python examples/digits.py demo                              everything, on this machine
    torchrun --nproc-per-node 8 examples/digits.py \\
        --layout images=tp1,dp8 --layout language=tp2,pp2,dp2   the same, layouts as you like
    python examples/digits.py                                   one process

Leaves in --out: loss.json, dumps/ (one page per compiler pass) and, beside the same run on one
process, loss.png. The last line says how many held-out scans the model names rightly.
"""

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the project is not

import colocc
from examples import digits_data, digits_report

MODULES = ("images", "language")
# What megatron-core says about packages and settings that it can do without here.
NOTICES = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "absl.logging is not installed",
    "MimoModelConfig is experimental",
    "When using async grad allreduce it is recommended",
)
DEMO_LANGUAGE = {2: "tp2", 4: "tp2,pp2", 8: "tp2,pp2,dp2"}


def main(argv: list[str] | None = None) -> int:
    """Train, decode, report; the exit status."""
    options = parse(argv)
    if options.mode == "demo":
        return demo(options)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layouts = {name: colocc.Layout(dp=world) for name in MODULES} | dict(options.layout)
    for notice in NOTICES:
        warnings.filterwarnings("ignore", message=notice)
    from examples import digits_train  # Megatron takes seconds to import

    with digits_train.ranks() as device:
        run = digits_train.train_and_read(options, layouts, device)
    if int(os.environ.get("RANK", "0")) == 0:
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
    parser.add_argument(
        "mode", nargs="?", choices=("run", "demo"), default="run",
        help="demo starts the ranks itself: 8 on the CPU, or one for each GPU",
    )  # fmt: skip
    parser.add_argument(
        "--layout", action="append", type=layout_argument, default=[], metavar="images=tp2,dp4",
        help="of images or language; left out: dp over all ranks, in a demo of 8 tp2,pp2,dp2 "
        "for language",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=400)
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
    command += ["--compare" if options.compare else "--no-compare"]
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
