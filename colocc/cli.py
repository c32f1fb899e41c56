"""The command line: what a plan would be, without GPUs, ranks or a model.

    python -m colocc explain --layout images=tp2,dp4 --layout language=tp2,pp2,dp2 \\
        --tensor "bf16[8,576,4096]"
    python -m colocc verify --ranks 16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from colocc import cli_explain, cli_verify
from colocc.errors import LayoutError, VerifyError

COMMANDS = (cli_explain, cli_verify)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m colocc", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    options = parser.parse_args(argv)
    try:
        status: int = options.run(options)
    except (LayoutError, VerifyError) as error:
        print(f"colocc {options.command}: {error}", file=sys.stderr)
        return 2
    return status
