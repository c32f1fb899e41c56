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


WAIT = (
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_scatter_backward.default",
)


class Waits(TorchDispatchMode):
    """Records the operations that wait for a GPU, as their result goes to the host or sizes one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in WAIT:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def glue_on_rank(_: int) -> tuple[list[bool], list[str], list[str], str]:
    """Whether text, merge and gradients are Megatron's, what waits there and here, and what is
    refused."""
    with cpu.ranks(), colocc.process_groups(ONE) as groups:
        model = mimo.build(groups, ONE, wrap=False)
        quiet, tokens = megatron.QuietGlue(model), model.special_token_ids
        every = [mimo.batch(3, seed=seed) for seed in range(2)]
        every[1]["input_ids"][2, -3:] = mimo.VOCABULARY - 1
        counts = [int((batch["input_ids"] == mimo.VOCABULARY - 1).sum()) for batch in every]
        quiet.know({"images": counts}, [batch["input_ids"] for batch in every])
        same, theirs, ours, refused = [], Waits(), Waits(), ""
        methods = quiet.methods()
        for index, batch in enumerate(every):
            quiet.turn_to(index)
            ids, places = batch["input_ids"], batch["position_ids"]
            rows = torch.randn(counts[index], mimo.HIDDEN)
            weights = torch.randn(*ids.t().shape, mimo.HIDDEN)
            found = []
            pairs: list[tuple[Waits, Any, Any]] = [
                (theirs, model.get_text_embeddings, model.align_embeddings_by_token_positions),
                (ours, methods["get_text_embeddings"], methods[MERGE]),
            ]
            for seen, text, merge in pairs:
                leaf = rows.clone().requires_grad_()
                with seen:
                    embedded = text(ids, places, tokens)
                    merged = merge({"images": leaf, "text": embedded}, ids, tokens)
                    leaves = [leaf, model.language_model.embedding.word_embeddings.weight]
                    gradients = torch.autograd.grad((merged * weights).sum(), leaves)
                found.append((embedded, merged, *gradients))
            same += [torch.equal(one, other) for one, other in zip(*found, strict=True)]
            with pytest.raises(ValueError, match="Number of images tokens") as caught:
                methods[MERGE]({"images": rows[1:]}, ids, tokens)
            refused = str(caught.value)
        return same, theirs.seen, ours.seen, refused


def test_the_glue_waits_for_nothing_and_is_megatrons(processes: ProcessPool) -> None:
    ((same, theirs, ours, refused),) = processes.run(1, glue_on_rank)
    assert same == [True] * 8
    assert len(theirs) == 10
    assert ours == []
    assert refused == "Number of images tokens (12) does not match number of images embeddings (11)"


def counted_on_rank(_: int) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """The placeholders of two microbatches, where they are known and where they are counted."""
    with cpu.ranks(), colocc.process_groups(ONE) as groups:
        quiet = megatron.QuietGlue(mimo.build(groups, ONE, wrap=False))
        every = [mimo.batch(3, seed=seed)["input_ids"] for seed in range(2)]
        every[1][2, -3:] = mimo.VOCABULARY - 1
        found = []
        for counts in ({}, {"images": [9, 12]}):
            quiet.know(counts, every)
            found.append(quiet._counts)
        return found[0], found[1]


def test_placeholders_are_counted_where_they_are_not_known(processes: ProcessPool) -> None:
    ((counted, known),) = processes.run(1, counted_on_rank)
    assert counted == known == [{"images": 9}, {"images": 12}]
