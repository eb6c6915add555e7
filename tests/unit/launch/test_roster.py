"""Who is a member in which epoch: the launcher's roster, with simulated workers that are lost at any moment.

Hypothesis picks what happens next: which queue delivers, who is lost. What the workers do is written here once more,
after the words of `distributed.membership`; the steps they make are compared with a log.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest

from dist_partial.launch.roster import ANSWER_SECONDS, Ask, Begin, GiveUp, Kill, Leave, Roster, Start

INSIDE = ("meeting", "agreed", "training")  # places of a worker that is in an epoch
ROUNDS = 150  # in which all must train again; a few are enough
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
    place: str = "starting"
    meeting: Meeting | None = None
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
        if self.place == "starting":
            yield f"{self} is ready", self.get_ready
        if self.place == "waiting" and self.begun:
            yield f"{self} comes to epoch {self.begun[0].number}", self.come
        if self.meeting is None or self.place not in INSIDE:
            return
        if self.over >= self.meeting.number or any(map(self.is_lost, self.meeting.members)):
            yield f"{self} leaves", self.leave
        if self.place == "meeting" and len(self.meeting.came) == len(self.meeting.members):
            yield f"{self} takes the state", self.agree
        if self.place == "agreed":
            yield f"{self} goes on", self.go_on
        if self.place == "training" and self.called and len(self.received()) == len(self.meeting.members):
            yield f"{self} makes step {len(self.history)}", self.step

    def is_lost(self, other: "Worker") -> bool:
        """Whether it can notice that another has gone, answers no more, or has left the epoch."""
        has_left = other in self.meeting.came and (other.meeting is not self.meeting or other.place == "waiting")
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
        self.place = "waiting"
        self.say("ready")

    def come(self) -> None:
        self.meeting, self.place = self.begun.popleft(), "meeting"
        self.meeting.came[self] = None if self.history is None else list(self.history)

    def leave(self) -> None:
        self.place = "waiting"
        self.frames.clear()
        self.say("left", self.meeting.number, None if self.history is None else len(self.history))

    def agree(self) -> None:
        """Goes to the furthest step that one has."""
        furthest = max((each for each in self.meeting.came.values() if each is not None), key=len)
        if self.history is not None and len(self.history) < len(furthest):
            # It has added to the step that it lacks, or the step would not have been made.
            assert self.called and self.history == furthest[:-1]
        self.history, self.called, self.place = list(furthest), False, "agreed"

    def go_on(self) -> None:
        self.place = "training"
        self.say("went", self.meeting.number, len(self.history))

    def receive(self, frame: Frame) -> None:
        # One of an older epoch may come at any time.
        if self.place in INSIDE and frame.meeting.number == self.meeting.number:
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

    def __init__(self, ranks: int, spares: int, faults: int = 0) -> None:
        self.names = itertools.count()
        self.workers: list[Worker] = []
        self.ranks: list[Worker | None] = [self.start([]) for _ in range(ranks)]
        self.meeting = Meeting(0, list(self.ranks), {each: [] for each in self.ranks})
        for each in self.ranks:
            each.place, each.meeting = "training", self.meeting
        self.roster = Roster(list(self.ranks))
        self.spares = [self.start() for _ in range(spares)]
        self.ready: set[Worker] = set()
        self.went = set(self.ranks)  # who has said that it goes on in the epoch that has begun last
        self.seen: set[Worker] = set()  # whose end the launcher has seen
        self.links: dict[tuple[Worker, Worker, int], collections.deque[Frame]] = {}
        self.due: list[int] = []  # ranks to be given to another process
        self.asked: dict[Worker, float] = {}  # when; not who has answered since, or was told something else
        self.killed: set[Worker] = set()  # or about to be
        self.heard: list[tuple[Worker, tuple]] = []
        self.log: list = []  # the steps that all have made
        self.now, self.given_up, self.faults_left = 0.0, False, faults
        self.counts: collections.Counter[str] = collections.Counter()

    def start(self, history: list | None = None) -> Worker:
        self.workers.append(Worker(f"w{next(self.names)}", history))
        return self.workers[-1]

    # What may happen.

    def events(self) -> Iterator[Event]:
        for worker in self.workers:
            yield from self.events_of(worker)
        for (sender, receiver, number), frames in self.links.items():
            if frames:
                yield f"{receiver} gets a frame of {sender}, epoch {number}", functools.partial(self.carry, frames)
        for rank in self.due:
            yield f"rank {rank} is filled", functools.partial(self.fill, rank)

    def events_of(self, worker: Worker) -> Iterator[Event]:
        if worker.said:
            yield f"{worker} is heard: {worker.said[0]}", functools.partial(self.hear, worker)
        if worker in self.killed and worker.alive and not worker.gone:
            yield f"{worker} is killed", functools.partial(self.kill, worker)
        if (worker.gone or not worker.alive) and worker not in self.seen:
            yield f"the end of {worker} is seen", functools.partial(self.see_end, worker)
        if worker.alive and not worker.stopped and worker.place == "training" and not worker.called:
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
            if worker.place != "starting" and self.is_noticed(worker):
                if not worker.stopped:
                    yield f"{worker} is stopped", functools.partial(setattr, worker, "stopped", True)
                if not worker.cut:
                    yield f"{worker} is cut off unnoticed", functools.partial(setattr, worker, "cut", True)
            if worker.stopped:
                yield f"{worker} runs on", functools.partial(setattr, worker, "stopped", False)
            elif worker.place in INSIDE:
                yield f"{worker} loses a connection", worker.leave
        if self.is_noticed():
            yield "all are stopped", self.stop_all
        for worker, message in self.heard[-12:]:
            yield f"{worker} is heard again: {message}", functools.partial(self.take, worker, message)

    def is_noticed(self, worker: Worker | None = None) -> bool:
        """Whether it comes out that one is stopped, or all: not where all have gone on, and none is left to say so."""
        for each in self.ranks:
            if each is None or not each.alive or (not each.cut and each.place != "training"):
                return True
            if worker and each is not worker and not each.cut and not each.stopped:
                return True
        return self.roster.broken

    def cut(self, worker: Worker) -> None:
        worker.cut = worker.gone = True

    def stop_all(self) -> None:
        for each in self.ranks:
            if each and each.place != "starting":
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
        """Has everything arrive and time pass, without another fault: all train again, or nobody can."""
        goal = 2 + max(len(each.history) for each in self.workers if each.history is not None)
        for _ in range(ROUNDS):
            if self.given_up or self.trains(goal):
                return
            for worker in list(self.workers):
                while not self.given_up and (event := next(self.events_of(worker), None)):
                    self.happen(*event)
            for frames in list(self.links.values()):
                while frames:
                    self.carry(frames)
            while self.due:
                self.fill(self.due[0])
            self.happen("time passes", functools.partial(self.tick, 0.5))
        pytest.fail(f"they wait for ever: {[(each, each and each.place) for each in self.ranks]}")

    def trains(self, goal: int) -> bool:
        """Whether all ranks are in the epoch that has begun last, and get on, as the launcher has heard."""
        return self.roster.all_went and all(
            each
            and each.alive
            and each.place == "training"
            and each.meeting is self.meeting
            and len(each.history) >= goal
            for each in self.ranks
        )

    # What the launcher does.

    def see_end(self, worker: Worker) -> None:
        self.seen.add(worker)
        if worker in self.spares:
            self.spares.remove(worker)
            return
        could = self.roster.can_lose(worker)
        actions = self.roster.ended(worker)
        if worker in self.ranks:
            assert could == (GiveUp() not in actions)
            self.ranks[self.ranks.index(worker)] = None
        self.do(actions)

    def hear(self, worker: Worker) -> None:
        message = worker.said.popleft()
        self.heard.append((worker, message))
        self.take(worker, message)

    def take(self, worker: Worker, message: tuple) -> None:
        match message:
            case ("ready",):
                self.ready.add(worker)
                self.do(self.roster.ready(worker))
            case ("answers",):
                self.asked.pop(worker, None)
                self.roster.answered(worker)
            case ("left", epoch, step):
                self.do(self.roster.left(worker, epoch, step))
            case ("went", epoch, step):
                self.roster.went(worker, epoch, step)
                if epoch == self.meeting.number:
                    self.went.add(worker)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.roster.tick(self.now))

    def fill(self, rank: int) -> None:
        self.due.remove(rank)
        worker = max(self.spares, key=lambda spare: spare in self.ready) if self.spares else self.start()
        if self.spares:
            self.spares.remove(worker)
        self.ranks[rank] = worker
        self.roster.started(rank, worker)
        if worker in self.ready:
            self.do(self.roster.ready(worker))

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
                    assert worker in self.ranks and epoch == self.meeting.number
                    self.asked.pop(worker, None)
                    worker.orders.append(action)
                case Ask(worker):
                    assert worker in self.ranks and worker not in self.killed
                    assert self.roster.broken or worker not in self.went, "nobody waits for it"
                    self.asked[worker] = self.now
                    worker.orders.append(action)
                case Start(rank):
                    assert self.ranks[rank] is None and rank not in self.due
                    self.due.append(rank)
                case Kill(worker):
                    assert worker in self.ranks and worker not in self.killed
                    assert worker in self.asked, "it has answered, or was not asked since"
                    assert self.now >= self.asked[worker] + ANSWER_SECONDS
                    self.killed.add(worker)
                    what = "stopped" if worker.stopped else "cut off" if worker.cut else "slow"
                    self.counts[f"{what}, killed"] += 1
                    self.counts["killed in a meeting"] += not self.roster.broken
                case Begin(epoch, workers):
                    self.begin(epoch, list(workers))
                case GiveUp():
                    assert not any(each and each.history is not None for each in self.ranks), "one has the state"
                    self.given_up = True

    def begin(self, epoch: int, workers: list[Worker]) -> None:
        assert workers == self.ranks and not self.killed.intersection(workers)
        for each in workers:
            assert each.place == "waiting" and not each.begun, "one has not left"
            assert not any(isinstance(order, Meeting) for order in each.orders), "one has not come to the last"
        assert any(each.history is not None for each in workers)
        assert epoch == self.meeting.number + 1
        self.meeting, self.went = Meeting(epoch, workers), set()
        self.asked.clear()
        lengths = {None if each.history is None else len(each.history) for each in workers}
        self.counts += collections.Counter(begun=1, joined=None in lengths, apart=len(lengths - {None}) > 1)
        for each in workers:
            each.orders.append(self.meeting)

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
        if receiver.alive and not receiver.stopped:
            receiver.receive(frame)

    def check(self) -> None:
        inside = [each for each in self.workers if each.alive and each.place in INSIDE]
        held = [(each.meeting.number, each.meeting.members.index(each)) for each in inside]
        assert len(held) == len(set(held)), "two have the same rank in an epoch"
        assert self.roster.all_went == (not self.roster.broken and self.went.issuperset(self.ranks))
        histories = [each.history for each in self.ranks if each and each.alive and each.history is not None]
        self.log += min(histories, key=len, default=[])[len(self.log) :]
        assert [step for step, *_ in self.log] == list(range(len(self.log)))
        assert all(each[: len(self.log)] == self.log for each in histories), "a step is lost, or made twice"
        ahead = [each[len(self.log) :] for each in histories if len(each) > len(self.log)]
        assert all(len(each) == 1 and each == ahead[0] for each in ahead), "they are more than a step apart"


def test_workers_go_on_together_whatever_is_lost():
    counts: collections.Counter[str] = collections.Counter()

    @hypothesis.settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        ranks=st.integers(2, 4),
        spares=st.integers(0, 2),
        faults=st.integers(0, 8),
        schedule=st.lists(st.integers(0, 2**16), min_size=60, max_size=300),
    )
    def run(ranks, spares, faults, schedule):
        made = Run(ranks, spares, faults)
        for choice in schedule:
            made.choose(choice)
        hypothesis.note("no more faults")
        made.settle()
        counts.update(made.counts + collections.Counter(given_up=made.given_up, went_on=not made.given_up))

    run()
    # The schedules lead to all that matters.
    matters = {"joined", "apart", "stopped, killed", "cut off, killed", "slow, killed", "killed in a meeting"}
    few = {kind for kind in matters | {"given_up", "went_on"} if counts[kind] < 20}
    assert not few, counts


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


def test_a_worker_is_stopped_after_its_answer():
    run = Run(ranks=3, spares=0)
    _, second, last = run.ranks
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
@pytest.mark.parametrize("place", ["waiting", "meeting", "agreed"])
def test_workers_are_stopped_on_their_way_back(place, number):
    run = Run(ranks=3, spares=0)
    first, second, last = run.ranks
    last.alive = False
    run.see_end(last)
    run.fill(2)
    first.leave()
    second.leave()
    run.ranks[2].get_ready()
    for each in run.ranks:
        run.hear(each)
    assert run.meeting.number == 1
    for each in run.ranks if place != "waiting" else []:
        while each.orders:
            each.obey()
        each.come()
    for each in run.ranks if place == "agreed" else []:
        each.agree()
    stopped = run.ranks[:number]
    for each in stopped:
        each.stopped = True
    run.settle()
    assert run.killed.issuperset(stopped) and run.given_up == (number == 3)
