"""Starts the processes of a MultiWorker test on loopback, and ends them whatever happens."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_workers(
    command: Sequence[str],
    workers: int,
    timeout: float,
    pythonpath: Path = ROOT,
    meanwhile: Callable[[list[subprocess.Popen]], None] = lambda processes: None,
) -> list[tuple[int, str]]:
    """Runs `python command` once a worker, each with its TF_CONFIG.

    Returns:
        Exit code and output of each; a worker that has not ended in `timeout` seconds is killed (one that waits for
        a peer ignores SIGTERM) and has exit code -9.
    """
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    processes = []
    for index in range(workers):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {
            **os.environ,
            "TF_CONFIG": json.dumps(task),
            "PYTHONPATH": f"{pythonpath}{os.pathsep}{ROOT}",
            "CUDA_VISIBLE_DEVICES": "-1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    results = []
    try:
        meanwhile(processes)
        for process in processes:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
            results.append((process.returncode, output))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return results
