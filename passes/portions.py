"""Who encodes which samples of a microbatch in the pipeline's bubbles, and who sends what to whom.

Each replica's samples of a microbatch are cut into portions. A portion is encoded on one stage of
the reader, by all encoder slots of that stage together; a slot takes samples of the replicas that
its own ranks belong to. The first stage reads all of them. A slot's samples go from each of its
ranks to the reader with the same tp coordinate; readers without such a rank get them from one with.
The gradient goes back along the tp coordinates, as all readers hold it. So a rank has messages to
or from one rank of each stage, however wide the stages are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from colocc.errors import LayoutError
from colocc.layout import Layout
from colocc.passes.fillable import slots_by_stage
from colocc.sequence import axes_of

Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples ``start`` to ``stop`` of a global microbatch, all of one replica of the reader, that
    the ``ranks`` of one slot encode."""

    ranks: Ranks
    replica: int
    start: int
    stop: int


class Portions:
    """The split of microbatches of an encoder's samples over the stages of its reader.

    Raises: LayoutError for a pair of layouts whose bubbles cannot be filled.
    """

    def __init__(self, encoder: tuple[str, Layout], sink: tuple[str, Layout]) -> None:
        (name, layout), (reader, self.sink) = encoder, sink
        if self.sink.pp == 1:
            raise LayoutError(
                f"schedule 'filled' runs {name} in the bubbles of {reader} ({self.sink}), which is "
                "not pipelined: write schedule='lookahead=2'"
            )
        for title, found in (encoder, sink):
            if axes_of(found):
                raise LayoutError(
                    f"schedule 'filled' moves whole samples, {title} ({found}) cuts their sequence "
                    f"over {' and '.join(axes_of(found))}. Write schedule='three_phase', or leave "
                    "out cp and sp."
                )
        dp = layout.coordinates("dp").tolist()
        groups = {dp[group[0]]: group for group in layout.groups("tp", "cp")}
        self.slots = tuple(
            tuple(tuple(groups[slot]) for slot in slots) for slots in slots_by_stage(encoder, sink)
        )
        self._replica = self.sink.coordinates("dp").tolist()
        self._lane = self.sink.coordinates("tp").tolist()
        stage = self.sink.coordinates("pp").tolist()
        self.readers = tuple(
            tuple(
                rank
                for rank in range(self.sink.size)
                if stage[rank] == 0 and self._replica[rank] == replica
            )
            for replica in range(self.sink.dp)
        )

    def pieces(self, stage: int, portion: int, portions: int, size: int) -> list[Piece]:
        """What the slots of ``stage`` encode of ``portion`` of a microbatch of ``size`` samples.

        The samples of a replica need not divide by the portions and slots: then a piece may be
        empty.
        """
        share = size // self.sink.dp
        found = []
        for replica in range(self.sink.dp):
            slots = [slot for slot in self.slots[stage] if self._touches(slot, replica)]
            first, last = (share * at // portions for at in (portion, portion + 1))
            for place, slot in enumerate(slots):
                start, stop = (
                    replica * share + first + (last - first) * at // len(slots)
                    for at in (place, place + 1)
                )
                found.append(Piece(slot, replica, start, stop))
        return found

    def _touches(self, slot: Ranks, replica: int) -> bool:
        return any(self._replica[rank] == replica for rank in slot)

    def source(self, piece: Piece, reader: int) -> int | None:
        """The rank from which ``reader``, on the first stage, gets ``piece``, itself if it has it;
        None where a peer hands it on."""
        return self._lanes_of(piece).get(self._lane[reader])

    def carrier(self, piece: Piece, reader: int) -> int | None:
        """The peer of ``reader`` that hands ``piece`` on to it; None where it gets that itself."""
        readers, lanes = self.readers[piece.replica], self._lanes_of(piece)
        if self._lane[reader] in lanes:
            return None
        carriers = [rank for rank in readers if self._lane[rank] in lanes]
        return carriers[readers.index(reader) % len(carriers)]

    def _lanes_of(self, piece: Piece) -> dict[int, int]:
        """By tp coordinate, the ranks that encode ``piece`` and are of its replica."""
        return {
            self._lane[rank]: rank for rank in piece.ranks if self._replica[rank] == piece.replica
        }

    def gradient_source(self, piece: Piece, rank: int) -> int:
        """The rank on the first stage from which ``rank`` of the slot gets the gradient of
        ``piece``."""
        readers = self.readers[piece.replica]
        return next(reader for reader in readers if self._lane[reader] == self._lane[rank])

    def routes(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The (sender, receiver) pairs of embeddings, and those of gradients, in order."""
        embeddings, gradients = set[tuple[int, int]](), set[tuple[int, int]]()
        for piece in self._every_piece():
            for reader in self.readers[piece.replica]:
                if (source := self.source(piece, reader)) is not None:
                    embeddings.add((source, reader))
            for rank in piece.ranks:
                gradients.add((self.gradient_source(piece, rank), rank))
        apart = [sorted(p for p in pairs if p[0] != p[1]) for pairs in (embeddings, gradients)]
        return apart[0], apart[1]

    def _every_piece(self) -> Iterator[Piece]:
        for stage in range(self.sink.pp):
            yield from self.pieces(stage, 0, 1, self.sink.size * self.sink.dp)

    def choices(self, size: int) -> list[int]:
        """Into how many portions a microbatch of ``size`` samples can be cut evenly."""
        share = size // self.sink.dp
        slots = len(self.slots[0])
        at_once = max(1, share * self.sink.dp // slots)
        return [count for count in range(1, at_once + 1) if share % count == 0]
