"""The processes that a launcher starts: an agent for each worker, what both print, and how they end."""

import contextlib
import dataclasses
import json
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from dist_partial.errors import UserError
from dist_partial.launch.agent import kill_group
from dist_partial.launch.output import Console, Output

KILL_SECONDS = 2.0  # in which an agent kills its worker


@dataclasses.dataclass(frozen=True)
class Command:
    """Describes how to start a worker.

    Attributes:
        name: what messages call it, such as 'worker 1 (10.0.0.2)'.
        argv: runs an agent, here or on another host.
        order: the line that the agent reads first, see `agent.run_agent`.
        address: 'host:port' of the worker.
        spare: whether it waits to come in place of a lost one; these are the last.
        python: what messages call the Python that runs both.
    """

    name: str
    argv: Sequence[str]
    order: dict[str, Any]
    python: str = "its Python"
    address: str = ""
    spare: bool = False


@dataclasses.dataclass(eq=False)
class Worker:
    """Holds a worker that was started; `process` is its agent's; see `start`."""

    name: str
    place: int
    index: int
    command: Command
    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    output: Output
    readers: Sequence[threading.Thread]


def start(place: int, index: int, command: Command, folder: Path | None, console: Console, number: int = 0) -> Worker:
    """Starts a worker's agent, and has it start the worker.

    Args:
        place: the number of the command among all.
        index: names the worker before its lines, and its log.
        command: how.
        folder: for its log, or None.
        console: shows what it prints.
        number: how many there were with this index before.

    Raises:
        UserError: the command cannot be started.
    """
    pipe = subprocess.PIPE
    try:
        # A session of its own: what Ctrl-C sends to all processes of a terminal must reach the launcher alone.
        process = subprocess.Popen(command.argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise UserError(f"cannot start {command.argv[0]!r}: {error.strerror}") from None
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    output = Output(index, folder, console, number)
    readers = [
        threading.Thread(target=output.read, args=(process.stdout,), daemon=True),
        threading.Thread(target=output.listen, args=(process.stderr,), daemon=True),
    ]
    for reader in readers:
        reader.start()
    worker = Worker(command.name, place, index, command, process, process.stdin, output, readers)
    tell(worker, json.dumps(command.order))
    return worker


def tell(worker: Worker, line: str) -> None:
    """Sends a line to a worker's agent."""
    with contextlib.suppress(OSError):  # the agent has ended
        worker.stdin.write(line.encode() + b"\n")
        worker.stdin.flush()


def stop(workers: Sequence[Worker]) -> None:
    """Kills what still runs, and waits for all that was printed."""
    for worker in workers:
        with contextlib.suppress(OSError):  # of what could not be written
            worker.stdin.close()
    until = time.monotonic() + KILL_SECONDS
    for worker in workers:
        try:
            worker.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            kill_group(worker.process.pid)
            worker.process.wait()
    for worker in workers:
        for reader in worker.readers:
            reader.join(KILL_SECONDS)  # a process that a worker has left may hold the pipe open
        worker.output.close()
