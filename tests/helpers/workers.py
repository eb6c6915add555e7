"""Starts the processes of a MultiWorker test on loopback, and ends them whatever happens."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests import ROOT


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def loopback(count: int) -> list[str]:
    """Free addresses on loopback."""
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


def run_workers(
    command: Sequence[str],
    workers: int,
    timeout: float,
    pythonpath: Path = ROOT,
    meanwhile: Callable[[list[subprocess.Popen]], None] = lambda processes: None,
    addresses: Sequence[str] = (),
    arguments: Mapping[int, Sequence[str]] = {},
    environments: Mapping[int, Mapping[str, str]] = {},
) -> list[tuple[int, str]]:
    """Runs `python command` once a worker, each with its TF_CONFIG.

    Args:
        command: what follows `python`.
        workers: how many.
        timeout: seconds for all together, once `meanwhile` has returned.
        pythonpath: a folder of modules before those of the project.
        meanwhile: called with the processes while they run.
        addresses: of all workers; free ports of 127.0.0.1 by default. With more than `workers` the last do not start.
        arguments: more of them, by worker.
        environments: variables to be set over all others, by worker.

    Returns:
        Exit code and output of each; a worker that has not ended in time is killed (one that waits for a peer may
        handle no SIGTERM) and has exit code -9.
    """
    addresses = list(addresses) or loopback(workers)
    processes, outputs = [], []
    try:
        for index in range(workers):
            # A file and no pipe: a worker whose pipe is full would wait, and all others for it.
            outputs.append(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115 - closed below
            environment = {
                "DIST_PARTIAL_SECRET": "of the tests",
                **os.environ,
                "TF_CONFIG": tf_config(addresses, index),
                "PYTHONPATH": f"{pythonpath}{os.pathsep}{ROOT}",
                "CUDA_VISIBLE_DEVICES": "-1",
                "PYTHONFAULTHANDLER": "1",  # a process that a signal ends says where
                **environments.get(index, {}),
            }
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command, *arguments.get(index, ())],
                    cwd=ROOT,
                    env=environment,
                    stdout=outputs[-1],
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        meanwhile(processes)
        deadline = time.monotonic() + timeout
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        results = []
        for process, output in zip(processes, outputs, strict=False):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            with output:
                output.seek(0)
                results.append((process.returncode, output.read()))
    return results


def assert_all_end(results: Sequence[tuple[int, str]]) -> None:
    """Asserts that all workers have ended with 0, or shows what each has printed: the first is seldom the cause."""
    outputs = [f"worker {rank} exits with {code}:\n{output[-3000:]}" for rank, (code, output) in enumerate(results)]
    assert not any(code for code, _ in results), "\n".join(outputs)


def tf_config(workers: Sequence[str], index: int) -> str:
    """What the variable TF_CONFIG of a worker holds."""
    return json.dumps({"cluster": {"worker": list(workers)}, "task": {"type": "worker", "index": index}})


LISTENS, CONNECTED = "0A", "01"  # of Linux's net/tcp_states.h


def sockets(pid: int, state: str = LISTENS) -> list[str]:
    """The TCP addresses, 'host:port', at which a process listens; '[::]' and '0.0.0.0' are all of the host's.

    Only on Linux; of a process that has ended there are none. With CONNECTED those of its ends of connections, also of
    a process in another network namespace.
    """
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        descriptors = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                local, now, inode = (line.split()[column] for column in (1, 3, 9))
                if now == state and f"socket:[{inode}]" in descriptors:
                    host, _, port = local.partition(":")
                    # The address is written in words of four bytes, each of which is in the machine's order.
                    words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]
                    text = socket.inet_ntop(family, b"".join(word.to_bytes(4, sys.byteorder) for word in words))
                    found.append(f"{text if family == socket.AF_INET else f'[{text}]'}:{int(port, 16)}")
    return found


@contextlib.contextmanager
def small_disk(folder: Path, *options: str) -> Iterator[Path]:
    """A file system of its own, that can be full."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
