"""Covers passes/portions.py."""

import pytest

from colocc import Layout, LayoutError
from colocc.passes.portions import Portions

PAIRS = [
    (Layout(dp=2), Layout(pp=2)),
    (Layout(tp=2, dp=4), Layout(tp=2, pp=2, dp=2)),
    (Layout(tp=4, dp=2), Layout(tp=2, pp=2, dp=2)),
    (Layout(dp=8), Layout(tp=4, pp=2)),
    (Layout(tp=2, dp=4), Layout(pp=4, dp=2)),
    (Layout(tp=2, dp=4, order="tp-cp-pp-dp"), Layout(tp=2, pp=2, dp=2, order="tp-cp-pp-dp")),
]


@pytest.mark.parametrize(("encoder", "sink"), PAIRS)
@pytest.mark.parametrize("portions", [1, 2, 3])
@pytest.mark.parametrize("share", [1, 2, 5])
def test_every_sample_is_encoded_once(
    encoder: Layout, sink: Layout, portions: int, share: int
) -> None:
    split, size = Portions(("images", encoder), ("language", sink)), share * sink.dp
    for stage in range(sink.pp):
        seen: list[int] = []
        for portion in range(portions):
            for piece in split.pieces(stage, portion, portions, size):
                samples = range(piece.start, piece.stop)
                assert all(sample // share == piece.replica for sample in samples)
                seen += samples
        assert sorted(seen) == list(range(size))


@pytest.mark.parametrize(("encoder", "sink"), PAIRS)
def test_messages_go_between_the_first_stage_and_the_slot(encoder: Layout, sink: Layout) -> None:
    split = Portions(("images", encoder), ("language", sink))
    stage, lane = (sink.coordinates(axis).tolist() for axis in ("pp", "tp"))
    embeddings, gradients = split.routes()
    for at in range(sink.pp):
        for piece in split.pieces(at, 0, 1, 8 * sink.dp):
            assert {stage[rank] for rank in piece.ranks} == {at}
            readers = split.readers[piece.replica]
            for reader in readers:
                source, carrier = split.source(piece, reader), split.carrier(piece, reader)
                assert (source is None) == (carrier is not None)
                if source is None:
                    assert carrier in readers
                    source = split.source(piece, carrier)
                    assert source is not None
                    assert (source, carrier) in embeddings or source == carrier
                else:
                    assert lane[source] == lane[reader]
                    assert source == reader or (source, reader) in embeddings
                assert source in piece.ranks
            for rank in piece.ranks:
                source = split.gradient_source(piece, rank)
                assert source in readers
                assert lane[source] == lane[rank]
                assert source == rank or (source, rank) in gradients


@pytest.mark.parametrize(("encoder", "sink"), PAIRS)
def test_a_rank_has_messages_with_one_rank_of_a_stage(encoder: Layout, sink: Layout) -> None:
    split = Portions(("images", encoder), ("language", sink))
    stage = sink.coordinates("pp").tolist()
    for pairs in split.routes():
        for rank in range(sink.size):
            peers = [pair[pair[0] == rank] for pair in pairs if rank in pair]
            stages = [stage[peer] for peer in peers]
            # A slot of two replicas has the readers of both.
            most = 1 if encoder.tp <= sink.tp else encoder.tp // sink.tp
            assert all(stages.count(at) <= most for at in stages)


def test_readers_without_a_rank_of_the_slot_share_its_carriers() -> None:
    split = Portions(("images", Layout(tp=2, dp=4)), ("language", Layout(tp=4, pp=2)))
    piece = split.pieces(1, 0, 1, 8)[0]
    assert piece.ranks == (4, 5)
    assert [split.source(piece, reader) for reader in range(4)] == [4, 5, None, None]
    assert [split.carrier(piece, reader) for reader in range(4)] == [None, None, 0, 1]
    assert [split.gradient_source(piece, rank) for rank in piece.ranks] == [0, 1]


def test_even_cuts() -> None:
    split = Portions(("images", Layout(dp=2)), ("language", Layout(pp=2)))
    assert split.choices(1) == [1]
    assert split.choices(4) == [1, 2, 4]
    assert split.choices(6) == [1, 2, 3, 6]


@pytest.mark.parametrize(
    ("encoder", "sink", "text"),
    [
        (Layout(dp=2), Layout(tp=2), "not pipelined: write schedule='lookahead=2'"),
        (Layout(tp=2), Layout(pp=2), "are on the stages"),
        (Layout(cp=2, dp=2), Layout(pp=2, dp=2), "cuts their sequence over cp"),
    ],
)
def test_refused(encoder: Layout, sink: Layout, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        Portions(("images", encoder), ("language", sink))
