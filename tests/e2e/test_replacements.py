"""Real launchers and agents, and workers that are replaced: small scripts that speak as members do.

What workers and launcher say to each other is in `dist_partial.distributed.membership`. Here nobody meets anybody: a
worker says that it has left, or met the others, as soon as it is told to.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launchers import TIMEOUT, Launched, alive, assert_gone, launched, wait_until

pytestmark = pytest.mark.slow

# The first worker leaves the epoch once there is a file: so it has noticed a loss.
NOTICES = """
    begin()
    if place == 0:
        serve("lost")
        leave()
    serve()
    end()
"""

SOON = 12  # seconds: what should take about one does not take the 30 or 60 that others may have

# A launcher. `settings` are keyword arguments of supervise, and names of the module to be replaced.
LAUNCHER = """
import json, os, sys, threading
from pathlib import Path
from dist_partial.launch import attempt, output, roster, supervisor

folder, script, workers, settings = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
spares, delay = settings.pop("spares", 0), settings.pop("delay", 0.05)
attempt.FINISH = settings.pop("finish", 60.0)
roster.ANSWER_SECONDS = settings.pop("answer", roster.ANSWER_SECONDS)

class Roster(roster.Roster):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        (folder / "all stay").touch()  # which the launcher does not say

roster.Roster = Roster

def commands(number):
    addresses = [f"10.0.0.{place}:{2000 + number}" for place in range(workers + spares)]
    made = []
    for place, address in enumerate(addresses):
        task = {"type": "worker", "index": min(place, workers - 1)}
        config = {"cluster": {"worker": addresses[:workers]}, "task": task}
        name = f"worker {place}" if place < workers else f"spare {place - workers}"
        order = {
            "program": [sys.executable, "-u", script],
            "arguments": [str(folder), str(place), str(number)],
            "environment": {"TF_CONFIG": json.dumps(config), "DIST_PARTIAL_SECRET": f"secret {number}"},
            "run_dir": str(folder / "run"),
            "names": [],
        }
        agent = [sys.executable, "-m", "dist_partial.launch", "agent"]
        made.append(supervisor.Command(name, agent, order, address=address, spare=place >= workers))
    return made

def held():
    return len(os.listdir("/proc/self/fd")), threading.active_count()

before = held() if sys.platform == "linux" else None
options = {"restarts": 10, "grace_seconds": 30, "settle": 0.5, "delay": lambda count: delay, **settings}
code = supervisor.supervise(commands, logs=folder / "logs", console=output.Console(), **options)
assert before is None or held() == before, (before, held())
try:
    assert not os.waitpid(-1, os.WNOHANG), "a child is left"
except ChildProcessError:
    pass
sys.exit(code)
"""

# What every worker begins with. It notes what it says, and all that it is told.
WORKER = """
import json, os, select, signal, socket, sys, time
from pathlib import Path

folder, place, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
control = socket.socket(fileno=int(os.environ["DIST_PARTIAL_CONTROL"]))
joins = "DIST_PARTIAL_JOINS" in os.environ
config = json.loads(os.environ["TF_CONFIG"])
held = None if joins else 120  # the step of the state that it has
epoch, left, rest = 0, False, b""

def note(**what):
    line = json.dumps({"pid": os.getpid(), "place": place, "at": time.monotonic(), **what}) + "\\n"
    with open(folder / "notes", "ab", buffering=0) as file:
        file.write(line.encode())

def say(**message):
    control.sendall(json.dumps(message).encode() + b"\\n")
    note(**message)

def heard():
    global rest
    if not select.select([control], [], [], 0.02)[0]:
        return []
    *lines, rest = (rest + control.recv(1 << 16)).split(b"\\n")
    return map(json.loads, lines)

def leave():
    global left
    if not left:
        left = True
        say(left=epoch, step=held)

def meet(told):
    global epoch, left, held
    epoch, left, held = told["epoch"], False, 120
    print(f"epoch {epoch} as rank {told['rank']}")
    say(went=epoch, step=held)

def obey(told):
    if "leave" in told:
        leave()
    elif "ask" in told:
        say(answers=True)
    elif "epoch" in told:
        meet(told)
    else:
        sys.exit(75)

def there(name):
    return (folder / name).exists()

def wait_for(name):
    while not there(name):
        time.sleep(0.02)

def begin():
    say(**({"ready": True} if joins else {"stays": True}))

def serve(until="done"):
    while not there(until):
        for told in heard():
            note(**told)
            obey(told)

def end():
    say(ends=True)
    sys.exit(0)

(folder / f"{os.getpid()}.partial").write_text(f"{os.getpid()} {os.getppid()}")
(folder / f"{os.getpid()}.partial").rename(folder / f"{os.getpid()}.pid")
secret, (rank, workers) = os.environ["DIST_PARTIAL_SECRET"], (config["task"]["index"], config["cluster"]["worker"])
note(starts=number, joins=joins, rank=rank, secret=secret, workers=workers)

"""

SERVES = """
begin()
serve()
end()
"""


@contextlib.contextmanager
def supervised(folder: Path, script: str = SERVES, workers: int = 3, **settings: Any) -> Iterator[Launched]:
    """A launcher of workers that run the script after WORKER; once all can stay when another is lost, it is yielded."""
    path = folder / "worker.py"
    path.write_text(WORKER + textwrap.dedent(script))
    command = [sys.executable, "-c", LAUNCHER, str(folder), str(path), str(workers), json.dumps(settings)]
    with launched(folder, command) as launcher:
        wait_until(lambda: (folder / "all stay").exists() or launcher.process.poll() is not None)
        yield launcher


def notes(launcher: Launched, key: str) -> list[dict[str, Any]]:
    """What workers have said or were told, in the order in which they did."""
    path = launcher.folder / "notes"
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    return [each for each in map(json.loads, lines) if key in each]


def noted(launcher: Launched, key: str, count: int) -> list[dict[str, Any]]:
    """The same, once there are so many."""
    wait_until(lambda: len(notes(launcher, key)) >= count or launcher.process.poll() is not None)
    found = notes(launcher, key)
    assert len(found) >= count, launcher.out + launcher.err
    return found


def started(launcher: Launched, joins: bool = False) -> list[dict[str, Any]]:
    """The processes that were started: those in place of lost ones in the order in which they came, or the others."""
    found = [each for each in notes(launcher, "starts") if each["joins"] == joins]
    return found if joins else sorted(found, key=lambda each: (each["starts"], each["place"]))


def says(launcher: Launched, text: str) -> None:
    """Waits until the launcher has printed it."""
    wait_until(lambda: text in launcher.out or launcher.process.poll() is not None)
    assert text in launcher.out, launcher.out + launcher.err


def kill(*processes: dict[str, Any], by: signal.Signals = signal.SIGKILL) -> None:
    for each in processes:
        os.kill(each["pid"], by)


def kill_at_once(launcher: Launched, *processes: dict[str, Any]) -> None:
    """Kills them so that the launcher finds all of them ended when it looks."""
    agents = [int((launcher.folder / f"{each['pid']}.pid").read_text().split()[1]) for each in processes]
    os.kill(launcher.process.pid, signal.SIGSTOP)
    kill(*processes)
    assert_gone(agents, TIMEOUT)
    os.kill(launcher.process.pid, signal.SIGCONT)


def exists(pid: int) -> bool:
    """Whether there is such a process, or a zombie; `alive` tells them apart, by a process of its own for each."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def ends(launcher: Launched, code: int, seconds: float = TIMEOUT) -> None:
    """Waits for the end: it has the code, and nothing is left of the workers, and in the launcher."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.process.wait(seconds)
    assert launcher.process.poll() == code, launcher.out + launcher.err
    assert "AssertionError" not in launcher.err
    assert_gone([pid for pid in launcher.all_pids() if exists(pid)], 0)
    for path in launcher.folder.glob("*.pid"):
        path.unlink()  # for `launched`, which would look at each once more


def lines(launcher: Launched, beginning: str) -> list[str]:
    return [line for line in launcher.out.splitlines() if line.startswith(beginning)]


def test_a_lost_worker_is_replaced_and_the_others_stay(tmp_path):
    with supervised(tmp_path) as launcher:
        first = started(launcher)
        kill(first[1])
        says(launcher, "all go on")
        meetings = noted(launcher, "epoch", 3)
        assert alive(first[0]["pid"]) and alive(first[2]["pid"])
        (tmp_path / "done").touch()
        ends(launcher, 0)
        (new,) = started(launcher, joins=True)
        assert started(launcher) == first
        assert {each["rank"]: each["pid"] for each in meetings} == {
            0: first[0]["pid"],
            1: new["pid"],
            2: first[2]["pid"],
        }
        assert len(meetings) == 3 and new["rank"] == 1
        assert [each["epoch"] for each in meetings] == [1, 1, 1]
        (secret,) = {each["secret"] for each in meetings}
        ((*workers,),) = {tuple(each["workers"]) for each in meetings}
        assert secret not in [each["secret"] for each in first]
        assert len(workers) == 3 and not set(workers) & set(first[0]["workers"])
        assert [address.partition(":")[0] for address in workers] == ["10.0.0.0", "10.0.0.1", "10.0.0.2"]
        assert lines(launcher, "lost: ") == ["lost: worker 1 was killed by SIGKILL; another starts"]
        (line,) = lines(launcher, "all go on")
        assert re.fullmatch(r"all go on from step 120, \d+\.\d s after: worker 1 was killed by SIGKILL", line)
        assert "restart" not in launcher.out and launcher.err == ""


def test_all_go_on_is_said_once_all_have_told_it(tmp_path):
    """And not when the new worker has, while another still goes back to its state."""
    script = """
        begin()
        told = meet
        def meet(order):
            if place == 0:
                wait_for("let it go on")
            told(order)
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        kill(started(launcher)[1])
        noted(launcher, "went", 1)
        time.sleep(0.5)  # in which the launcher has heard of it
        assert "all go on" not in launcher.out
        (tmp_path / "let it go on").touch()
        says(launcher, "all go on")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert len(lines(launcher, "all go on")) == 1


def test_the_place_of_a_lost_worker_is_replaced_as_often_as_it_is_lost(tmp_path):
    """Also while the others meet it; each meeting has a number, addresses and a secret of its own."""
    script = """
        begin()
        if joins and not there("one has come"):
            (folder / "one has come").touch()
            meet = lambda told: sys.exit(75)
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        first = started(launcher)
        kill(first[1])
        says(launcher, "all go on")
        meetings = noted(launcher, "epoch", 4)
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert [each["epoch"] for each in meetings] == [1, 1, 2, 2]
        one, two = ([each for each in meetings if each["epoch"] == epoch] for epoch in (1, 2))
        assert len({each["secret"] for each in one}) == len({each["secret"] for each in two}) == 1
        assert not {each["secret"] for each in one} & {each["secret"] for each in two}
        assert not set(one[0]["workers"]) & set(two[0]["workers"])
        assert started(launcher) == first and len(started(launcher, joins=True)) == 2
        assert lines(launcher, "lost: ") == [
            "lost: worker 1 was killed by SIGKILL; another starts",
            "lost: worker 1 ended with exit code 75; another starts in 0.05 s",
        ]
        (line,) = lines(launcher, "all go on")
        assert line.endswith("s after: worker 1 was killed by SIGKILL, worker 1 ended with exit code 75")


def test_workers_that_have_lost_a_connection_meet_again_though_none_is_lost(tmp_path):
    with supervised(tmp_path, NOTICES) as launcher:
        (tmp_path / "lost").touch()
        meetings = noted(launcher, "epoch", 3)
        noted(launcher, "went", 3)
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert [each["epoch"] for each in meetings] == [1, 1, 1]
        assert {each["rank"] for each in meetings} == {0, 1, 2}
        assert not started(launcher, joins=True) and launcher.out.count("lost") == 0


def test_a_spare_takes_the_place_of_a_lost_worker_and_another_spare_starts(tmp_path):
    with supervised(tmp_path, spares=1) as launcher:
        says(launcher, "spare 0 is ready to come in place of a lost worker\n")
        first, (spare,) = started(launcher), started(launcher, joins=True)
        assert spare["at"] > max(each["at"] for each in notes(launcher, "stays")) and spare["place"] == 3
        kill(first[1])
        says(launcher, "spare 1 is ready to come in place of a lost worker\n")
        says(launcher, "all go on")
        meetings = noted(launcher, "epoch", 3)
        assert {each["rank"]: each["place"] for each in meetings} == {0: 0, 1: 3, 2: 2}
        assert [address.partition(":")[0] for address in meetings[0]["workers"]] == ["10.0.0.0", "10.0.0.3", "10.0.0.2"]
        assert "lost: worker 1 was killed by SIGKILL; spare 0 takes its place\n" in launcher.out
        says(launcher, "[1] epoch 1 as rank 1\n")
        kill(first[2])
        says(launcher, "lost: worker 2 was killed by SIGKILL; spare 1 takes its place\n")
        says(launcher, "[2] epoch 2 as rank 2\n")
        wait_until(lambda: len(lines(launcher, "all go on")) == 2 or launcher.process.poll() is not None)
        says(launcher, "spare 2 is ready")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert len(started(launcher, joins=True)) == 3 and started(launcher) == first
        assert all("another starts" not in line for line in lines(launcher, "lost: "))


def test_a_spare_that_is_not_ready_is_waited_for(tmp_path):
    script = """
        if joins:
            wait_for("ready")
        begin()
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2, spares=1) as launcher:
        noted(launcher, "starts", 3)
        first = started(launcher)
        kill(first[0])
        says(launcher, "lost: worker 0 was killed by SIGKILL; spare 0 takes its place once it is ready\n")
        (tmp_path / "ready").touch()
        says(launcher, "all go on")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert {each["rank"]: each["place"] for each in notes(launcher, "epoch")} == {0: 2, 1: 1}


def test_a_lost_spare_is_started_again_after_the_delay(tmp_path):
    with supervised(tmp_path, workers=2, spares=1, delay=0.5) as launcher:
        says(launcher, "spare 0 is ready")
        killed = time.monotonic()
        kill(*started(launcher, joins=True))
        says(launcher, "spare 0 has ended (exit code 137); another in 0.5 s\n")
        says(launcher, "spare 1 is ready")
        assert started(launcher, joins=True)[1]["at"] > killed + 0.5
        kill(started(launcher)[1])
        says(launcher, "lost: worker 1 was killed by SIGKILL; spare 1 takes its place\n")
        says(launcher, "all go on")
        (tmp_path / "done").touch()
        ends(launcher, 0)


def test_spares_that_end_at_once_are_not_started_without_end(tmp_path):
    """The workers go on without them."""
    script = """
        if joins:
            print("error: no disk here")
            sys.exit(75)
        begin()
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2, spares=1, restarts=2) as launcher:
        says(launcher, "no other\n")
        time.sleep(0.3)  # more than the delay
        (tmp_path / "done").touch()
        ends(launcher, 0)
        again, no_other = "(error: no disk here); another in 0.05 s", "(error: no disk here); no other"
        assert lines(launcher, "spare ") == [
            f"spare 0 has ended {again}",
            f"spare 1 has ended {again}",
            f"spare 2 has ended {no_other}",
        ]
        assert len(started(launcher, joins=True)) == 3 and "lost: " not in launcher.out


def test_a_worker_that_does_not_answer_is_killed_and_replaced(tmp_path):
    with supervised(tmp_path, NOTICES, answer=1.0) as launcher:
        first = started(launcher)
        kill(first[1], by=signal.SIGSTOP)
        (tmp_path / "lost").touch()
        says(launcher, "all go on")
        assert_gone([first[1]["pid"]])
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert "worker 1 does not answer: it is stopped, or cut off\n" in launcher.out
        assert lines(launcher, "lost: ") == ["lost: worker 1 was killed by SIGKILL; another starts"]
        assert launcher.out.count("does not answer") == 1  # and the others have
        (new,) = started(launcher, joins=True)
        assert new["at"] - notes(launcher, "left")[0]["at"] > 1.0
        assert {each["rank"]: each["pid"] for each in notes(launcher, "epoch")}[1] == new["pid"]
        assert started(launcher) == first


def test_two_that_are_lost_at_once_are_replaced(tmp_path):
    with supervised(tmp_path) as launcher:
        first = started(launcher)
        kill_at_once(launcher, first[0], first[2])
        says(launcher, "all go on")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        meetings = notes(launcher, "epoch")
        assert {each["rank"]: each["place"] for each in meetings} == {0: 0, 1: 1, 2: 2}
        assert [each["epoch"] for each in meetings] == [1, 1, 1]
        assert first[1]["pid"] in [each["pid"] for each in meetings]
        assert started(launcher) == first and len(started(launcher, joins=True)) == 2
        assert lines(launcher, "lost: ") == [
            f"lost: worker {rank} was killed by SIGKILL; another starts" for rank in (0, 2)
        ]
        (line,) = lines(launcher, "all go on")
        assert line.endswith(" s after: worker 0 was killed by SIGKILL, worker 2 was killed by SIGKILL")


def test_all_start_again_when_the_last_is_lost_that_holds_the_state(tmp_path):
    script = """
        if joins:
            wait_for("never")
        begin()
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        first = started(launcher)
        kill(first[0])
        noted(launcher, "starts", 3)
        (new,) = started(launcher, joins=True)
        kill(first[1])
        says(launcher, "restart 1 of 10 in 0.05 s: worker 1 was killed by SIGKILL\n")
        noted(launcher, "starts", 5)
        assert_gone([new["pid"]], 0)
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert len(started(launcher)) == 4 and len(started(launcher, joins=True)) == 1
        assert len(lines(launcher, "lost: ")) == 1 and launcher.out.count("restart") == 1


def test_all_start_again_when_nobody_that_is_left_holds_the_state(tmp_path):
    script = """
        begin()
        held = None
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        kill(started(launcher)[0])
        says(launcher, "restart 1 of 10 in 0.05 s: worker ")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert not notes(launcher, "epoch") and len(started(launcher)) == 4


def test_replacements_that_never_get_there_are_not_started_without_end(tmp_path):
    """All start again, as after any fault."""
    script = """
        if joins:
            sys.exit(75)
        begin()
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2, restarts=2) as launcher:
        kill(started(launcher)[1])
        says(launcher, "restart 1 of 2 in 0.05 s: worker 1 ended with exit code 75\n")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert lines(launcher, "lost: ") == [
            "lost: worker 1 was killed by SIGKILL; another starts",
            "lost: worker 1 ended with exit code 75; another starts in 0.05 s",
        ]
        (line,) = lines(launcher, "worker 1: no other in its place: ")
        assert line.endswith("limit of 2")
        assert len(started(launcher, joins=True)) == 2 and len(started(launcher)) == 4


def test_replacements_that_end_in_the_same_way_are_not_tried_up_to_the_limit(tmp_path):
    script = """
        if joins:
            print(f"error: no device {os.getpid()}")
            sys.exit(3)
        begin()
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        kill(started(launcher)[1])
        says(launcher, "restart 1 of 10 in 0.05 s: worker 1 ended with exit code 3: error: no device ")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        (line,) = lines(launcher, "worker 1: no other in its place: ")
        assert "the same failure as before" in line
        assert len(started(launcher, joins=True)) == 2 and len(lines(launcher, "lost: ")) == 2


def test_the_limit_counts_from_the_last_step(tmp_path):
    """Here all go on from the same step each time."""
    with supervised(tmp_path, workers=2, restarts=1) as launcher:
        victim = started(launcher)[1]
        for count in (1, 2):
            kill(victim)
            noted(launcher, "went", 2 * count)
            says(launcher, f"[0] epoch {count} as rank 0\n")
            victim = started(launcher, joins=True)[-1]
        kill(victim)
        says(launcher, "worker 1: no other in its place: ")
        says(launcher, "restart 1 of 1 in 0.05 s: worker 1 was killed by SIGKILL\n")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert len(lines(launcher, "lost: ")) == 2


def test_a_run_that_may_not_start_again_ends_with_its_code(tmp_path):
    with supervised(tmp_path, workers=2, restarts=0) as launcher:
        kill(started(launcher)[1])
        ends(launcher, 137)
        assert "worker 1: no other in its place: " in launcher.out
        assert launcher.err.startswith("error: worker 1 was killed by SIGKILL; not again: ")
        assert not started(launcher, joins=True) and "lost: " not in launcher.out


def test_where_no_other_comes_one_that_does_not_end_is_not_waited_for(tmp_path):
    with supervised(tmp_path, workers=2, restarts=0) as launcher:
        first = started(launcher)
        kill(first[0], by=signal.SIGSTOP)
        kill(first[1])
        says(launcher, "worker 1: no other in its place: ")
        ends(launcher, 137, SOON)


def test_nobody_is_replaced_after_one_has_told_that_it_ends(tmp_path):
    script = """
        begin()
        if place == 0:
            serve("at the end")
            say(ends=True)
            wait_for("done")
            sys.exit(0)
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        first = started(launcher)
        (tmp_path / "at the end").touch()
        noted(launcher, "ends", 1)
        time.sleep(0.5)  # in which the launcher has heard of it
        kill(first[1])
        (tmp_path / "done").touch()
        says(launcher, "restart 1 of 10 in 0.05 s: worker 1 was killed by SIGKILL\n")
        ends(launcher, 0)
        assert "lost: " not in launcher.out and not started(launcher, joins=True)


def test_one_that_leaves_when_another_ends_is_told_to_end(tmp_path):
    """It has lost a worker that was not to be replaced any more."""
    script = """
        begin()
        if place == 0 and not there("over"):
            serve("at the end")
            say(ends=True)
            sys.exit(0)
        if place == 1 and not there("over"):
            serve("over")
            leave()
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        (tmp_path / "at the end").touch()
        assert_gone([started(launcher)[0]["pid"]], TIMEOUT)
        time.sleep(0.5)  # in which the launcher has heard of it
        (tmp_path / "over").touch()
        says(launcher, "restart 1 of 10 in 0.05 s: worker 1 ended with exit code 75\n")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert len(notes(launcher, "end")) == 1 and "lost: " not in launcher.out


def test_where_one_ends_though_another_is_lost_nobody_waits_for_the_next_meeting(tmp_path):
    script = """
        if joins:
            serve()
        begin()
        if place == 0 and not there("done"):
            wait_for("at the end")
            end()
        serve()
        end()
    """
    with supervised(tmp_path, script) as launcher:
        kill(started(launcher)[1])
        noted(launcher, "left", 1)
        noted(launcher, "starts", 4)
        (tmp_path / "at the end").touch()
        says(launcher, "restart 1 of 10 in 0.05 s: worker ")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert len(lines(launcher, "lost: ")) == 1 and not notes(launcher, "epoch")
        assert len(started(launcher)) == 6


def test_where_all_others_end_one_whose_place_is_empty_is_not_waited_for(tmp_path):
    """A lost worker is no process that could still end."""
    script = """
        if joins:
            sys.exit(75)
        begin()
        wait_for("at the end")
        end()
    """
    with supervised(tmp_path, script, workers=2, delay=1.0) as launcher:
        kill(started(launcher)[1])
        says(launcher, "lost: worker 1 ended with exit code 75; another starts in 1 s\n")
        (tmp_path / "at the end").touch()
        ends(launcher, 0, SOON)
        assert "worker 1 does not end" not in launcher.out
        assert "restart 1 of 10 in 1 s: worker 1 " in launcher.out


@pytest.mark.parametrize("code", [1, 2])
def test_one_that_would_end_in_the_same_way_is_not_replaced(tmp_path, code):
    script = f"""
        begin()
        if place == 1:
            serve("fail")
            print("error: no such rule")
            sys.exit({code})
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        (tmp_path / "fail").touch()
        ends(launcher, code)
        assert "lost: " not in launcher.out and "restart" not in launcher.out
        assert not started(launcher, joins=True)
        assert launcher.err.startswith(f"error: worker 1 ended with exit code {code}: error: no such rule; not again: ")


def test_one_that_has_ended_is_not_said_not_to_answer(tmp_path):
    """The others have as long to end as they have without replacements, though one of them hears of the loss."""
    script = """
        begin()
        if place == 1:
            serve("fail")
            print("error: no such rule")
            sys.exit(1)
        if place == 0:
            serve("fail")
            leave()
        serve()
        end()
    """
    with supervised(tmp_path, script, workers=2, settle=2.0, answer=0.5) as launcher:
        (tmp_path / "fail").touch()
        ends(launcher, 1)
        assert "does not answer" not in launcher.out
        assert "lost: " not in launcher.out


# As a worker that waits for others, and looks at no signal; one that joins is still at its imports.
WAITS = """
    if joins:
        wait_for("never")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: None)
    begin()
    serve()
    end()
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_launcher_that_is_told_to_stop_while_others_wait_ends_in_time(tmp_path, signum, code):
    with supervised(tmp_path, WAITS) as launcher:
        kill(started(launcher)[1])
        noted(launcher, "left", 2)
        noted(launcher, "starts", 4)
        os.kill(launcher.process.pid, signum)
        ends(launcher, code, SOON)
        assert len(notes(launcher, "end")) == 2
        assert "restart" not in launcher.out and len(notes(launcher, "starts")) == 4


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_launcher_that_is_told_to_stop_does_not_wait_for_one_whose_place_is_empty(tmp_path, signum, code):
    """The next process for it would start in a minute."""
    script = WAITS.replace('wait_for("never")', "sys.exit(75)")
    with supervised(tmp_path, script, delay=60.0, settle=30.0) as launcher:
        kill(started(launcher)[1])
        says(launcher, "lost: worker 1 ended with exit code 75; another starts in 60 s\n")
        noted(launcher, "left", 2)
        os.kill(launcher.process.pid, signum)
        ends(launcher, code, SOON)
        assert len(started(launcher, joins=True)) == 1


def test_where_one_has_not_told_that_it_stays_all_start_again(tmp_path):
    script = """
        if place != 2:
            begin()
        serve()
        sys.exit(0)
    """
    (tmp_path / "all stay").touch()  # for `supervised`, which would wait for it
    with supervised(tmp_path, script, spares=1) as launcher:
        noted(launcher, "stays", 2)
        noted(launcher, "starts", 3)
        first = started(launcher)
        kill(first[1])
        says(launcher, "restart 1 of 10 in 0.05 s: worker 1 was killed by SIGKILL\n")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert_gone([each["pid"] for each in first], 0)
        assert "lost: " not in launcher.out and not started(launcher, joins=True)
        assert len(started(launcher)) == 6


# One that comes in place of a lost one does so once there is a file; the others wait for it in vain.
FEWER = """
    def leave():
        global left
        if not left:
            left = True
            say(left=epoch, step=held)
            say(waited=True)

    if joins:
        wait_for("come")
        begin()
    else:
        say(stays=True, fewer=[1, 2])
    serve()
    end()
"""


def test_others_go_on_with_fewer_and_take_one_that_comes_later(tmp_path):
    with supervised(tmp_path, FEWER) as launcher:
        first = started(launcher)
        kill(first[0])
        says(launcher, "nobody has come in place of worker 0: the others go on, 2 of 3\n")
        says(launcher, "all go on")
        fewer = noted(launcher, "epoch", 2)
        assert {each["pid"]: each["rank"] for each in fewer} == {first[1]["pid"]: 0, first[2]["pid"]: 1}
        assert [address.partition(":")[0] for address in fewer[0]["workers"]] == ["10.0.0.1", "10.0.0.2"]
        (tmp_path / "come").touch()
        says(launcher, "worker 0 came: all meet, 3 of 3\n")
        wait_until(lambda: len(lines(launcher, "all go on")) == 2 or launcher.process.poll() is not None)
        (tmp_path / "done").touch()
        ends(launcher, 0)
        (new,) = started(launcher, joins=True)
        more = noted(launcher, "epoch", 5)[2:]
        ranks = {first[1]["pid"]: 0, first[2]["pid"]: 1, new["pid"]: 2}  # the first has a state that it can save
        assert {each["pid"]: each["rank"] for each in more} == ranks
        assert [each["epoch"] for each in more] == [2, 2, 2]
        assert [address.partition(":")[0] for address in more[0]["workers"]] == ["10.0.0.1", "10.0.0.2", "10.0.0.0"]
        assert [line.split(" s after: ")[1] for line in lines(launcher, "all go on")] == [
            "worker 0 was killed by SIGKILL",
            "worker 0 came",
        ]
        assert started(launcher) == first


def test_who_has_not_come_is_not_waited_for_at_the_end(tmp_path):
    with supervised(tmp_path, FEWER) as launcher:
        kill(started(launcher)[1])
        says(launcher, "all go on")
        noted(launcher, "starts", 4)
        (tmp_path / "done").touch()
        ends(launcher, 0, SOON)
        assert "restart" not in launcher.out and launcher.err == ""


@pytest.mark.parametrize(("code", "comes"), [(255, "another starts in 0.3 s"), (2, "no other starts")])
def test_one_that_fails_before_it_comes_does_not_disturb_those_that_train_without_it(tmp_path, code, comes):
    fails = f"wait_for('come') or print('error: no such host') or sys.exit({code})"
    script = FEWER.replace('wait_for("come")', fails)
    with supervised(tmp_path, script, delay=0.3) as launcher:
        kill(started(launcher)[2])
        says(launcher, "all go on")
        (tmp_path / "come").touch()
        line = f"worker 2 ended with exit code {code}: error: no such host; {comes}, the others go on without it\n"
        says(launcher, line)
        if code == 255:
            wait_until(lambda: launcher.out.count(line) == 3)
        time.sleep(1.0)
        assert len(started(launcher, joins=True)) == (1 if code == 2 else pytest.approx(6, abs=3))
        assert not notes(launcher, "leave")[2:]
        (tmp_path / "done").touch()
        ends(launcher, 0, SOON)
        assert "restart" not in launcher.out


def test_so_few_that_a_batch_does_not_divide_all_start_again(tmp_path):
    script = FEWER.replace("fewer=[1, 2]", "fewer=[1]")
    with supervised(tmp_path, script) as launcher:
        kill(started(launcher)[2])
        says(launcher, "restart 1 of 10")
        (tmp_path / "done").touch()
        ends(launcher, 0)
        assert "nobody has come" not in launcher.out and not notes(launcher, "epoch")


def test_one_that_comes_after_a_signal_does_not_keep_the_others_from_saving(tmp_path):
    ignores, saves = (
        f"signal.signal(signal.SIGINT, lambda *_: {what})" for what in ("None", "wait_for('saved') or sys.exit(130)")
    )
    script = FEWER.replace('wait_for("come")', f'{ignores}; wait_for("come")').replace("serve()", f"{saves}; serve()")
    with supervised(tmp_path, script) as launcher:
        kill(started(launcher)[0])
        says(launcher, "all go on")
        noted(launcher, "starts", 4)
        os.kill(launcher.process.pid, signal.SIGINT)
        says(launcher, "stopping: ")
        (tmp_path / "come").touch()
        noted(launcher, "ready", 1)
        noted(launcher, "end", 1)
        (tmp_path / "saved").touch()
        ends(launcher, 130, SOON)
        assert "came: all meet" not in launcher.out and len(notes(launcher, "leave")) == 2


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_launcher_that_is_told_to_stop_while_fewer_train_ends_in_time(tmp_path, signum, code):
    with supervised(tmp_path, FEWER) as launcher:
        kill(started(launcher)[0])
        says(launcher, "all go on")
        noted(launcher, "starts", 4)
        os.kill(launcher.process.pid, signum)
        ends(launcher, code, SOON)
        assert "restart" not in launcher.out
