"""Covers runtime/links.py: what shares a queue, what is refused, and that messages which wait for
each other as NCCL's do come to an end."""

import contextlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import colocc
from colocc import Layout, LayoutError
from colocc.passes.portions import Portions
from colocc.runtime import cpu
from colocc.runtime.channels import Arrival, Channel
from colocc.runtime.filled import Filled
from colocc.runtime.lanes import Lanes
from colocc.runtime.links import Link, check_links, links_of
from tests import mimo
from tests.harness import ProcessPool
from tests.oracle import ORDERS, batches, layouts_of
from tests.runtime.test_filled import LEGAL

Message = tuple[str, int, int, int]
"""Kind, sender, receiver, and which one of these."""
Event = tuple[str, Any]
Log = dict[str, list[Event]]
"""What each lane of a rank does: post or wait for a message, mark or take, meet its peers; as
"host", all posts in the order of the host, which is that of the queues; as "all", everything in
that order."""
ORDERED = {"host", "all"}


def portions(layouts: dict[str, Layout]) -> Portions:
    return Portions(("images", layouts["images"]), ("language", layouts["language"]))


@pytest.mark.parametrize(("encoder", "language", "order"), LEGAL)
def test_no_link_carries_messages_both_ways(
    encoder: tuple[int, int], language: tuple[int, int, int], order: str
) -> None:
    split = portions(layouts_of(encoder, language, order))
    links = links_of(split)
    for link in links:
        assert link.pairs
        assert len({frozenset(pair) for pair in link.pairs}) == len(link.pairs)
        for sender, receiver in link.pairs:
            assert any(sender in members and receiver in members for members in link.lists)
    carried = [pair for link in links[2:] for pair in link.pairs]
    assert Counter(carried) == Counter(itertools.chain(*split.routes()))


class Recorder:
    """What the lanes of this rank do in a step of ``filled``."""

    def __init__(self) -> None:
        self.log: Log = defaultdict(list)
        self.lane = "main"
        self.counts: Counter[tuple[Any, ...]] = Counter()
        self.kinds: dict[int, str] = {}
        self.marks = itertools.count()

    def add(self, event: str, what: Any) -> None:
        self.log[self.lane].append((event, what))
        self.log["all"].append((event, what))

    def message(self, channel: Channel, sender: int, receiver: int) -> Message:
        place = (self.kinds[id(channel)], sender, receiver)
        self.counts[place] += 1
        message = (*place, self.counts[place])
        self.add("post", message)
        self.log["host"].append(("post", message))
        return message

    @contextlib.contextmanager
    def on(self, which: int) -> Iterator[None]:
        before, self.lane = self.lane, ("pipeline", "encoders")[which]
        yield
        self.lane = before


def watched(patch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    """Have every message, mark and language task of this rank recorded."""
    send, receive, wait, before = Channel.send, Channel.receive, Arrival.wait, Filled.before
    arrivals: dict[int, tuple[Arrival, Message]] = {}

    def sends(self: Channel, tensor: torch.Tensor, receiver: int) -> None:
        recorder.message(self, dist.get_rank(), receiver)
        send(self, tensor, receiver)

    def receives(self: Channel, buffer: torch.Tensor, sender: int) -> Arrival:
        message = recorder.message(self, sender, dist.get_rank())
        found = receive(self, buffer, sender)
        arrivals[id(found)] = found, message
        return found

    def waits(self: Arrival) -> None:
        recorder.add("wait", arrivals[id(self)][1])
        wait(self)

    def mark(self: Lanes) -> Any:
        found = next(recorder.marks)
        recorder.add("mark", found)
        return found

    def take(tensor: torch.Tensor, found: Any) -> torch.Tensor:
        recorder.add("take", found)
        return tensor

    def behind(self: Lanes) -> None:
        found = "behind", next(recorder.marks)
        recorder.log["pipeline"].append(("mark", found))
        recorder.log["encoders"].append(("take", found))

    def comes_before(self: Filled, place: int, *ask: Any) -> None:
        before(self, place, *ask)
        # What follows is a language task, in which the ranks of a stage and replica meet.
        recorder.add("meet", (self.bubbles.stage, place))

    for owner, name, new in (
        (Channel, "send", sends),
        (Channel, "receive", receives),
        (Arrival, "wait", waits),
        (Lanes, "mark", mark),
        (Lanes, "behind", behind),
        (Lanes, "take", staticmethod(take)),
        (Lanes, "_on", lambda self, which: recorder.on(which)),
        (Filled, "before", comes_before),
    ):
        patch.setattr(owner, name, new)


def recorded_on_rank(
    _: int, layouts: dict[str, Layout], schedule: str, count: int, apart: bool
) -> Log:
    recorder = Recorder()
    with (
        pytest.MonkeyPatch.context() as patch,
        cpu.ranks(),
        colocc.process_groups(layouts) as groups,
    ):
        model = mimo.build(groups, layouts)
        with colocc.compile(model, layouts, groups=groups, schedule=schedule) as program:
            assert program.bubbles is not None
            program.bubbles.apart = apart
            names = ("onward", "back", "embeddings", "gradients")
            recorder.kinds = {id(getattr(program.bubbles, n)): n for n in names}
            watched(patch, recorder)
            program.forward_backward(
                batches(count), num_microbatches=count, loss_func=mimo.loss_func
            )
    return dict(recorder.log)


def waiting(log: Log) -> Log:
    """``log`` where the host waits after each step for all that it has launched."""
    steps: list[Event] = []
    for event, what in log["all"]:
        steps += [(event, what), ("wait", what)] if event == "post" else [(event, what)]
    return {"one lane": steps, "host": log["host"]}


def stuck(logs: list[Log], language: Layout, *, one_queue: bool) -> list[str]:
    """What the lanes wait for when nothing goes on any more, if messages are NCCL's: a send ends
    with its receive, and of those between two ranks in one group, only the oldest can.

    ``one_queue``: a group carries messages of both directions.
    """
    at = {(rank, lane): 0 for rank, log in enumerate(logs) for lane in log if lane not in ORDERED}
    queues: dict[Any, list[Message]] = defaultdict(list)
    for rank, log in enumerate(logs):
        for _, message in log["host"]:
            kind, sender, receiver, _ = message
            way = "" if one_queue else sender < receiver
            queues[rank, kind, way, frozenset((sender, receiver))].append(message)
    posted: Counter[Message] = Counter()
    done: set[Any] = set()
    replica = language.coordinates("dp").tolist()
    meeting: Counter[Any] = Counter()
    met: set[Any] = set()

    def passes(rank: int, lane: str, event: str, what: Any) -> bool:
        if event == "wait":
            return what in done
        if event == "take":
            return (rank, what) in done
        if event == "meet":
            place = (replica[rank], *what)
            if (rank, lane, what) not in met:
                met.add((rank, lane, what))
                meeting[place] += 1
            return meeting[place] == language.tp * language.cp
        if event == "mark":
            done.add((rank, what))
        else:
            posted[what] += 1
        return True

    moving = True
    while moving:
        moving = False
        for (rank, lane), place in list(at.items()):
            while place < len(logs[rank][lane]) and passes(rank, lane, *logs[rank][lane][place]):
                place += 1
                moving = True
            at[rank, lane] = place
        heads = Counter(queue[0] for queue in queues.values() if queue)
        for queue in queues.values():
            if queue and heads[queue[0]] == posted[queue[0]] == 2:
                done.add(queue.pop(0))
                moving = True
    assert posted
    return [
        f"rank {rank}, {lane}: {logs[rank][lane][place]}"
        for (rank, lane), place in at.items()
        if place < len(logs[rank][lane])
    ]


QUEUED = [
    ((1, 2), (1, 2, 1), ORDERS[0]),
    ((1, 4), (2, 2, 1), ORDERS[0]),
    ((1, 4), (1, 4, 1), ORDERS[0]),
    *(case for case in LEGAL if case[0] != (1, 8) or case[2] == ORDERS[0]),
]


@pytest.mark.parametrize(("schedule", "apart"), [("filled=1", False), ("filled", True)])
@pytest.mark.parametrize(("encoder", "language", "order"), QUEUED)
def test_messages_that_wait_for_each_other_come_to_an_end(
    processes: ProcessPool,
    encoder: tuple[int, int],
    language: tuple[int, int, int],
    order: str,
    schedule: str,
    apart: bool,
) -> None:
    layouts = layouts_of(encoder, language, order)
    work = partial(recorded_on_rank, layouts=layouts, schedule=schedule, count=6, apart=apart)
    logs = processes.run(layouts["language"].size, work)
    assert stuck(logs, layouts["language"], one_queue=False) == []


@pytest.mark.parametrize("case", [QUEUED[1], QUEUED[2], ((2, 2), (1, 2, 2), ORDERS[0]), QUEUED[-1]])
def test_hosts_that_wait_for_what_they_launched_come_to_an_end(
    processes: ProcessPool, case: tuple[tuple[int, int], tuple[int, int, int], str]
) -> None:
    layouts = layouts_of(*case)
    work = partial(recorded_on_rank, layouts=layouts, schedule="filled", count=6, apart=True)
    logs = processes.run(layouts["language"].size, work)
    assert stuck(list(map(waiting, logs)), layouts["language"], one_queue=False) == []


def test_a_message_waits_in_the_lane_of_its_tasks(processes: ProcessPool) -> None:
    layouts = layouts_of((1, 4), (1, 4, 1), ORDERS[0])
    work = partial(recorded_on_rank, layouts=layouts, schedule="filled", count=6, apart=True)
    for rank, log in enumerate(processes.run(4, work)):
        lanes = defaultdict(set)
        for lane in log.keys() - ORDERED:
            for event, what in log[lane]:
                if event == "post":
                    kind, sender, _, _ = what
                    lanes[kind, sender == rank].add(lane)
        # Also one that comes after the last language task, which would spin beside those before.
        for (kind, sent), found in lanes.items():
            assert found == {"encoders" if sent and kind == "embeddings" else "pipeline"}
        assert len(lanes) >= 2


def test_a_buffer_is_taken_over_by_the_lane_that_waits_for_it(processes: ProcessPool) -> None:
    layouts = layouts_of((1, 4), (1, 4, 1), ORDERS[0])
    work = partial(recorded_on_rank, layouts=layouts, schedule="filled", count=6, apart=True)
    taken = 0
    for log in processes.run(4, work):
        marks = {
            what: after
            for lane in log.keys() - ORDERED
            for (event, what), after in itertools.pairwise(log[lane])
            if event == "post"
        }
        # Its memory is of the other lane, which must not have it back too soon.
        for before, (event, message) in itertools.pairwise(log["encoders"]):
            if event == "wait":
                made, mark = marks[message]
                assert (made, before) == ("mark", ("take", mark))
                taken += 1
    # The gradients of what was encoded on other stages than the first.
    assert taken >= 3


def test_the_pipeline_waits_for_what_its_own_rank_encoded(processes: ProcessPool) -> None:
    layouts = layouts_of((1, 4), (1, 4, 1), ORDERS[0])
    work = partial(recorded_on_rank, layouts=layouts, schedule="filled", count=6, apart=True)
    first = processes.run(4, work)[0]
    made = {what for event, what in first["encoders"] if event == "mark"}
    assert made
    assert made <= {what for event, what in first["pipeline"] if event == "take"}


def test_encoders_begin_behind_what_the_timeline_has_before_them(processes: ProcessPool) -> None:
    layouts = layouts_of((1, 4), (1, 4, 1), ORDERS[0])
    work = partial(recorded_on_rank, layouts=layouts, schedule="filled", count=6, apart=True)
    for log in processes.run(4, work):
        # Marks that the encoders wait for, by the number of language tasks in front of them.
        tasks, marks = 0, {}
        for event, what in log["pipeline"]:
            tasks += event == "meet"
            if event == "mark":
                marks[what] = tasks
        behind = [
            marks[what]
            for event, what in log["encoders"]
            if event == "take" and isinstance(what, tuple)
        ]
        assert behind == sorted(behind)
        assert behind[0] == 0
        assert 0 < behind[-1] <= tasks


def test_in_another_order_they_would_not(processes: ProcessPool) -> None:
    layouts = layouts_of((2, 2), (1, 2, 2), ORDERS[0])
    work = partial(recorded_on_rank, layouts=layouts, schedule="filled=1", count=6, apart=False)
    logs = processes.run(4, work)
    # What is sent and asked for in one order could share a queue both ways.
    for one_queue in (False, True):
        assert stuck(logs, layouts["language"], one_queue=one_queue) == []
    posts = logs[0]["host"]
    first = next(at for at, (_, what) in enumerate(posts) if what[0] == "gradients")
    posts.append(posts.pop(first))
    assert "gradients" in " ".join(stuck(logs, layouts["language"], one_queue=False))


def refused_on_rank(_: int, layouts: dict[str, Layout], bound: bool) -> str:
    with cpu.ranks(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        world: Any = dist.group.WORLD
        if bound:
            patch.setattr(type(world), "bound_device_id", torch.device("cuda:0"), raising=False)
        try:
            check_links(portions(layouts))
        except LayoutError as error:
            return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("layouts", "bound", "text"),
    [
        ({"images": Layout(dp=2), "language": Layout(pp=2)}, False, "accepted"),
        ({"images": Layout(dp=2), "language": Layout(pp=2)}, True, "accepted"),
        ({"images": Layout(dp=8), "language": Layout(pp=8)}, False, "accepted"),
        ({"images": Layout(dp=8), "language": Layout(tp=2, pp=4)}, False, "accepted"),
        (
            {"images": Layout(dp=16), "language": Layout(pp=16)},
            False,
            "has 32 streams of messages on rank 0 and some 12 others",
        ),
        ({"images": Layout(dp=4), "language": Layout(tp=2, pp=2)}, True, "accepted"),
        ({"images": Layout(dp=64), "language": Layout(tp=8, pp=8)}, False, "accepted"),
        ({"images": Layout(dp=10), "language": Layout(pp=10)}, False, "accepted"),
        (
            {"images": Layout(dp=4), "language": Layout(pp=4)},
            True,
            "sends between 2 pairs of one rank apart",
        ),
    ],
)
def test_what_a_gpu_cannot_keep_apart_is_refused(
    processes: ProcessPool, layouts: dict[str, Layout], bound: bool, text: str
) -> None:
    (found,) = processes.run(1, partial(refused_on_rank, layouts=layouts, bound=bound))
    assert text in found


def test_the_most_pairs_of_a_rank() -> None:
    link = Link("gradients up", ((0, 1, 2),), ((0, 1), (0, 2)))
    assert (link.most(), link.of_ranks()) == (2, {0: 2, 1: 1, 2: 1})
