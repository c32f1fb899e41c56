"""What the user hands to a step: checked, cut for this rank, and agreed on by all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any

from colocc.errors import CaptureError, LayoutError
from colocc.passes.graph import Graph
from colocc.passes.rows import BatchDims, RowsPerItem
from colocc.runtime.agreement import Agreement, Check
from colocc.runtime.data import Batches
from colocc.runtime.fields import plain
from colocc.runtime.fingerprint import fingerprint, outline
from colocc.runtime.finite import check_finite
from colocc.runtime.items import Learned
from colocc.runtime.schedule import Schedule


def take(batches: Iterable[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The next ``count`` microbatches of ``batches``. Raises: LayoutError if there are fewer."""
    if type(count) is not int or count < 1:
        raise LayoutError(f"num_microbatches is {count!r}: give an integer of at least 1")
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise LayoutError(
            f"the batches are a {type(batches).__name__}: give a list or an iterator of dicts, one "
            "for each microbatch"
        )
    taken = list(islice(iter(batches), count))
    if len(taken) < count:
        raise LayoutError(
            f"the batches ended after {len(taken)} of {count} microbatches. Give {count}, or "
            f"num_microbatches={len(taken)}"
        )
    return taken


class Intake:
    """The way of a step's batches into a program on ``rank``.

    ``mine`` is the graph of this rank. What a step teaches (the rows of an item, an item for slots
    that have none) is kept only if the step comes to its end.
    """

    def __init__(
        self,
        graph: Graph,
        mine: Graph,
        rank: int,
        batch_dims: BatchDims,
        optional: frozenset[str],
        *,
        rows_per_item: Mapping[str, RowsPerItem],
        check: Check,
        timeout: timedelta,
        balance: bool,
        local: bool,
    ) -> None:
        self.graph, self.mine, self.rank = graph, mine, rank
        self.batch_dims, self.optional, self.rows_per_item = batch_dims, optional, rows_per_item
        self.check, self.balance, self.local = check, balance, local
        self.agreement = Agreement(timeout)
        templates = {name: places.template for name, places in graph.rows.items()}
        self.learned = Learned({n: item for n, item in templates.items() if item is not None})
        self._compared = False

    def prepare(
        self,
        microbatches: list[Mapping[str, Any]],
        *,
        encodes: bool = True,
        in_chunks: bool = False,
        of: tuple[Batches, range] | None = None,
    ) -> Batches:
        """The microbatches, cut for this rank; with ``encodes``, the encoders run over them as a
        whole. ``in_chunks`` and ``of`` as in Batches. Raises: LayoutError, CaptureError."""
        return Batches(
            self.graph,
            [plain(batch) for batch in microbatches],
            self.rank,
            self.batch_dims,
            self.optional,
            rows_per_item=self.rows_per_item,
            learned=self.learned,
            balance=self.balance,
            local=self.mine if self.local else None,
            encodes=encodes,
            in_chunks=in_chunks,
            of=of,
        )

    def step(self, schedule: Schedule, microbatches: list[Mapping[str, Any]]) -> list[Batches]:
        """The batches that ``schedule`` encodes at once, and behind them the whole step."""
        if len(schedule.chunks(len(microbatches))) == 1:
            (whole,) = self.chunks(schedule, microbatches)
            return [whole, whole]
        if self.local:
            # Of its own samples alone, a rank knows no rows of such a step.
            chunks = self.chunks(schedule, microbatches)
            return [*chunks, self.prepare(microbatches, encodes=False)]
        try:
            whole = self.prepare(microbatches, in_chunks=True)
        except (LayoutError, CaptureError):
            # What is wrong with one chunk is said of it.
            self.chunks(schedule, microbatches)
            raise
        whole.chunks = self.chunks(schedule, microbatches, whole)
        return [*whole.chunks, whole]

    def chunks(
        self,
        schedule: Schedule,
        microbatches: list[Mapping[str, Any]],
        step: Batches | None = None,
    ) -> list[Batches]:
        """The batches that ``schedule`` encodes at once, of a ``step`` that has checked them."""
        try:
            return [
                self.prepare(
                    [microbatches[index] for index in chunk],
                    of=None if step is None else (step, chunk),
                )
                for chunk in schedule.chunks(len(microbatches))
            ]
        except LayoutError as problem:
            if schedule.at_once is None:
                raise
            raise LayoutError(f"schedule {schedule}: {problem}") from problem

    def look(self, batches: Batches) -> None:
        """Raise LayoutError for a NaN or inf that this rank reads, if that is to be checked."""
        if self.check == "finite":
            check_finite(batches, self.mine.placeholders())

    def agree(
        self,
        batches: Batches | None,
        error: Exception | None,
        trained: Iterable[str],
        asked: Sequence[str] = (),
    ) -> None:
        """Return if no rank has an ``error``, all were given the same batch, and the ``trained``
        encoders and what else is ``asked`` for are the same.

        The first batch is compared as a whole, later ones by what decides on the collectives:
        names, shapes and the rows of each sample; of local parts always what is whole. Collective,
        but for later batches with check="first".
        """
        if self._compared and self.check == "first":
            if error is not None:
                raise error
            return
        compare = outline if self._compared and not self.local else fingerprint
        text = "" if batches is None else f"{compare(batches)} trained {', '.join(trained)}"
        text = " with ".join([text, ", ".join(asked)] if asked else [text])
        given = "the input_ids" if self.local else "the batch"
        what = f"{given}, which must be global, and the encoders that are trained"
        self.agreement.settle(what, text, error)
        self._compared = True

    def settle(self, error: Exception | None, made: str = "") -> None:
        """Raise an ``error`` that any rank had when it encoded on all of them, or that they have
        not ``made`` the same."""
        if self.check != "first":
            self.agreement.settle("what the encoders made", made, error)
        elif error is not None:
            raise error

    @contextlib.contextmanager
    def unless_wrong(self) -> Iterator[None]:
        """Inside, an error takes back what the step has taught."""
        before = self.learned.copy()
        try:
            yield
        except BaseException:
            self.learned = before
            raise

    def close(self) -> None:
        """Give the group back; what is then asked of this rank alone is its own."""
        self.agreement.close()
