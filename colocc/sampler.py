"""Which samples of a data set each rank loads, step by step, for torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.utils.data

from colocc.errors import LayoutError
from colocc.runtime.holdings import deals
from colocc.runtime.parts import whole_inputs

if TYPE_CHECKING:
    from colocc.program import Program


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sample that a rank loads for a step: its index in the data set, the place where it stands
    in the step, and the inputs that the rank reads of it ("labels", "modality_inputs.images")."""

    index: int
    microbatch: int
    sample: int
    inputs: frozenset[str]


class Sampler(torch.utils.data.Sampler[list[Wanted]]):
    """What this rank loads, for the ``batch_sampler`` of a DataLoader: a list for each step.

    An epoch is all ``size`` samples, in an order that follows from ``seed`` and the epoch alone; a
    step is the next ``num_microbatches * batch_size`` of them. The samples of an epoch that fill no
    step are left out with ``drop_last``; without it the step is filled from the epoch's start, so
    that some samples come twice.

    ``rows`` gives, of each module whose samples are dealt by their rows (``compile(balance=)``),
    the placeholders of every sample of the data set.

    An iteration starts at the sampler's position, which ``set_epoch``, ``load_state_dict`` and a
    ``Loader`` move, and goes to the end of the epoch. The position is counted in samples of the
    epoch: a run may go on with other layouts, and with another step that divides it.
    """

    def __init__(
        self,
        program: Program,
        size: int,
        *,
        num_microbatches: int,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        rows: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Raises: LayoutError for sizes that make no step, or rows that do not cover them."""
        for name, value in {"size": size, "num_microbatches": num_microbatches,
                            "batch_size": batch_size}.items():  # fmt: skip
            if type(value) is not int or value < 1:
                raise LayoutError(f"{name} is {value!r}: give an integer of at least 1")
        self.program, self.size = program, size
        self.num_microbatches, self.batch_size = num_microbatches, batch_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.rows = {
            name: np.asarray(counts, dtype=np.int64) for name, counts in (rows or {}).items()
        }
        for name, counts in self.rows.items():
            if counts.shape != (size,):
                raise LayoutError(
                    f"rows of {name} has shape {list(counts.shape)}: give one number for each of "
                    f"{size} samples"
                )
        dealt = [name for name in program.graph.layouts if deals(program.graph, name)]
        if program.balance and set(dealt) - self.rows.keys():
            raise LayoutError(
                f"samples of {', '.join(dealt)} are dealt to slots by their rows: give rows= with "
                f"the placeholders of each of the {size} samples, or compile(..., balance=False)"
            )
        self.epoch = self.position = 0
        if len(self) == 0:
            raise LayoutError(
                f"{size} samples make no step of {num_microbatches} microbatches of {batch_size} = "
                f"{self.step_size}: give a smaller step, or write drop_last=False"
            )

    @property
    def step_size(self) -> int:
        """The samples of one step."""
        return self.num_microbatches * self.batch_size

    def __len__(self) -> int:
        """The steps of a whole epoch."""
        return self.size // self.step_size + (not self.drop_last and self.size % self.step_size > 0)

    def __iter__(self) -> Steps:
        return Steps(self, self.epoch, self.position // self.step_size)

    def order(self, epoch: int) -> np.ndarray:
        """The samples of the steps of ``epoch``. Shape: [steps, microbatches, samples]."""
        found = np.arange(self.size)
        if self.shuffle:
            found = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        found = np.resize(found, len(self) * self.step_size)
        return found.reshape(len(self), self.num_microbatches, self.batch_size)

    def wanted(self, indices: np.ndarray) -> list[Wanted]:
        """What this rank loads of a step of these samples, by microbatch and sample.

        Shapes: ``indices`` is [microbatches, samples].
        """
        read = self.program.samples(
            num_microbatches=self.num_microbatches,
            batch_size=self.batch_size,
            rows={name: counts[indices].tolist() for name, counts in self.rows.items()},
        )
        whole = whole_inputs(self.program.graph)
        inputs: dict[tuple[int, int], set[str]] = {}
        for path in whole:
            for place in np.ndindex(*indices.shape):
                inputs.setdefault(place, set()).add(".".join(path))
        for node in self.program.mine.placeholders():
            path = node.meta["path"]
            for place in read[node.meta["module"]] if path not in whole else ():
                inputs.setdefault(place, set()).add(".".join(path))
        for module, places in self.program.graph.rows.items():
            # rows= may read an input that the forward does not.
            for place in read[module] if places.names else ():
                inputs.setdefault(place, set()).update(places.names or ())
        return [
            Wanted(int(indices[place]), *place, frozenset(inputs[place]))
            for place in sorted(inputs)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; stay, if the sampler is inside it."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def move(self, epoch: int, step: int) -> None:
        """Go to ``step`` of ``epoch``; after the last, to the next epoch."""
        self.epoch, self.position = epoch, step * self.step_size
        if step >= len(self):
            self.epoch, self.position = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is meant for."""
        return self._meant() | {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position. Raises: LayoutError if it is one in another order of samples, or inside
        a step."""
        given = {name: state.get(name) for name in self._meant()}
        if given != self._meant():
            raise LayoutError(
                f"the state is of a sampler with {given}, this one has {self._meant()}"
            )
        if state["position"] % self.step_size:
            raise LayoutError(
                f"the state stands at sample {state['position']}, inside a step of "
                f"{self.step_size}: {state['position']} % {self.step_size} = "
                f"{state['position'] % self.step_size}. Give a step that divides it."
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def _meant(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, "shuffle": self.shuffle}


class Steps(Iterator[list[Wanted]]):
    """The steps of one epoch; its state counts those that it gave, as StatefulDataLoader wants."""

    def __init__(self, sampler: Sampler, epoch: int, step: int) -> None:
        self.sampler, self.epoch, self.step = sampler, epoch, step
        self._order = sampler.order(epoch)

    def __next__(self) -> list[Wanted]:
        if self.step >= len(self._order):
            raise StopIteration
        self.step += 1
        return self.sampler.wanted(self._order[self.step - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
        self._order = self.sampler.order(self.epoch)


class Loader(torch.utils.data.DataLoader[Any]):
    """A DataLoader over a Sampler, whose state counts the steps that it handed over.

    However many steps its workers have fetched ahead, ``state_dict`` says what was consumed. Each
    iteration is the rest of an epoch; the next one begins the next epoch.
    """

    def __init__(self, dataset: Any, sampler: Sampler, **options: Any) -> None:
        """``dataset[wanted]`` is one sample; ``collate_fn`` makes a step of those in one list.
        ``options`` are those of torch's DataLoader."""
        super().__init__(dataset, batch_sampler=sampler, **options)
        self.steps = sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch, step = self.steps.epoch, self.steps.position // self.steps.step_size
        for batch in super().__iter__():
            step += 1
            self.steps.move(epoch, step)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position of the sampler after the last step that was handed over."""
        return self.steps.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; the next iteration starts there."""
        self.steps.load_state_dict(state)
