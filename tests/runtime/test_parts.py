"""Covers runtime/parts.py: a MimoModel trained from what each rank loads as from global
batches; parts that are refused."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import colocc
from colocc import Layout, LayoutError, Loader, Sampler, Wanted
from colocc.passes.graph import Graph, token_places
from colocc.passes.solve.solver import solve
from colocc.runtime import cpu
from colocc.runtime.parts import by_microbatch, check_local, in_order, size_of_step
from colocc.testing import float64, relative_l2
from tests import mimo, plain, ragged
from tests.harness import ProcessPool

MICROBATCHES, SIZE = 2, 8
# Samples by microbatch, two a step; the slots that encode samples 0 to 3 see no image at first.
IMAGES = [
    [0, 0, 0, 0, 3, 0, 1, 2],
    [0, 0, 0, 0, 1, 3, 1, 0],
    [3, 0, 1, 2, 1, 1, 0, 0],
    [1, 2, 0, 3, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
]
CASES = {
    "balanced": ({"images": Layout(dp=8), "language": Layout(tp=2, pp=2, dp=2)}, {}),
    "lookahead": (
        {"images": Layout(tp=2, dp=4), "language": Layout(tp=4, dp=2)},
        {"schedule": "lookahead=1", "balance": False},
    ),
}


def seen(program: colocc.Program, step: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The losses of a step on this rank, and its gradients after they are reduced."""
    model: Any = program.model
    model.zero_grad_buffer()
    logs = program.forward_backward(
        step,
        num_microbatches=len(step),
        loss_func=mimo.loss_func,
        force_all_reduce=True,
    )
    gradients = [p.main_grad.clone() for p in model.parameters()]
    return [torch.tensor([log["loss"][0] for log in logs]), *gradients]


def steps_on_rank(
    _: int, layouts: dict[str, Layout], options: dict[str, Any]
) -> tuple[list[list[Wanted]], dict[str, Any]]:
    """What the rank loaded for each step, and what it says of parts that are not its own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu.ranks())
        stack.enter_context(float64())
        batches = [ragged.batch(images, seed=seed) for seed, images in enumerate(IMAGES)]
        dataset = ragged.Samples(batches)
        groups = stack.enter_context(colocc.process_groups(layouts))
        model = mimo.build(groups, layouts)
        whole, local = (
            stack.enter_context(
                colocc.compile(model, layouts, groups=groups, batches=way, **options)
            )
            for way in ("global", "local")
        )
        sampler = Sampler(
            local,
            len(dataset.images),
            num_microbatches=MICROBATCHES,
            batch_size=SIZE,
            shuffle=False,
            rows={"images": dataset.rows.tolist()},
        )
        loader = Loader(dataset, sampler, collate_fn=ragged.collate)
        for place, step in enumerate(loader):
            first = place * MICROBATCHES
            wanted = seen(whole, batches[first : first + MICROBATCHES])
            for index, (one, other) in enumerate(zip(seen(local, step), wanted, strict=True)):
                # BLAS rounds by where a tensor starts in memory: a view, or one of its own.
                assert relative_l2(one, other) <= 1e-12, (place, index)
        assert place == 2
        return list(sampler), refusals(local, batches[:MICROBATCHES], next(iter(loader)))


def refusals(
    program: colocc.Program, whole: list[dict[str, Any]], step: list[dict[str, Any]]
) -> dict[str, str]:
    """What every rank raises alike for parts that do not fit; a good step follows."""
    first, second = step
    odd = {
        "whole": whole,
        "ids": [{**first, "input_ids": first["input_ids"].roll(int(program.rank == 3), 0)}, second],
        "local ids": [{**part, "input_ids": part["input_ids"][:4]} for part in step],
    }
    texts = {}
    for name, parts in odd.items():
        with pytest.raises(LayoutError) as info:
            seen(program, parts)
        texts[name] = str(info.value)
    seen(program, step)
    return texts


@pytest.mark.parametrize(("layouts", "options"), CASES.values(), ids=list(CASES))
def test_parts_train_as_global_batches(
    processes: ProcessPool, layouts: dict[str, Layout], options: dict[str, Any]
) -> None:
    work = partial(steps_on_rank, layouts=layouts, options=options)
    loads, texts = zip(*processes.run(8, work), strict=True)
    for step in range(len(IMAGES) // MICROBATCHES):
        check_images([rank[step] for rank in loads], layouts)
        check_texts([rank[step] for rank in loads], layouts["language"])
    assert all(text == texts[0] for text in texts)
    plain.contains(
        texts[0]["whole"], "8 samples, this rank reads 4 of 8 (input_ids holds so many): 0, 1,"
    )
    # Where samples are dealt by their rows, the rank finds itself with items of others.
    wrong = "not agree on the input_ids" if options else "images: the step has 3 placeholders"
    plain.contains(texts[0]["ids"], wrong, "rank 3")
    plain.contains(texts[0]["local ids"], "4 samples, this rank reads 2 of 4 (input_ids holds")


def overlapped_on_rank(_: int, layouts: dict[str, Layout]) -> list[float]:
    """How far off steps are from those with global batches, where the first slot never has an item
    and reductions overlap backward."""
    with cpu.ranks(), float64(), colocc.process_groups(layouts) as groups:
        batches = [ragged.batch([0, 0, 1, 1], seed=seed) for seed in range(3)]
        model = mimo.build(groups, layouts, overlap=True)
        programs = [
            colocc.compile(model, layouts, groups=groups, batches=way, balance=False)
            for way in ("global", "local")
        ]
        with contextlib.ExitStack() as stack:
            whole, local = map(stack.enter_context, programs)
            sampler = Sampler(local, 12, num_microbatches=1, batch_size=4, shuffle=False)
            loader = Loader(ragged.Samples(batches), sampler, collate_fn=ragged.collate)
            wanted = [seen(whole, [batch]) for batch in batches]
            found = [seen(local, step) for step in loader]
            return [
                relative_l2(one, other)
                for pair in zip(found, wanted, strict=True)
                for one, other in zip(*pair, strict=True)
            ]


def test_a_slot_that_never_has_an_item_reduces_with_the_others(processes: ProcessPool) -> None:
    layouts = {"images": Layout(dp=2), "language": Layout(tp=2)}
    for errors in processes.run(2, partial(overlapped_on_rank, layouts=layouts), timeout=60):
        assert max(errors) <= 1e-12


def check_images(loads: list[list[Wanted]], layouts: dict[str, Layout]) -> None:
    """The ranks of a slot load the same images, and the slots all of them, each once."""
    slots: dict[int, list[int]] = {}
    for slot, load in zip(layouts["images"].coordinates("dp").tolist(), loads, strict=True):
        mine = [wanted.index for wanted in load if ragged.IMAGES in wanted.inputs]
        assert slots.setdefault(slot, mine) == mine
    everything = sorted(itertools.chain(*slots.values()))
    assert everything == sorted({wanted.index for wanted in loads[0]})
    assert len(everything) == MICROBATCHES * SIZE


def check_texts(loads: list[list[Wanted]], language: Layout) -> None:
    """Ranks read the text of their replica alone; the ids are everyone's."""
    part = SIZE // language.dp
    for rank, load in enumerate(loads):
        replica = int(language.coordinates("dp")[rank])
        for wanted in load:
            assert "input_ids" in wanted.inputs
            mine = wanted.sample // part == replica
            assert {"labels", "position_ids"} & wanted.inputs == (
                {"labels", "position_ids"} if mine else set()
            )


# ---------------------------------------------------------------- no ranks


def test_the_reader_s_order_is_by_replica_then_microbatch() -> None:
    values = [np.array([0, 1, 2, 3]), np.array([10, 11, 12, 13])]
    order = in_order(values, 2)
    assert order.tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert [found.tolist() for found in by_microbatch(order, 2, 2)] == [v.tolist() for v in values]


def test_layouts_whose_parts_do_not_tell_enough_are_refused() -> None:
    layouts = {"images": Layout(tp=2, dp=4, sp=True), "language": Layout(tp=4, dp=2)}
    rows = token_places({"images": 9})
    graph = Graph(torch.fx.Graph(), "model", layouts, {}, sink="language", rows=rows)
    check_local(graph, "three_phase", "every")
    with pytest.raises(LayoutError, match=r"schedule 'filled' .* Write batches='global'"):
        check_local(graph, "filled", "every")
    with pytest.raises(LayoutError, match="check='first' compares the first batch alone"):
        check_local(graph, "three_phase", "first")
    node = graph.fx.placeholder("images")
    node.meta["rows"] = solve(*layouts.items(), dims=("sample", "row", "position"))
    with pytest.raises(LayoutError, match=r"images \(tp2 dp4 sp\) cuts the rows of each item"):
        check_local(graph, "three_phase", "every")


def test_compile_refuses_another_way_to_give_batches() -> None:
    with pytest.raises(LayoutError, match="batches is 'some': write 'global' or 'local'"):
        colocc.compile(plain.model(), plain.LAYOUTS, example_inputs=plain.batch(), batches="some")


def test_plain_parts_of_other_samples_are_refused_on_every_rank() -> None:
    """A microbatch of 8 samples by its mask, of which this rank would encode others."""

    def work(_: int) -> None:
        example = plain.batch()
        with colocc.compile(
            plain.model(), plain.LAYOUTS, example_inputs=example, batches="local"
        ) as program:
            program(**{name: value[:4] for name, value in example.items()})

    text = plain.refused(8, work)
    plain.contains(text, "images of microbatch 0 has 4 samples, this rank reads 2 of 8")


def test_packed_sequences_are_not_local() -> None:
    graph = Graph(torch.fx.Graph(), "model", CASES["balanced"][0], {}, sink="language")
    graph.packing = "packing_kwargs"
    with pytest.raises(LayoutError, match=r"microbatch 0 has packing_kwargs: .* batches='global'"):
        size_of_step(graph, [{"packing_kwargs": {}}], {})
