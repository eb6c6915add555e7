"""Launchers as processes, and what must be gone when they have ended."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import ROOT

TIMEOUT = 60  # seconds for whatever a test waits for, on a machine that does much else


def handle_signals() -> None:
    """As a terminal would have it, also where the tests run under nohup or in the background."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


class Launched:
    """A launcher that runs; what it prints goes to files, which never block it."""

    def __init__(self, folder: Path, command: list[str], stderr: int | None = None) -> None:
        self.folder = folder
        self._out, self._err = folder / "stdout", folder / "stderr"
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=err if stderr is None else stderr,
                start_new_session=True,
                preexec_fn=handle_signals,
            )

    @property
    def out(self) -> str:
        return self._out.read_bytes().decode()

    @property
    def err(self) -> str:
        return self._err.read_bytes().decode()

    def wait(self) -> int:
        return self.process.wait(TIMEOUT)

    def pids(self, attempt: int, workers: int = 3) -> list[tuple[int, int]]:
        """Each worker's pid and its agent's, once all are ready."""
        paths = [self.folder / f"{attempt}-{index}.pid" for index in range(workers)]
        wait_until(lambda: all(path.exists() for path in paths) or self.process.poll() is not None)
        found = [tuple(map(int, path.read_text().split())) for path in paths]
        return [(worker, agent) for worker, agent in found]

    def all_pids(self) -> list[int]:
        return [int(pid) for path in self.folder.glob("*.pid") for pid in path.read_text().split()]


@contextlib.contextmanager
def launched(folder: Path, command: list[str], stderr: int | None = None) -> Iterator[Launched]:
    """Runs a launcher; however the test ends, it is killed, and nothing of it may be left."""
    launcher = Launched(folder, command, stderr)
    try:
        yield launcher
    finally:
        launcher.process.kill()
        launcher.process.wait()
        assert_gone(launcher.all_pids())


def wait_until(condition: Callable[[], bool], seconds: float = TIMEOUT, pause: float = 0.02) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(pause)


def alive(pid: int) -> bool:
    try:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    except FileNotFoundError:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2] if Path(f"/proc/{pid}").exists() else ""
    return bool(state.strip()) and not state.strip().startswith("Z")


def assert_gone(pids: list[int], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < until, f"left: {left}"
        time.sleep(0.05)
