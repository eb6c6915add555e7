"""Who is a member in which epoch: the launcher's roster, with simulated workers that are lost at any moment.

Hypothesis picks what happens next: which queue delivers, who is lost, and which process does not come for long. What
the workers do is written here once more, after the words of `distributed.membership`; the steps they make are compared
with a log.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest

from dist_partial.launch.roster import ANSWER_SECONDS, BUILD_SECONDS, Ask, Begin, GiveUp, Kill, Leave, Roster, Start

INSIDE = ("meeting", "agreed", "training")  # phases of a worker that is in an epoch
ROUNDS = 150  # in which all must train again; a few are enough, and some more where one does not come
AT_ONCE = 20  # things that one worker does in a round, for one that is alone would not end
PATIENCE = 10.0  # seconds for which a worker waits for the others
OFTEN = 20  # of so many events, one is a fault, and in two time passes

Event = tuple[str, Callable[[], None]]


@dataclasses.dataclass(eq=False)
class Meeting:
    """An epoch: two that have the same number would still be two."""

    number: int
    members: list["Worker"]
    came: dict["Worker", list | None] = dataclasses.field(default_factory=dict)  # with the steps that each has then


class Frame(NamedTuple):
    meeting: Meeting
    step: int
    sender: "Worker"


@dataclasses.dataclass(eq=False)
class Worker:
    """A process: one that trains, or comes in place of one, or is a spare."""

    name: str
    history: list | None = None  # the steps in its state; None: it has no state yet
    phase: str = "starting"
    meeting: Meeting | None = None
    late: bool = False  # it does not come until it is let go
    patience: float = math.inf  # seconds until it has waited long enough; one that has not gone on yet waits for ever
    waited: bool = False  # it has said so
    over: int = -1  # the newest epoch that is to be left
    called: bool = False  # it has sent what it adds to the next step
    frames: dict[tuple[int, "Worker"], Frame] = dataclasses.field(default_factory=dict)
    orders: collections.deque = dataclasses.field(default_factory=collections.deque)  # on their way to it
    said: collections.deque = dataclasses.field(default_factory=collections.deque)  # on its way to the launcher
    begun: collections.deque = dataclasses.field(default_factory=collections.deque)  # meetings that it has heard of
    alive: bool = True
    stopped: bool = False
    cut: bool = False  # off from the launcher; it runs on
    gone: bool = False  # for the launcher, which has noticed that, or killed what joins them

    def __repr__(self) -> str:
        return self.name

    def events(self) -> Iterator[Event]:
        """What it may do now."""
        if not self.alive or self.stopped:
            return
        if self.orders and not self.cut:
            yield f"{self} is told: {self.orders[0]}", self.obey
        if self.phase == "starting" and not self.late:
            yield f"{self} is ready", self.get_ready
        if self.phase == "waiting" and self.patience <= 0 and not self.waited and not self.begun:
            yield f"{self} has waited", self.wait
        if self.phase == "waiting" and self.begun:
            yield f"{self} comes to epoch {self.begun[0].number}", self.come
        if self.meeting is None or self.phase not in INSIDE:
            return
        if self.over >= self.meeting.number or any(map(self.is_lost, self.meeting.members)):
            yield f"{self} leaves", self.leave
        if self.phase == "meeting" and len(self.meeting.came) == len(self.meeting.members):
            yield f"{self} takes the state", self.agree
        if self.phase == "agreed":
            yield f"{self} goes on", self.go_on
        if self.phase == "training" and self.called and len(self.received()) == len(self.meeting.members):
            yield f"{self} makes step {len(self.history)}", self.step

    def is_lost(self, other: "Worker") -> bool:
        """Whether it can notice that another has gone, answers no more, or has left the epoch."""
        has_left = other in self.meeting.came and (other.meeting is not self.meeting or other.phase == "waiting")
        return not other.alive or other.stopped or has_left

    def say(self, *message: Any) -> None:
        if not self.cut:
            self.said.append(message)

    def obey(self) -> None:
        match self.orders.popleft():
            case Leave(_, epoch):
                self.over = epoch
            case Ask():
                self.say("answers")
            case meeting:
                self.begun.append(meeting)

    def get_ready(self) -> None:
        self.phase = "waiting"
        self.say("ready")

    def wait(self) -> None:
        self.waited = True
        self.say("waited")

    def come(self) -> None:
        self.meeting, self.phase = self.begun.popleft(), "meeting"
        self.meeting.came[self] = None if self.history is None else list(self.history)

    def leave(self) -> None:
        if self.phase == "training":
            self.patience = PATIENCE  # also for the epochs from which it does not go on
        self.phase, self.waited = "waiting", False
        self.frames.clear()
        self.say("left", self.meeting.number, None if self.history is None else len(self.history))

    def agree(self) -> None:
        """Goes to the furthest step that one has."""
        furthest = max((each for each in self.meeting.came.values() if each is not None), key=len)
        if self.history is not None and len(self.history) < len(furthest):
            # It has added to the step that it lacks, or the step would not have been made.
            assert self.called and self.history == furthest[:-1]
        self.history, self.called, self.phase = list(furthest), False, "agreed"

    def go_on(self) -> None:
        self.phase = "training"
        self.say("went", self.meeting.number, len(self.history))

    def receive(self, frame: Frame) -> None:
        # One of an older epoch may come at any time.
        if self.phase in INSIDE and frame.meeting.number == self.meeting.number:
            self.frames[frame.step, frame.sender] = frame

    def received(self) -> list[Frame]:
        """What has come for the next step."""
        return [frame for (step, _), frame in self.frames.items() if step == len(self.history)]

    def step(self) -> None:
        frames = self.received()
        assert all(each.meeting is self.meeting for each in frames), "a frame of an older epoch is used"
        for each in frames:
            del self.frames[each.step, each.sender]
        # Made again in another epoch, or by others, a step would not be equal to this.
        self.history.append((len(self.history), self.meeting.number, tuple(each.name for each in self.meeting.members)))
        self.called = False


class Run:
    """A launcher that does what a roster says, its workers, and what is on its way between them all."""

    def __init__(
        self, ranks: int, spares: int, faults: int = 0, fewer: Collection[int] = (), late: Collection[int] = ()
    ) -> None:
        self.names = itertools.count()
        self.workers: list[Worker] = []
        self.late = {ranks + number for number in late}  # of the processes that are started, those that do not come
        self.places: list[Worker | None] = [self.start([]) for _ in range(ranks)]  # who has each
        self.meeting = Meeting(0, list(self.places), {each: [] for each in self.places})
        self.chosen = list(range(ranks))  # the places of the epoch that has begun last, in rank order
        for each in self.places:
            each.phase, each.meeting = "training", self.meeting
        fewer = {number for number in fewer if number < ranks}
        self.allowed = fewer | {ranks}
        self.tires = bool(fewer or late)  # who waits does not wait for ever
        self.roster = Roster(list(self.places), fewer)
        self.spares = [self.start() for _ in range(spares)]
        self.ready: set[Worker] = set()
        self.went = set(self.places)  # who has said that it goes on in the epoch that has begun last
        self.waited: set[Worker] = set()  # who has said, since that is broken, that it has waited long enough
        self.seen: set[Worker] = set()  # whose end the launcher has seen
        self.links: dict[tuple[Worker, Worker, int], collections.deque[Frame]] = {}
        self.due: list[int] = []  # places to be given to another process
        self.asked: dict[Worker, float] = {}  # when; not who has answered since, or was told something else
        self.killed: set[Worker] = set()  # or about to be
        self.heard: list[tuple[Worker, tuple]] = []
        self.log: list = []  # the steps that all have made
        self.now, self.given_up, self.faults_left = 0.0, False, faults
        self.counts: collections.Counter[str] = collections.Counter()

    def start(self, history: list | None = None) -> Worker:
        number = next(self.names)
        self.workers.append(Worker(f"w{number}", history, late=number in self.late))
        return self.workers[-1]

    # What may happen.

    def events(self) -> Iterator[Event]:
        for worker in self.workers:
            yield from self.events_of(worker)
        for (sender, receiver, number), frames in self.links.items():
            if frames:
                yield f"{receiver} gets a frame of {sender}, epoch {number}", functools.partial(self.carry, frames)
        for place in self.due:
            yield f"place {place} is filled", functools.partial(self.fill, place)

    def events_of(self, worker: Worker) -> Iterator[Event]:
        if worker.said:
            yield f"{worker} is heard: {worker.said[0]}", functools.partial(self.hear, worker)
        if worker in self.killed and worker.alive and not worker.gone:
            yield f"{worker} is killed", functools.partial(self.kill, worker)
        if (worker.gone or not worker.alive) and worker not in self.seen:
            yield f"the end of {worker} is seen", functools.partial(self.see_end, worker)
        if worker.alive and not worker.stopped and worker.phase == "training" and not worker.called:
            yield f"{worker} calls step {len(worker.history)}", functools.partial(self.call, worker)
        yield from worker.events()

    def faults(self) -> Iterator[Event]:
        for worker in self.workers:
            if not worker.alive:
                continue
            yield f"{worker} ends", functools.partial(setattr, worker, "alive", False)
            if not worker.gone:
                yield f"{worker} is cut off", functools.partial(self.cut, worker)
            # One that is stopped while it starts is not asked.
            if worker.phase != "starting" and self.is_noticed(worker):
                if not worker.stopped:
                    yield f"{worker} is stopped", functools.partial(setattr, worker, "stopped", True)
                if not worker.cut:
                    yield f"{worker} is cut off unnoticed", functools.partial(setattr, worker, "cut", True)
            if worker.late:
                yield f"{worker} is let go", functools.partial(setattr, worker, "late", False)
            if worker.stopped:
                yield f"{worker} runs on", functools.partial(setattr, worker, "stopped", False)
            elif worker.phase in INSIDE:
                yield f"{worker} loses a connection", worker.leave
        if self.is_noticed():
            yield "all are stopped", self.stop_all
        for worker, message in self.heard[-12:]:
            yield f"{worker} is heard again: {message}", functools.partial(self.take, worker, message)

    def is_noticed(self, worker: Worker | None = None) -> bool:
        """Whether it comes out that one is stopped, or all: not where all have gone on, and none is left to say so."""
        for each in self.meeting.members:
            if not each.alive or (not each.cut and each.phase != "training"):
                return True
            if worker and each is not worker and not each.cut and not each.stopped:
                return True
        return self.roster.broken

    def cut(self, worker: Worker) -> None:
        worker.cut = worker.gone = True

    def stop_all(self) -> None:
        for each in self.places:
            if each and each.phase != "starting":
                each.stopped = True

    def choose(self, choice: int) -> None:
        """Has one thing happen, or nothing at 0, to which a schedule that fails is reduced."""
        if not choice or self.given_up:
            return
        which, kind = divmod(choice, OFTEN)
        events: list[Event] = []
        if kind == 1 and self.faults_left:
            self.faults_left -= 1
            events = list(self.faults())
        elif kind not in (2, 3):
            events = list(self.events())
        self.happen(*(events[which % len(events)] if events else ("time passes", functools.partial(self.tick, 2.0))))

    def happen(self, name: str, event: Callable[[], None]) -> None:
        if hypothesis.currently_in_test_context():
            hypothesis.note(name)
        event()
        self.check()

    def settle(self) -> None:
        """Has everything arrive and time pass, without another fault: all who come train again, or nobody can."""
        goal = 2 + max(len(each.history) for each in self.workers if each.history is not None)
        for _ in range(ROUNDS):
            if self.given_up or self.trains(goal):
                return
            for worker in list(self.workers):
                for _ in range(AT_ONCE):
                    if not self.given_up and (event := next(self.events_of(worker), None)):
                        self.happen(*event)
            for frames in list(self.links.values()):
                while frames:
                    self.carry(frames)
            while self.due:
                self.fill(self.due[0])
            self.happen("time passes", functools.partial(self.tick, 0.5))
        if not self.is_stuck():
            pytest.fail(f"they wait for ever: {[(each, each and each.phase) for each in self.places]}")
        self.counts["stuck"] += 1

    def let_go(self) -> None:
        """From now on every process comes."""
        self.late = set()
        for each in self.workers:
            each.late = False

    def trains(self, goal: int) -> bool:
        """Whether all who are there are in the epoch that has begun last, and get on, as the launcher has heard."""
        members = self.meeting.members
        others = [each for each in self.places if each not in members]
        if (
            not self.roster.all_went
            or self.can_grow()
            or any(not (each and (each.late or each in self.ready)) for each in others)
        ):
            return False
        return all(
            each in self.places
            and each.alive
            and each.phase == "training"
            and each.meeting is self.meeting
            and len(each.history) >= goal
            for each in members
        )

    def outside(self) -> list[Worker]:
        """Who has a place and is ready, as the launcher has heard, but is not in the epoch."""
        return [each for each in self.places if each in self.ready and each not in self.meeting.members]

    def can_grow(self) -> bool:
        """Whether an epoch with those that are not in this one may begin."""
        outside = self.outside()
        return bool(outside) and len(self.meeting.members) + len(outside) in self.allowed

    def is_stuck(self) -> bool:
        """Whether they rightly wait for one that does not come: nobody is left who can say that it has waited."""
        there = [each for each in self.places if each and not each.late]
        assert self.roster.broken and all(each.alive and each.phase == "waiting" for each in there)
        assert any((each := self.places[place]) and each.late for place in self.chosen)
        return all(each.stopped or each.cut or each.patience == math.inf for each in there)

    # What the launcher does.

    def see_end(self, worker: Worker) -> None:
        self.seen.add(worker)
        if worker in self.spares:
            self.spares.remove(worker)
            return
        could = self.roster.can_lose(worker)
        actions = self.roster.ended(worker)
        if worker not in self.meeting.members:
            assert not any(isinstance(action, Leave) for action in actions), "it was not in the epoch"
        if worker in self.places:
            assert could == (GiveUp() not in actions) or (could and self.waited)
            self.places[self.places.index(worker)] = None
        self.do(actions)

    def hear(self, worker: Worker) -> None:
        message = worker.said.popleft()
        self.heard.append((worker, message))
        self.take(worker, message)

    def take(self, worker: Worker, message: tuple) -> None:
        match message:
            case ("ready",):
                self.ready.add(worker)
                self.take_ready(worker)
            case ("answers",):
                self.asked.pop(worker, None)
                self.roster.answered(worker)
            case ("left", epoch, step):
                self.do(self.roster.left(worker, epoch, step))
            case ("went", epoch, step):
                self.roster.went(worker, epoch, step)
                if epoch == self.meeting.number:
                    self.went.add(worker)
            case ("waited",):
                if self.roster.broken and worker in self.places and worker.phase == "waiting":
                    self.waited.add(worker)
                self.do(self.roster.waited(worker))

    def take_ready(self, worker: Worker) -> None:
        broken, went = self.roster.broken, self.roster.all_went
        actions = self.roster.ready(worker)
        if not broken:
            members = self.meeting.members if went and self.can_grow() else []
            leave = [Leave(each, self.meeting.number) for each in members]
            assert sorted(actions, key=repr) == sorted(leave, key=repr)
        self.do(actions)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for each in self.workers:
            each.patience -= seconds if self.tires else 0.0
        self.do(self.roster.tick(self.now))

    def fill(self, place: int) -> None:
        self.due.remove(place)
        worker = max(self.spares, key=lambda spare: spare in self.ready) if self.spares else self.start()
        if self.spares:
            self.spares.remove(worker)
        self.places[place] = worker
        self.roster.started(place, worker)
        if worker in self.ready:
            self.take_ready(worker)

    def kill(self, worker: Worker) -> None:
        """Ends a process, or, where it is cut off, what joins it to the launcher."""
        if worker.cut:
            worker.gone = True
        else:
            worker.alive = False

    def do(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Leave(worker, epoch):
                    assert worker in self.places and worker in self.meeting.members and epoch == self.meeting.number
                    self.asked.pop(worker, None)
                    worker.orders.append(action)
                case Ask(worker):
                    assert worker in self.places and worker not in self.killed and worker in self.meeting.members
                    assert self.roster.broken or worker not in self.went, "nobody waits for it"
                    self.asked[worker] = self.now
                    worker.orders.append(action)
                case Start(place):
                    assert self.places[place] is None and place not in self.due
                    self.due.append(place)
                case Kill(worker):
                    assert worker in self.places and worker not in self.killed
                    assert worker in self.asked, "it has answered, or was not asked since"
                    assert self.now >= self.asked[worker] + ANSWER_SECONDS
                    self.killed.add(worker)
                    what = "stopped" if worker.stopped else "cut off" if worker.cut else "slow"
                    self.counts[f"{what}, killed"] += 1
                    self.counts["killed in a meeting"] += not self.roster.broken
                case Begin(epoch, workers):
                    self.begin(epoch, list(workers))
                case GiveUp():
                    self.give_up()

    def begin(self, epoch: int, workers: list[Worker]) -> None:
        places = [self.places.index(each) for each in workers]
        self.check_places(places)
        assert not self.killed.intersection(workers)
        for each in workers:
            assert each.phase == "waiting" and not each.begun, "one has not left"
            assert not any(isinstance(order, Meeting) for order in each.orders), "one has not come to the last"
        assert any(each.history is not None for each in workers)
        assert epoch == self.meeting.number + 1
        before, self.chosen = self.chosen, places
        self.meeting, self.went, self.waited = Meeting(epoch, workers), set(), set()
        more = len(places) - len(before)
        self.counts += collections.Counter(fewer=more < 0, grown=more > 0)
        self.counts["shut out"] += bool(self.outside())
        self.counts["others"] += not more and {*places} != {*before}
        self.asked.clear()
        lengths = {None if each.history is None else len(each.history) for each in workers}
        self.counts += collections.Counter(begun=1, joined=None in lengths, apart=len(lengths - {None}) > 1)
        for each in workers:
            each.orders.append(self.meeting)

    def give_up(self) -> None:
        """Nobody has the state, or those who are there have waited in vain, and may not go on alone."""
        self.given_up = True
        if not any(each and each.history is not None for each in self.places):
            return
        there = {each for each in self.places if each and (each in self.ready or each in self.meeting.members)}
        assert self.waited and all(each.phase == "waiting" for each in there), "one has the state"
        assert len(there) not in self.allowed and any(self.places[place] not in there for place in self.chosen)
        self.counts["too few"] += 1

    def check_places(self, places: list[int]) -> None:
        """Those that begin an epoch are all who are there, if so many may, and the first one has the state."""
        before, now = {*self.chosen}, {*places}
        assert len(now) == len(places) and len(places) in self.allowed
        if now == before:  # always, where all must go on together
            assert places == self.chosen, "ranks change"
        else:
            assert places == sorted(places, key=lambda place: (self.places[place].history is None, place))
            assert self.places[places[0]].history is not None
        assert now >= before or self.waited, "nobody has waited for one that is not there"
        out = {each for place, each in enumerate(self.places) if each and place not in now}
        assert out.isdisjoint(self.meeting.members), "one that was in the last epoch is shut out"
        if ready := out.intersection(self.ready):
            assert now == before and len(now) + len(ready) not in self.allowed, "one that is ready is shut out"

    # What the workers do to each other, and what must hold.

    def call(self, worker: Worker) -> None:
        worker.called = True
        frame = Frame(worker.meeting, len(worker.history), worker)
        worker.receive(frame)
        for other in worker.meeting.members:
            if other is not worker:
                self.links.setdefault((worker, other, worker.meeting.number), collections.deque()).append(frame)

    def carry(self, frames: collections.deque[Frame]) -> None:
        frame = frames.popleft()
        receiver = next(to for (_, to, _), each in self.links.items() if each is frames)
        if receiver.alive:  # one that is stopped finds it when it runs on
            receiver.receive(frame)

    def check(self) -> None:
        inside = [each for each in self.workers if each.alive and each.phase in INSIDE]
        held = [(each.meeting.number, each.meeting.members.index(each)) for each in inside]
        assert len(held) == len(set(held)), "two have the same rank in an epoch"
        assert self.roster.all_went == (not self.roster.broken and self.went.issuperset(self.meeting.members))
        assert self.roster.ranks == self.chosen
        histories = [each.history for each in self.places if each and each.alive and each.history is not None]
        self.log += min(histories, key=len, default=[])[len(self.log) :]
        assert [step for step, *_ in self.log] == list(range(len(self.log)))
        assert all(each[: len(self.log)] == self.log for each in histories), "a step is lost, or made twice"
        ahead = [each[len(self.log) :] for each in histories if len(each) > len(self.log)]
        assert all(len(each) == 1 and each == ahead[0] for each in ahead), "they are more than a step apart"


def explore(**more: st.SearchStrategy) -> collections.Counter[str]:
    """Makes runs of all kinds, and counts what has happened in them."""
    counts: collections.Counter[str] = collections.Counter()

    @hypothesis.settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        ranks=st.integers(2, 4),
        spares=st.integers(0, 2),
        faults=st.integers(0, 8),
        schedule=st.lists(st.integers(0, 2**16), min_size=60, max_size=300),
        more=st.fixed_dictionaries(more),
    )
    def run(ranks, spares, faults, schedule, more):
        made = Run(ranks, spares, faults, **more)
        for choice in schedule:
            made.choose(choice)
        hypothesis.note("no more faults")
        made.settle()
        hypothesis.note("all come")
        made.let_go()
        made.settle()
        assert made.given_up or len(made.chosen) == ranks
        counts.update(made.counts + collections.Counter(given_up=made.given_up, went_on=not made.given_up))

    run()
    # The schedules lead to all that matters.
    matters = {"joined", "apart", "stopped, killed", "cut off, killed", "slow, killed", "killed in a meeting"}
    few = {kind for kind in matters | {"given_up", "went_on"} if counts[kind] < 20}
    assert not few, counts
    return counts


def test_workers_go_on_together_whatever_is_lost():
    counts = explore()
    assert not any(counts[kind] for kind in ("fewer", "grown", "others", "shut out", "stuck", "too few")), counts


def test_fewer_workers_go_on_and_more_again():
    counts = explore(fewer=st.frozensets(st.integers(1, 3)), late=st.frozensets(st.integers(0, 7)))
    assert all(counts[kind] >= 20 for kind in ("fewer", "grown", "too few")), counts
    assert counts["stuck"], counts


def test_one_loss():
    roster = Roster(["a", "b", "c"])
    assert roster.all_went and roster.can_lose("b")
    assert roster.ended("b") == [Leave("a", 0), Leave("c", 0), Start(1)]
    assert roster.broken and not roster.all_went
    assert roster.ended("b") == []  # it is no member any more
    roster.started(1, "d")
    assert roster.left("a", 0, step=41) == []
    assert roster.ready("d") == []  # c has not left
    assert roster.left("c", 0, step=40) == [Begin(1, ["a", "d", "c"])]
    assert roster.epoch == 1 and not roster.broken and not roster.all_went
    for each in ("a", "c", "d"):
        assert not roster.all_went
        roster.went(each, 1, step=41)
    assert roster.all_went and roster.step == 41
    assert roster.tick(now=99.0) == []


def test_two_losses_at_once():
    roster = Roster(["a", "b", "c"])
    assert roster.ended("a") == [Leave("b", 0), Leave("c", 0), Start(0)]
    assert roster.ended("c") == [Start(2)]
    assert not roster.can_lose("b")
    roster.started(2, "e")
    roster.started(0, "d")
    assert roster.ready("d") == [] and roster.left("b", 0, step=7) == []
    assert roster.ready("e") == [Begin(1, ["d", "b", "e"])]


def test_a_worker_leaves_before_any_has_ended():
    roster = Roster(["a", "b", "c"])
    assert roster.left("a", 0, step=7) == [Leave("b", 0), Leave("c", 0)]
    assert roster.left("b", 0, step=7) == []
    assert roster.left("c", 0, step=7) == [Begin(1, ["a", "b", "c"])]  # a connection was lost, and nobody


def test_a_newcomer_is_lost_while_it_starts():
    roster = Roster(["a", "b"])
    roster.ended("b")
    roster.started(1, "c")
    roster.left("a", 0, step=7)
    assert roster.ended("c") == [Start(1)]  # a has left already
    roster.started(1, "d")
    assert roster.ready("c") == []
    assert roster.ready("d") == [Begin(1, ["a", "d"])]


def meeting() -> Roster:
    """One in which "c" has come in place of "b", and is about to meet "a"."""
    roster = Roster(["a", "b"])
    roster.ended("b")
    roster.started(1, "c")
    roster.left("a", 0, step=7)
    assert roster.ready("c") == [Begin(1, ["a", "c"])]
    return roster


def test_a_newcomer_is_lost_while_all_meet():
    roster = meeting()
    assert roster.ended("c") == [Leave("a", 1), Start(1)]
    roster.started(1, "d")
    assert roster.ready("d") == []
    assert roster.left("a", 1, step=7) == [Begin(2, ["a", "d"])]


def test_that_a_newcomer_is_ready_is_heard_twice():
    roster = meeting()
    assert roster.ready("c") == []
    assert roster.left("a", 1, step=7) == [Leave("c", 1)]
    assert roster.ready("c") == []  # it has not left
    assert roster.left("c", 1, step=None) == [Begin(2, ["a", "c"])]


def test_a_newcomer_that_leaves_without_the_state_holds_none():
    roster = meeting()
    assert roster.can_lose("a")  # c may have the state by now
    assert roster.left("c", 1, step=None) == [Leave("a", 1)]
    assert not roster.can_lose("a") and roster.can_lose("c")
    assert roster.ended("a") == [GiveUp()]


def test_a_newcomer_may_have_taken_the_state_from_the_last_that_had_it():
    roster = meeting()
    assert roster.ended("a") == [Leave("c", 1), Start(0)]
    roster.started(0, "d")
    roster.ready("d")
    assert roster.left("c", 1, step=7) == [Begin(2, ["d", "c"])]


def test_a_newcomer_has_not_taken_the_state_from_the_last_that_had_it():
    roster = meeting()
    assert roster.ended("a") == [Leave("c", 1), Start(0)]
    roster.started(0, "d")
    roster.ready("d")
    assert roster.left("c", 1, step=None) == [GiveUp()]


def test_a_newcomer_that_has_gone_on_can_be_the_last():
    roster = meeting()
    roster.went("c", 1, step=7)
    assert roster.can_lose("a")
    assert roster.ended("a") == [Leave("c", 1), Start(0)]


def test_all_have_gone_on_when_each_has_said_so():
    roster = Roster(["a", "b"])
    roster.left("a", 0, step=7)
    assert roster.left("b", 0, step=7) == [Begin(1, ["a", "b"])]
    assert not roster.all_went
    roster.went("a", 1, step=7)
    assert not roster.all_went
    roster.went("b", 1, step=7)
    assert roster.all_went


def test_who_does_not_answer_is_killed():
    roster = Roster(["a", "b", "c"])
    assert roster.tick(now=1.0) == []
    roster.ended("c")
    assert roster.tick(now=10.0) == [Ask("a"), Ask("b")]
    roster.answered("a")
    assert roster.tick(now=10.0 + ANSWER_SECONDS - 0.1) == []
    assert roster.tick(now=10.0 + ANSWER_SECONDS) == [Ask("a"), Kill("b")]
    assert roster.left("b", 0, step=7) == []  # it is as good as ended
    assert roster.left("a", 0, step=7) == []
    assert roster.tick(now=99.0) == []  # who has left waits for the others, and once is enough
    assert roster.ended("b") == [Start(1)]


def test_who_has_answered_is_asked_again():
    roster = Roster(["a", "b"])
    roster.ended("b")
    for count in range(9):
        assert roster.tick(now=count * ANSWER_SECONDS) == [Ask("a")]
        roster.answered("a")
        assert roster.tick(now=(count + 0.9) * ANSWER_SECONDS) == []
    assert roster.tick(now=9 * ANSWER_SECONDS) == [Ask("a")]
    assert roster.tick(now=10 * ANSWER_SECONDS) == [Kill("a")]


def test_whoever_meets_the_others_is_asked_until_it_goes_on():
    roster = meeting()
    assert roster.tick(now=0.0) == [Ask("a"), Ask("c")]
    roster.answered("a")
    roster.answered("c")
    roster.went("a", 1, step=7)
    assert roster.tick(now=ANSWER_SECONDS) == [Ask("c")]
    assert roster.tick(now=2 * ANSWER_SECONDS) == [Kill("c")]
    assert roster.ended("c") == [Leave("a", 1), Start(1)]
    assert roster.tick(now=2 * ANSWER_SECONDS) == [Ask("a")]


def test_an_answer_is_to_the_last_question_alone():
    roster = meeting()
    roster.answered("a")  # nobody has asked
    assert roster.tick(now=0.0) == [Ask("a"), Ask("c")]
    roster.answered("c")
    assert roster.tick(now=ANSWER_SECONDS) == [Kill("a"), Ask("c")]


def test_who_is_told_to_leave_is_asked_anew():
    roster = meeting()
    roster.tick(now=0.0)
    roster.ended("c")
    assert roster.tick(now=ANSWER_SECONDS) == [Ask("a")]


def test_who_is_told_to_meet_the_others_is_asked_anew():
    roster = Roster(["a", "b"])
    roster.ended("b")
    assert roster.tick(now=0.0) == [Ask("a")]
    roster.started(1, "c")
    roster.left("a", 0, step=7)
    assert roster.ready("c") == [Begin(1, ["a", "c"])]
    assert roster.tick(now=ANSWER_SECONDS) == [Ask("a"), Ask("c")]


def test_a_newcomer_cannot_leave_before_it_has_met_anybody():
    roster = Roster(["a", "b"])
    roster.ended("b")
    roster.started(1, "c")
    assert roster.left("a", 0, step=7) == roster.left("c", 0, step=None) == []
    assert roster.ready("c") == [Begin(1, ["a", "c"])]


def test_a_newcomer_is_stopped_while_it_starts():
    roster = Roster(["a", "b", "c"])
    roster.ended("c")
    roster.started(2, "d")
    roster.left("a", 0, step=7)
    roster.left("b", 0, step=7)
    assert roster.tick(now=0.0) == roster.tick(now=99.0) == []  # nobody is asked, for starting may take long
    assert roster.ended("a") == [Start(0)]  # it has waited long enough
    assert roster.ended("b") == [GiveUp()]


def test_messages_of_an_older_epoch_change_nothing():
    roster = Roster(["a", "b", "c"])
    roster.ended("c")
    roster.started(2, "d")
    roster.ready("d")
    roster.left("a", 0, step=7)
    assert roster.left("a", 0, step=7) == []
    assert roster.left("b", 0, step=7) == [Begin(1, ["a", "b", "d"])]
    assert roster.left("a", 0, step=7) == roster.left("c", 0, step=8) == []
    roster.went("d", 0, step=99)
    assert not roster.broken and not roster.all_went and roster.step == 0 and roster.epoch == 1
    assert roster.ended("c") == []
    assert roster.tick(now=0.0) == [Ask("a"), Ask("b"), Ask("d")]


def test_nobody_is_left_who_has_the_state():
    roster = Roster(["a", "b"])
    roster.ended("b")
    roster.started(1, "c")
    assert not roster.can_lose("a")
    assert roster.ended("a") == [GiveUp()]
    assert roster.ready("c") == []


def test_a_spare_is_ready_at_once():
    roster = Roster(["a", "b"])
    assert roster.ready("spare") == []  # no member yet
    assert roster.ended("b") == [Leave("a", 0), Start(1)]
    assert roster.left("a", 0, step=7) == []
    roster.started(1, "spare")
    assert roster.ready("spare") == [Begin(1, ["a", "spare"])]


def fewer() -> Roster:
    """One of three, in which "b" and "c" have gone on without "a", and another starts in its place."""
    roster = Roster(["a", "b", "c"], fewer=(1, 2))
    assert roster.ended("a") == [Leave("b", 0), Leave("c", 0), Start(0)]
    roster.started(0, "d")
    assert roster.left("b", 0, step=7) == roster.left("c", 0, step=7) == []
    assert roster.waited("c") == [Begin(1, ["b", "c"])]
    assert roster.ranks == [1, 2]
    return roster


def all_go_on(roster: Roster, *processes: str) -> None:
    """Who builds for an epoch is not asked to leave it for one of more."""
    for each in processes:
        roster.went(each, roster.epoch, step=7)


def half(fewer: Collection[int]) -> Roster:
    """One of four, in which "a" and "b" have gone on without the others, and "e" and "f" start in their place."""
    roster = Roster(["a", "b", "c", "d"], fewer)
    roster.ended("c")
    roster.ended("d")
    roster.started(2, "e")
    roster.started(3, "f")
    assert roster.left("a", 0, step=7) == roster.left("b", 0, step=7) == []
    assert roster.waited("a") == [Begin(1, ["a", "b"])]
    return roster


def test_those_who_are_there_go_on_after_they_have_waited():
    roster = fewer()
    assert not roster.broken and not roster.all_went
    roster.went("b", 1, step=7)
    assert not roster.all_went
    roster.went("c", 1, step=7)
    assert roster.all_went  # without d
    assert roster.tick(now=99.0) == []
    assert roster.can_lose("b") and roster.can_lose("d")


def test_one_has_waited_before_all_have_left():
    roster = Roster(["a", "b", "c"], fewer=[2])
    roster.ended("c")
    assert roster.left("a", 0, step=7) == roster.waited("a") == []
    assert roster.left("b", 0, step=7) == [Begin(1, ["a", "b"])]


def test_so_few_cannot_go_on():
    roster = Roster(["a", "b", "c", "d"], fewer=[2])
    roster.ended("d")
    roster.started(3, "e")
    for each in ("a", "b", "c"):
        assert roster.left(each, 0, step=7) == []
    assert roster.waited("a") == [GiveUp()]


def test_who_has_waited_waits_again_in_another_epoch():
    roster = Roster(["a", "b", "c", "d"], fewer=[2])
    roster.ended("d")
    roster.started(3, "e")
    assert roster.left("a", 0, step=7) == roster.waited("a") == roster.left("b", 0, step=7) == roster.ready("e") == []
    assert roster.left("c", 0, step=7) == [Begin(1, ["a", "b", "c", "e"])]  # it has come just in time
    roster.ended("e")
    roster.ended("c")
    assert roster.left("a", 1, step=7) == roster.left("b", 1, step=7) == []
    assert roster.waited("b") == [Begin(2, ["a", "b"])]


def test_they_are_too_many_until_another_is_lost():
    roster = Roster(["a", "b", "c", "d"], fewer=[2])
    roster.ended("d")
    assert roster.left("a", 0, step=7) == roster.left("b", 0, step=7) == roster.waited("b") == []
    assert roster.ended("c") == [Start(2)]  # a spare may be ready
    assert roster.tick(0.0) == [Begin(1, ["a", "b"])]


def test_those_that_build_are_not_asked_to_leave_for_more():
    """Nor killed as soon as others: the user's code may keep them from an answer."""
    roster = Roster(["a", "b", "c"], fewer=[2])
    roster.ended("c")
    roster.started(2, "d")
    roster.left("a", 0, step=7)
    roster.left("b", 0, step=7)
    assert roster.waited("a") == [Begin(1, ["a", "b"])]
    roster.went("a", 1, step=7)
    assert roster.ready("d") == []
    assert roster.tick(0.0) == [Ask("b")]
    assert roster.tick(BUILD_SECONDS - 0.1) == []
    roster.answered("b")
    roster.went("b", 1, step=7)
    assert roster.tick(BUILD_SECONDS) == [Leave("a", 1), Leave("b", 1)]


def test_a_spare_that_is_ready_comes_with_those_that_have_waited():
    roster = Roster(["a", "b", "c", "d"], fewer=[2, 3])
    roster.ended("d")
    assert roster.left("a", 0, step=7) == roster.left("b", 0, step=7) == roster.waited("b") == []
    assert roster.ended("c") == [Start(2)]
    roster.started(2, "s")
    assert roster.ready("s") == [Begin(1, ["a", "b", "s"])]


def test_they_are_too_few_until_another_comes():
    roster = Roster(["a", "b", "c", "d"], fewer=[3])
    roster.ended("a")
    roster.ended("b")
    roster.started(0, "e")
    assert roster.left("c", 0, step=7) == roster.waited("c") == roster.ready("e") == []
    assert roster.left("d", 0, step=7) == [Begin(1, ["c", "d", "e"])]  # one that has the state comes first


def test_all_must_go_on_together():
    roster = Roster(["a", "b"])
    roster.ended("b")
    roster.started(1, "c")
    assert roster.left("a", 0, step=7) == []
    assert roster.waited("a") == [GiveUp()]


def test_a_late_one_joins():
    roster = fewer()
    assert roster.ready("d") == []
    all_go_on(roster, "b", "c")
    assert roster.ready("d") == [Leave("b", 1), Leave("c", 1)]
    assert roster.broken and roster.ready("d") == []
    assert roster.left("c", 1, step=9) == []
    assert roster.left("b", 1, step=9) == [Begin(2, ["b", "c", "d"])]
    assert roster.ranks == [1, 2, 0]


def test_another_late_one_joins_while_the_others_leave():
    roster = half(fewer=[2, 3])
    all_go_on(roster, "a", "b")
    assert roster.ready("f") == [Leave("a", 1), Leave("b", 1)]
    assert roster.left("a", 1, step=7) == roster.ready("e") == []  # all four, if the others have not begun yet
    assert roster.left("b", 1, step=7) == [Begin(2, ["a", "b", "e", "f"])]


def test_same_places_keep_their_ranks():
    roster = fewer()
    all_go_on(roster, "b", "c")
    roster.ready("d")
    roster.left("b", 1, step=9)
    assert roster.left("c", 1, step=9) == [Begin(2, ["b", "c", "d"])]
    roster.left("d", 2, step=9)
    roster.left("b", 2, step=9)
    assert roster.left("c", 2, step=9) == [Begin(3, ["b", "c", "d"])]  # a connection was lost
    assert roster.ended("b") == [Leave("d", 3), Leave("c", 3), Start(1)]
    roster.started(1, "e")
    assert roster.left("c", 3, step=9) == roster.left("d", 3, step=9) == []
    assert roster.ready("e") == [Begin(4, ["e", "c", "d"])]


def test_a_late_one_ends_before_it_is_ready():
    roster = fewer()
    all_go_on(roster, "b", "c")
    assert roster.ended("d") == [Start(0)]
    assert not roster.broken
    assert roster.ready("d") == []  # no member any more
    roster.started(0, "e")
    assert roster.ended("e") == [Start(0)]
    roster.started(0, "f")
    assert roster.ready("f") == [Leave("b", 1), Leave("c", 1)]


def test_who_has_waited_in_vain_says_so_too_late():
    roster = fewer()
    assert roster.waited("b") == []  # they go on already
    assert roster.ended("c") == [Leave("b", 1), Start(2)]
    assert roster.waited("b") == roster.waited("d") == roster.waited("a") == []  # these do not wait
    assert roster.left("b", 1, step=7) == []
    assert roster.waited("c") == []  # no member any more
    assert roster.waited("b") == [Begin(2, ["b"])]


def test_one_outside_the_epoch_has_nothing_to_wait_for():
    roster = half(fewer=[2])
    assert roster.ready("e") == roster.waited("e") == []
    assert roster.ended("b") == [Leave("a", 1), Start(1)]
    assert roster.left("a", 1, step=7) == []
    assert roster.waited("a") == [Begin(2, ["a", "e"])]


def test_a_worker_is_lost_in_an_epoch_of_fewer_and_replaced():
    roster = fewer()
    assert roster.ended("b") == [Leave("c", 1), Start(1)]
    roster.started(1, "e")
    assert roster.left("c", 1, step=7) == []
    assert roster.ready("e") == [Begin(2, ["e", "c"])]  # as many as before
    all_go_on(roster, "e", "c")
    assert roster.ready("d") == [Leave("e", 2), Leave("c", 2)]


def test_a_worker_is_lost_while_a_late_one_is_ready():
    roster = fewer()
    all_go_on(roster, "b", "c")
    assert roster.ready("d") == [Leave("b", 1), Leave("c", 1)]
    assert roster.ended("b") == [Start(1)]
    assert roster.left("c", 1, step=7) == []  # one may come in place of b
    assert roster.waited("c") == [Begin(2, ["c", "d"])]


def test_of_two_late_ones_one_joins():
    roster = half(fewer=(2, 3))
    all_go_on(roster, "a", "b")
    assert roster.ready("f") == [Leave("a", 1), Leave("b", 1)]
    assert roster.left("a", 1, step=7) == []
    assert roster.left("b", 1, step=7) == [Begin(2, ["a", "b", "f"])]
    all_go_on(roster, "a", "b", "f")
    assert roster.ready("e") == [Leave("a", 2), Leave("b", 2), Leave("f", 2)]


def test_of_two_late_ones_one_alone_cannot_join():
    roster = half(fewer=[2])
    assert roster.ready("f") == roster.ready("f") == []
    assert roster.left("a", 1, step=7) == [Leave("b", 1)]
    assert roster.left("b", 1, step=7) == [Begin(2, ["a", "b"])]  # a connection was lost; f cannot join yet
    assert not roster.broken
    all_go_on(roster, "a", "b")
    assert roster.ready("e") == [Leave("a", 2), Leave("b", 2)]
    assert roster.left("a", 2, step=7) == []
    assert roster.left("b", 2, step=7) == [Begin(3, ["a", "b", "e", "f"])]


def test_of_too_many_late_ones_one_ends():
    roster = Roster(["a", "b", "c", "d"], fewer=(1, 2))
    for place, (lost, late) in enumerate(("be", "cf", "dg"), start=1):
        roster.ended(lost)
        roster.started(place, late)
    roster.left("a", 0, step=7)
    assert roster.waited("a") == [Begin(1, ["a"])]
    all_go_on(roster, "a")
    assert roster.ready("e") == [Leave("a", 1)]
    assert roster.ready("f") == []
    assert roster.left("a", 1, step=7) == [Begin(2, ["a"])]  # three cannot go on
    assert roster.ended("f") == [Start(2)]
    all_go_on(roster, "a")
    assert roster.tick(0.0) == [Leave("a", 2)]  # but a and e can


def test_one_that_does_not_come_holds_up_nobody():
    run = Run(ranks=3, spares=0, fewer=[2], late=[0])
    first, second, last = run.places
    first.alive = False
    run.settle()
    assert run.meeting.members == [second, last] and run.places[0].late
    run.let_go()
    run.settle()
    assert run.meeting.members == [second, last, run.places[0]]


def test_one_does_not_come_and_so_few_cannot_go_on():
    run = Run(ranks=3, spares=0, fewer=[1], late=[0])
    run.places[1].alive = False
    run.settle()
    assert run.given_up and run.now >= PATIENCE and run.meeting.number == 0


def test_a_worker_is_stopped_after_its_answer():
    run = Run(ranks=3, spares=0)
    _, second, last = run.places
    last.alive = False
    run.see_end(last)
    run.tick(0.0)
    while second.orders:
        second.obey()
    run.hear(second)
    second.stopped = True
    run.settle()
    assert not run.given_up and second in run.killed


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("phase", ["waiting", "meeting", "agreed"])
def test_workers_are_stopped_on_their_way_back(phase, number):
    run = Run(ranks=3, spares=0)
    first, second, last = run.places
    last.alive = False
    run.see_end(last)
    run.fill(2)
    first.leave()
    second.leave()
    run.places[2].get_ready()
    for each in run.places:
        run.hear(each)
    assert run.meeting.number == 1
    for each in run.places if phase != "waiting" else []:
        while each.orders:
            each.obey()
        each.come()
    for each in run.places if phase == "agreed" else []:
        each.agree()
    stopped = run.places[:number]
    for each in stopped:
        each.stopped = True
    run.settle()
    assert run.killed.issuperset(stopped) and run.given_up == (number == 3)
