"""Covers colocc/cli.py and colocc/__main__.py."""

import subprocess
import sys

import pytest

from colocc.cli import main

EDGE = ["--layout", "images=dp4", "--layout", "language=tp2,dp2", "--tensor"]


def test_input_that_cannot_be_used_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["explain", *EDGE, "bf16[6,8,4]"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "colocc explain: bf16[6,8,4] has 6 samples, which images (tp1 dp4) and language (tp2 dp2) "
        "cut into 4 equal parts: 6 % 4 = 2. Make it a multiple of 4.\n"
    )


def test_a_command_that_is_none() -> None:
    with pytest.raises(SystemExit) as found:
        main(["explode"])
    assert found.value.code == 2


def test_python_m_colocc() -> None:
    command = [sys.executable, "-m", "colocc", "explain", *EDGE, "bf16[8,8,4]"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "all_gather" in done.stdout
