"""python -m colocc verify."""

from __future__ import annotations

import argparse
import json
import re

import pytest

from colocc import cli_verify
from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.solve.enumerate import USUAL, Pair, Verdict


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli_verify.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["verify", *words])


def test_verify_closes_with_one_line_and_lists_the_kinds_above(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli_verify.run(options("--ranks", "4", "--jobs", "1")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("worlds of 1 to 4 ranks; axes tp,cp,pp,dp; every order; ")
    assert re.fullmatch(
        r"781 pairs, 0 wrong forward, 0 wrong backward, worst received/bound ratio 3\.00, "
        r"\d+\.\d seconds",
        lines[2],
    )
    assert lines[3] == "above 1.00 (42 directions; all others are at 1.00):"
    assert lines[4].endswith(": bwd every cell has n summands, one on each cp rank")
    assert len(lines) == 5


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--powers", "8", "--axes", "dp,tp", "--orders", "usual", "--jobs", "1", "--json")
    assert cli_verify.run(options(*words)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["worlds"] == [1, 2, 4, 8]
    assert found["axes"] == ["tp", "dp"]
    assert found["orders"] == "usual"
    assert found["wrong"] == {"forward": 0, "backward": 0, "shown": []}
    assert found["worst_ratio"] == 1
    assert found["above"] == []
    assert found["pairs"] > found["layout_pairs"] > 16


def test_processes_find_what_one_finds(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for jobs in ("1", "2"):
        cli_verify.run(options("--ranks", "3", "--jobs", jobs, "--json"))
        found.append(json.loads(capsys.readouterr().out) | {"seconds": 0})
    assert found[0] == found[1]


def test_parts_are_together_the_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_verify, "CHUNK", 16)
    found = []
    for part in ("1/1", "1/3", "2/3", "3/3"):
        cli_verify.run(options("--ranks", "4", "--jobs", "1", "--json", "--part", part))
        found.append(json.loads(capsys.readouterr().out))
    whole, *parts = (one["pairs"] for one in found)
    assert whole == sum(parts)
    assert min(parts) > whole / 4
    assert found[2]["part"] == [2, 3]
    cli_verify.run(options("--ranks", "4", "--jobs", "1", "--part", "2/3"))
    assert capsys.readouterr().out.startswith("part 2 of 3:\n")


def test_a_wrong_pair_is_shown_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(*_: object) -> list[tuple[Pair, Verdict]]:
        pair = (Layout(dp=2), Layout(tp=2), "whole")
        return [(pair, Verdict(("plan a is wrong", ""))), (pair, Verdict(("", "plan b is wrong")))]

    monkeypatch.setattr(cli_verify, "judged", judged)
    assert cli_verify.run(options("--ranks", "2")) == 1
    text = capsys.readouterr().out
    assert text.startswith("wrong: plan a is wrong\nwrong: plan b is wrong\n")
    assert "2 pairs, 1 wrong forward, 1 wrong backward" in text


def test_orders_are_all_up_to_16_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def judged(_: object, __: object, orders: object, *more: object) -> list[object]:
        asked.append(orders)
        return []

    monkeypatch.setattr(cli_verify, "judged", judged)
    monkeypatch.setattr(cli_verify, "written", lambda *_: 0)
    for words in (("--ranks", "16"), ("--ranks", "17"), ("--powers", "32", "--orders", "all")):
        cli_verify.run(options(*words))
    assert asked == [None, USUAL, None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ranks", "0"), "--ranks is 0: write 1 to 4096"),
        (("--powers", "5000"), "--powers is 5000: write 1 to 4096"),
        (("--ranks", "2", "--jobs", "0"), "--jobs is 0: give at least 1"),
        (("--ranks", "2", "--part", "3/2"), "--part is '3/2': write 1/4 for the first of four"),
        (("--ranks", "2", "--part", "0/2"), "--part is '0/2': write 1/4 for the first of four"),
        (("--ranks", "2", "--axes", "tp,xp"), "--axes is 'tp,xp': write some of tp,cp,pp,dp"),
        (("--ranks", "2", "--axes", "tp,tp"), "--axes is 'tp,tp': write some of tp,cp,pp,dp"),
    ],
)
def test_bad_options_are_one_error(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(LayoutError) as info:
        cli_verify.run(options(*words))
    assert str(info.value).startswith(message)
