"""Covers runtime/megatron/glue.py: what a MimoModel's own glue computes, without a wait."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import colocc
from colocc import Layout
from colocc.runtime import cpu, megatron
from tests import mimo
from tests.harness import ProcessPool

ONE = {"images": Layout(), "language": Layout()}
MERGE = "align_embeddings_by_token_positions"


class Waits(TorchDispatchMode):
    """Records the operations that wait for a GPU, as their result goes to the host or sizes one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in ("aten._local_scalar_dense.default", "aten.nonzero.default"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def glue_on_rank(_: int) -> tuple[list[bool], list[str], list[str], str]:
    """Whether text and merge are Megatron's, what waits there and here, and what is refused."""
    with cpu.ranks(), colocc.process_groups(ONE) as groups, torch.no_grad():
        model = mimo.build(groups, ONE, wrap=False)
        quiet, tokens = megatron.QuietGlue(model), model.special_token_ids
        every = [mimo.batch(3, seed=seed) for seed in range(2)]
        every[1]["input_ids"][2, -3:] = mimo.VOCABULARY - 1
        quiet.count([batch["input_ids"] for batch in every])
        same, theirs, ours, refused = [], Waits(), Waits(), ""
        methods = quiet.methods()
        for index, batch in enumerate(every):
            quiet.turn_to(index)
            ids, places = batch["input_ids"], batch["position_ids"]
            rows = {"images": torch.randn(int((ids == mimo.VOCABULARY - 1).sum()), mimo.HIDDEN)}
            found = []
            pairs: list[tuple[Waits, Any, Any]] = [
                (theirs, model.get_text_embeddings, model.align_embeddings_by_token_positions),
                (ours, methods["get_text_embeddings"], methods[MERGE]),
            ]
            for seen, text, merge in pairs:
                with seen:
                    embedded = text(ids, places, tokens)
                    merged = merge(rows | {"text": embedded}, ids, tokens)
                found.append((embedded, merged))
            same += [torch.equal(one, other) for one, other in zip(*found, strict=True)]
            with pytest.raises(ValueError, match="Number of images tokens") as caught:
                methods[MERGE]({"images": rows["images"][1:]}, ids, tokens)
            refused = str(caught.value)
        return same, theirs.seen, ours.seen, refused


def test_the_glue_waits_for_nothing_and_is_megatrons(processes: ProcessPool) -> None:
    ((same, theirs, ours, refused),) = processes.run(1, glue_on_rank)
    assert same == [True] * 4
    assert len(theirs) == 6
    assert ours == []
    assert refused == "Number of images tokens (12) does not match number of images embeddings (11)"
