"""Real launchers, agents and workers: small Python scripts that print, fail, hang and are killed."""

import contextlib
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dist_partial.errors import UserError
from dist_partial.launch import output, supervisor
from tests import ROOT
from tests.helpers.launchers import TIMEOUT, assert_gone, launched, wait_until
from tests.helpers.workers import small_disk

# A launcher. `settings` are keyword arguments of supervise, and names of the module to be replaced.
LAUNCHER = """
import json, sys, threading, os
from pathlib import Path
from dist_partial import errors
from dist_partial.launch import attempt, output, supervisor

folder, script, workers, settings = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
delay = settings.pop("delay", 0.05)
attempt.FINISH = settings.pop("finish", 60.0)

def commands(attempt):
    return [
        supervisor.Command(
            f"worker {index}",
            [sys.executable, "-m", "dist_partial.launch", "agent"],
            {
                "program": [sys.executable, "-u", script],
                "arguments": [str(index), str(attempt)],
                "environment": {},
                "run_dir": str(folder / "run"),
                "names": [],
            },
        )
        for index in range(workers)
    ]

def held():
    return len(os.listdir("/proc/self/fd")), threading.active_count()

before = held() if sys.platform == "linux" else None
options = {"restarts": 10, "grace_seconds": 30, "settle": 0.5, "delay": lambda restart: delay, **settings}
try:
    code = supervisor.supervise(commands, logs=folder / "logs", console=output.Console(), **options)
except errors.UserError as error:
    code = f"error: {error}"
assert before is None or held() == before, (before, held())
sys.exit(code)
"""

# What every worker begins with. Its pid and its agent's are in a file once it can take signals.
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path

index, attempt, folder = int(sys.argv[1]), int(sys.argv[2]), Path({folder!r})

def ready():
    path = folder / f"{{attempt}}-{{index}}.pid"
    path.with_suffix(".partial").write_text(f"{{os.getpid()}} {{os.getppid()}}")
    path.with_suffix(".partial").rename(path)

def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.02)

def train(step):
    (folder / "run").mkdir(exist_ok=True)
    with open(folder / "run" / "metrics.jsonl", "a") as file:
        file.write('{{"step": %d, "split": "train", "loss": 1.0}}\\n' % step)

def save(step):
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "run" / "checkpoints" / f"step-{{step:010d}}.safetensors").touch()

"""


def supervised(folder: Path, script: str, workers: int = 3, stderr: int | None = None, **settings):
    """A launcher of workers that run the script after WORKER."""
    path = folder / "worker.py"
    path.write_text(WORKER.format(folder=str(folder)) + textwrap.dedent(script))
    command = [sys.executable, "-c", LAUNCHER, str(folder), str(path), str(workers), json.dumps(settings)]
    return launched(folder, command, stderr)


def log(folder: Path, attempt: int, worker: int) -> bytes:
    return (folder / "logs" / f"attempt-{attempt}" / f"worker-{worker}.log").read_bytes()


def test_all_end_well(tmp_path):
    script = """
        ready()
        print("to stdout")
        print("to stderr", file=sys.stderr)
        sys.stdout.write("no newline")
    """
    with supervised(tmp_path, script) as launcher:
        assert launcher.wait() == 0
        everything = [f"[{k}] {text}" for k in range(3) for text in ("to stdout", "to stderr", "no newline")]
        assert sorted(launcher.out.splitlines()) == sorted(everything)
        assert launcher.err == ""
        for worker in range(3):
            assert log(tmp_path, 1, worker) == b"to stdout\nto stderr\nno newline"


def test_first_failure_decides(tmp_path):
    script = """
        ready()
        if index == 1:
            wait_for("0-0.pid"); wait_for("0-2.pid")
            for i in range(30):
                print("line", i)
            print("error: no luck")
            sys.exit(3)
        wait_for("never")
    """
    with supervised(tmp_path, script, restarts=0) as launcher:
        assert launcher.wait() == 3
        head, *last = launcher.err.splitlines()
        assert head.startswith("error: worker 1 ended with exit code 3: error: no luck")
        assert str(tmp_path / "logs" / "attempt-1" / "worker-1.log") in head
        assert last == [*(f"line {i}" for i in range(11, 30)), "error: no luck"]
        assert "restart" not in launcher.out
        assert_gone(launcher.all_pids())


def test_others_may_say_why_before_they_are_killed(tmp_path):
    script = """
        ready()
        if index == 1:
            sys.exit(1)
        wait_for("0-1.pid")
        time.sleep(0.3)
        print("worker 1 is lost")
    """
    with supervised(tmp_path, script, restarts=0, settle=TIMEOUT) as launcher:
        assert launcher.wait() == 1
        assert "[0] worker 1 is lost" in launcher.out
        assert "[2] worker 1 is lost" in launcher.out


def test_a_mistake_is_not_tried_again(tmp_path):
    # Worker 0 is the first to fail, but what worker 2 says is what the user can fix.
    script = """
        ready()
        if index == 2:
            wait_for("0-0.pid")
            time.sleep(0.3)
            print("error: no such rule")
            sys.exit(2)
        sys.exit(75)
    """
    with supervised(tmp_path, script, settle=TIMEOUT) as launcher:
        assert launcher.wait() == 2
        assert "restart" not in launcher.out
        assert "error: worker 2 ended with exit code 2: error: no such rule" in launcher.err


def test_a_mistake_of_all_workers_is_said_once_by_them_and_once_by_the_launcher(tmp_path):
    script = """
        ready()
        wait_for("0-0.pid"); wait_for("0-1.pid")
        print("error: no such rule")
        sys.exit(2)
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        assert launcher.wait() == 2
        assert launcher.out.count("no such rule") == 1
        assert re.fullmatch(
            r"error: worker \d ended with exit code 2: error: no such rule; not again: .+\n", launcher.err
        )
        assert [log(tmp_path, 1, worker) for worker in range(2)] == [b"error: no such rule\n"] * 2


def test_killed_worker_and_restart(tmp_path):
    script = """
        ready()
        print("attempt", attempt)
        if attempt == 0:
            wait_for("never")
    """
    with supervised(tmp_path, script, delay=1.0) as launcher:
        victim = random.randrange(3)
        first = launcher.pids(0)
        time.sleep(random.random() / 2)
        os.kill(first[victim][0], signal.SIGKILL)
        assert launcher.wait() == 0
        assert f"restart 1 of 10 in 1 s: worker {victim} was killed by SIGKILL\n" in launcher.out
        assert launcher.out.count("restart") == 1
        assert_gone([pid for pair in first for pid in pair])
        for worker in range(3):
            assert log(tmp_path, 1, worker) == b"attempt 0\n"
            assert log(tmp_path, 2, worker) == b"attempt 1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child with its parent")
def test_worker_dies_with_its_agent(tmp_path):
    script = """
        ready()
        if attempt == 0:
            wait_for("never")
    """
    with supervised(tmp_path, script) as launcher:
        worker, agent = launcher.pids(0)[2]
        os.kill(agent, signal.SIGKILL)
        assert_gone([worker])
        assert launcher.wait() == 0
        assert "worker 2 was killed by SIGKILL" in launcher.out


def test_stopped_worker_is_killed(tmp_path):
    script = """
        ready()
        if attempt == 0 and index != 1:
            wait_for("stopped")
            print("error: worker 1 does not answer")
            sys.exit(75)
        if attempt == 0:
            wait_for("never")
    """
    with supervised(tmp_path, script) as launcher:
        stopped = launcher.pids(0)[1][0]
        os.kill(stopped, signal.SIGSTOP)
        (tmp_path / "stopped").touch()
        assert launcher.wait() == 0
        assert re.search(
            r"restart 1 of 10 in 0.05 s: worker [02] ended with exit code 75: error: worker 1 does not answer\n",
            launcher.out,
        )
        assert_gone([stopped])


def test_of_those_that_end_together_the_cause_is_named(tmp_path):
    script = """
        ready()
        if attempt == 0:
            wait_for("lost")
            sys.exit(75)
    """
    with supervised(tmp_path, script) as launcher:
        pids = launcher.pids(0)
        os.kill(launcher.process.pid, signal.SIGSTOP)  # it finds all of them ended at once
        os.kill(pids[2][0], signal.SIGKILL)
        (tmp_path / "lost").touch()
        assert_gone([pid for pair in pids for pid in pair], TIMEOUT)
        os.kill(launcher.process.pid, signal.SIGCONT)
        assert launcher.wait() == 0
        assert "restart 1 of 10 in 0.05 s: worker 2 was killed by SIGKILL\n" in launcher.out


def test_restarts_run_out(tmp_path):
    script = """
        ready()
        print("attempt", attempt)
        if index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for("never")
    """
    with supervised(tmp_path, script, restarts=2) as launcher:
        assert launcher.wait() == 128 + signal.SIGKILL
        assert re.findall(r"restart (\d) of 2", launcher.out) == ["1", "2"]
        assert launcher.err.startswith("error: worker 0 was killed by SIGKILL")
        assert launcher.err.endswith("attempt 2\n")
        assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"attempt-{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(("step", "restarts"), [(None, 0), (7, 1)])
def test_an_exception_that_comes_again(tmp_path, step, restarts):
    """Before the first step it is not tried again; after one, once, for the run gets no further."""
    script = f"""
        ready()
        if index == 0 and {step}:
            train({step})
            (folder / f"{{attempt}} trained").touch()
        if index == 1:
            wait_for(f"{{attempt}} trained" if {step} else "0-0.pid")
            print("error: run.loss raised NameError: name 'x' is not defined (loss.py, line 3)")
            for i in range(30):
                print("  line", i)
            sys.exit(1)
        wait_for("never")
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        assert launcher.wait() == 1
        assert re.findall(r"restart (\d) of 10", launcher.out) == ["1"] * restarts
        head, *last = launcher.err.splitlines()
        raised = "error: run.loss raised NameError: name 'x' is not defined (loss.py, line 3)"
        assert head.startswith(f"error: worker 1 ended with exit code 1: {raised}; not again: ")
        assert last == [f"  line {i}" for i in range(10, 30)]


def test_progress_resets_the_count_of_restarts(tmp_path):
    """Any number of faults with a checkpoint in between, of which the workers' own folder tells, and then too many."""
    script = """
        ready()
        if index == 0 and attempt < 5:
            save(10 * attempt + 10)
        sys.exit(75)
    """
    with supervised(tmp_path, script, workers=2, restarts=2) as launcher:
        assert launcher.wait() == 75
        assert re.findall(r"restart (\d) of 2", launcher.out) == ["1", "1", "1", "1", "1", "2"]
        assert "limit of 2" in launcher.err
        assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"attempt-{n}" for n in range(1, 8)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child with its parent")
def test_progress_is_known_though_agents_are_killed(tmp_path):
    """As where the connection to the only host breaks: the next agent reports it."""
    script = """
        if attempt < 4:
            save(10 * attempt + 10)
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
    """
    with supervised(tmp_path, script, workers=1, restarts=2) as launcher:
        assert launcher.wait() == 0
        assert re.findall(r"restart (\d) of 2", launcher.out) == ["1", "1", "1", "1"]


def test_the_worker_that_began_it_is_named(tmp_path):
    """Though another one was the first to end, with a fault or with what it was told."""
    script = """
        ready()
        if index == 1:
            wait_for("0-0.pid"); wait_for("0-2.pid")
            time.sleep(0.3)
            print("error: run.data raised KeyError: 3")
            sys.exit(1)
        print("error: worker 1 (127.0.0.1:1) is gone" if index else "error: worker 1 (127.0.0.1:1): run.data raised")
        sys.exit(75 if index else 1)
    """
    with supervised(tmp_path, script, settle=TIMEOUT) as launcher:
        assert launcher.wait() == 1
        assert launcher.err.startswith(
            "error: worker 1 ended with exit code 1: error: run.data raised KeyError: 3; not again: "
        )


def test_a_traceback_may_have_lines_like_the_one_above_it(tmp_path):
    script = """
        if index:
            print("error: an earlier one, of which nothing came")
            print("error: run.data raised RuntimeError: cannot compile")
            print("Traceback (most recent call last):")
            print("RuntimeError: cannot compile")
            print("error: worker 9 has no such file")
            sys.exit(1)
        print("error: worker 1 (127.0.0.1:1): run.data raised RuntimeError: cannot compile")
        sys.exit(1)
    """
    with supervised(tmp_path, script, workers=2) as launcher:
        assert launcher.wait() == 1
        assert launcher.err.startswith(
            "error: worker 1 ended with exit code 1: error: run.data raised RuntimeError: cannot compile; not again: "
        )


def test_a_module_that_is_not_installed(tmp_path):
    with supervised(tmp_path, "ready()\nimport no_such_module.sub") as launcher:
        launcher.wait()
        assert "restart" not in launcher.out
        assert re.fullmatch(
            r"error: worker \d: its Python has no module 'no_such_module': install it there, or name a Python that has "
            r"it \(--python, or the variable PYTHON\); it said: ModuleNotFoundError: .*\n",
            launcher.err,
        )


def test_logs_on_a_full_disk(tmp_path):
    """The run goes on without them, and with them when there is space again."""
    script = """
        ready()
        print("attempt", attempt)
        if attempt < 2:
            wait_for(f"end {attempt}")
            sys.exit(75)
    """
    with small_disk(tmp_path / "disk", "size=1m", "nr_inodes=16") as disk:
        (tmp_path / "logs").symlink_to(disk / "logs")
        (disk / "logs").mkdir()
        with supervised(tmp_path, script, workers=2) as launcher:
            launcher.pids(0, workers=2)
            filled = []
            with contextlib.suppress(OSError):
                for i in range(16):
                    (disk / f"{i}").touch()
                    filled.append(disk / f"{i}")
            (tmp_path / "end 0").touch()
            launcher.pids(1, workers=2)
            for path in filled:
                path.unlink()
            (tmp_path / "end 1").touch()
            assert launcher.wait() == 0
            assert launcher.out.count("this attempt has no logs: cannot write") == 1
            assert "No space left on device" in launcher.out
            for attempt in range(3):
                assert f"[1] attempt {attempt}\n" in launcher.out
            assert log(tmp_path, 1, 1) == b"attempt 0\n" and log(tmp_path, 2, 1) == b"attempt 2\n"


def test_logs_of_an_earlier_launch_stay(tmp_path):
    for launch in (1, 2):
        with supervised(tmp_path, "print(time.monotonic_ns())", workers=1) as launcher:
            assert launcher.wait() == 0
            assert log(tmp_path, launch, 0).decode() == launcher.out[4:]


def test_an_attempt_follows_the_last_that_is_there(tmp_path):
    for name in ("attempt-1", "attempt-3", "attempt-x"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    with supervised(tmp_path, "print('here')", workers=1) as launcher:
        assert launcher.wait() == 0
    assert log(tmp_path, 4, 0) == b"here\n"


def test_backoff_doubles_up_to_a_minute():
    assert [supervisor.backoff(restart) for restart in range(1, 10)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert supervisor.backoff(1000) == 60


@pytest.mark.parametrize("code", [0, 130])
def test_those_that_end_well_are_waited_for(tmp_path, code):
    # The first worker still saves when the others have ended, for longer than is left after a fault.
    script = f"""
        ready()
        if index == 0:
            wait_for("others have ended")
            time.sleep(0.5)
            print("saved")
        sys.exit({code})
    """
    with supervised(tmp_path, script, settle=0.1) as launcher:
        pids = launcher.pids(0)
        assert_gone([pids[1][0], pids[2][0]], TIMEOUT)
        (tmp_path / "others have ended").touch()
        assert launcher.wait() == code
        assert "[0] saved" in launcher.out
        assert "restart" not in launcher.out


def test_one_that_does_not_end_as_others_have(tmp_path):
    script = """
        ready()
        if index == 1:
            wait_for("never")
    """
    with supervised(tmp_path, script, restarts=1, finish=0.5, grace_seconds=0) as launcher:
        assert launcher.wait() == 75
        assert "restart 1 of 1 in 0.05 s: worker 1 does not end, as others have" in launcher.out


# Ends as a run does: on SIGINT and SIGTERM it saves, with the exit code that the signal has.
GENTLE = """
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not ignored, as by its agent
    told = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: told.append(signum))
    ready()
    while not told:
        time.sleep(0.02)
    time.sleep(0.8 if index == 0 else 0.3)
    print("saved on", signal.Signals(told[0]).name)
    sys.exit(130 if told[0] == signal.SIGINT else 75)
"""


@pytest.mark.parametrize(
    ("signum", "forwarded", "code"),
    [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 75), (signal.SIGHUP, "SIGTERM", 75)],
)
def test_signals_are_forwarded(tmp_path, signum, forwarded, code):
    with supervised(tmp_path, GENTLE, settle=0.1) as launcher:
        pids = launcher.pids(0)
        os.kill(launcher.process.pid, signum)
        assert launcher.wait() == code
        for worker in range(3):
            assert f"[{worker}] saved on {forwarded}\n" in launcher.out
        assert "restart" not in launcher.out
        assert launcher.err == ""
        assert_gone([pid for pair in pids for pid in pair], 0)


STUBBORN = """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: print("told", flush=True))
    ready()
    wait_for("never")
"""


def test_second_interrupt_kills(tmp_path):
    with supervised(tmp_path, STUBBORN) as launcher:
        pids = launcher.pids(0)
        os.kill(launcher.process.pid, signal.SIGINT)
        wait_until(lambda: launcher.out.count("] told") == 3)
        assert launcher.process.poll() is None
        os.kill(launcher.process.pid, signal.SIGINT)
        assert launcher.wait() == 130
        assert_gone([pid for pair in pids for pid in pair], 0)


def test_grace_ends(tmp_path):
    with supervised(tmp_path, STUBBORN, grace_seconds=0.5) as launcher:
        pids = launcher.pids(0)
        os.kill(launcher.process.pid, signal.SIGTERM)
        assert launcher.wait() == 75
        assert launcher.out.count("] told") == 3
        assert_gone([pid for pair in pids for pid in pair], 0)


def test_a_run_that_is_done_when_it_is_told_to_stop_is_done(tmp_path):
    script = GENTLE.replace("sys.exit(130 if told[0] == signal.SIGINT else 75)", "sys.exit(0)")
    with supervised(tmp_path, script) as launcher:
        launcher.pids(0)
        os.kill(launcher.process.pid, signal.SIGINT)
        assert launcher.wait() == 0


def test_told_to_end_before_a_restart(tmp_path):
    with supervised(tmp_path, "sys.exit(75)", delay=10 * TIMEOUT) as launcher:
        wait_until(lambda: "restart 1 of 10" in launcher.out)
        os.kill(launcher.process.pid, signal.SIGTERM)
        assert launcher.wait() == 75


@pytest.mark.parametrize("script", [GENTLE, STUBBORN])
def test_killed_launcher_leaves_no_worker(tmp_path, script):
    with supervised(tmp_path, script) as launcher:
        pids = launcher.pids(0)
        launcher.process.kill()
        assert_gone([pid for pair in pids for pid in pair], 5.0)


def test_what_a_worker_has_started_ends_with_it(tmp_path):
    script = """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        (folder / "child.pid").write_text(str(child.pid))
        ready()
    """
    with supervised(tmp_path, script, workers=1) as launcher:
        assert launcher.wait() == 0
        assert_gone([int((tmp_path / "child.pid").read_text())])


def test_much_output_does_not_block(tmp_path):
    script = """
        ready()
        line = b"%d " % index * 50
        for _ in range(50_000):
            os.write(1, line + b"\\n")
        os.write(2, b"x" * 1_000_000)
    """
    with supervised(tmp_path, script) as launcher:
        assert launcher.wait() == 0
        for worker in range(3):
            line = b"%d " % worker * 50
            whole = (line + b"\n") * 50_000 + b"x" * 1_000_000
            assert log(tmp_path, 1, worker) == whole
            assert launcher.out.count(f"[{worker}] {line.decode()}\n") == 50_000
            assert f"[{worker}] {'x' * 1_000_000}\n" in launcher.out


def test_nobody_reads_the_output(tmp_path):
    script = """
        ready()
        wait_for("closed")
        for i in range(20_000):
            print("line", i)
    """
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(folder=str(tmp_path)) + textwrap.dedent(script))
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), str(path), "2", "{}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        process.stdout.close()
        (tmp_path / "closed").touch()
        assert process.wait(TIMEOUT) == 0
        assert log(tmp_path, 1, 1).endswith(b"line 19999\n")
    finally:
        process.kill()
        process.wait()


BAR = """
    from tqdm import tqdm
    ready()
    if index == 0:
        with tqdm(total=5, mininterval=0, unit="step") as bar:
            for i in range(5):
                bar.update()
                if i == 2:
                    bar.write("held-out loss")
                    (folder / "two").touch()
                    wait_for("seen")
    else:
        wait_for("two")
        print("from worker", index)
        (folder / "printed").touch()
"""


def test_progress_bar_is_left_out_of_files(tmp_path):
    (tmp_path / "seen").touch()
    with supervised(tmp_path, BAR, workers=2) as launcher:
        assert launcher.wait() == 0
        lines = [line for line in launcher.out.splitlines() if line.startswith("[0]")]
        assert lines[0] == "[0] held-out loss"
        assert len(lines) == 2 and lines[1].startswith("[0] 100%|"), lines
        assert "\r" not in launcher.out
        assert launcher.err == ""
        for step in range(6):
            assert f" {step}/5 " in log(tmp_path, 1, 0).decode()


def test_progress_bar_on_a_terminal(tmp_path):
    terminal, stderr = pty.openpty()
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # how Linux says that nobody has it open
            while chunk := os.read(terminal, 1 << 16):
                seen.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with supervised(tmp_path, BAR, workers=2, stderr=stderr) as launcher:
            wait_until(lambda: (tmp_path / "printed").exists() and "[1] from worker 1" in launcher.out)
            wait_until(lambda: b" 3/5 " in seen.rpartition(b"\x1b[K")[2])  # drawn again after the line
            (tmp_path / "seen").touch()
            assert launcher.wait() == 0
            assert "[0] held-out loss\n" in launcher.out
            assert "[0] 100%|" in launcher.out
    finally:
        os.close(stderr)
        reader.join(TIMEOUT)
        os.close(terminal)
    assert b"[0]" not in seen and b"\n" not in seen
    # Each bar but the first is drawn where the one before was erased, and the last is erased, too.
    bars = bytes(seen).split(b"\r\x1b[K")
    assert bars[-1] == b"" and len(bars) >= 3
    assert all(len(bar.decode()) < 80 for bar in bars)


def test_what_cannot_be_started(tmp_path):
    python = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    good, bad = (supervisor.Command("worker", argv, {}) for argv in (python, ["/no/such/ssh"]))
    options = {"restarts": 0, "grace_seconds": 1, "console": output.Console()}
    before = threading.active_count()
    with pytest.raises(UserError, match=r"cannot start '/no/such/ssh': No such file"):
        supervisor.supervise(lambda attempt: [good, bad], logs=tmp_path / "logs", **options)
    assert threading.active_count() == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/logs"):
        supervisor.supervise(lambda attempt: [good], logs=tmp_path / "file" / "logs", **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
