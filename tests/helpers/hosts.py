"""Hosts on one machine: network namespaces on a bridge, each of which can send only so fast."""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import ROOT

PREFIX = "h"  # of the namespaces' names
BRIDGE = "br9"
PORT = 2222


def available() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if missing:
        return f"{' and '.join(missing)} of iproute2 not found"
    name = f"{PREFIX}probe{os.getpid()}"  # tests run side by side
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    _run("ip", "netns", "del", name)
    return None


def name(host: int) -> str:
    """Its namespace."""
    return f"{PREFIX}{host}"


def address(host: int) -> str:
    return f"10.77.0.{host}"


@contextlib.contextmanager
def hosts(
    count: int, rate: str | None = None, hub: bool = False, burst: str = "256kb", latency: str = "200ms"
) -> Iterator[None]:
    """Makes hosts 1 to `count`, each with one network interface, and removes them at the end.

    Args:
        count: how many.
        rate: what each can send, as tc writes it ('200mbit', '1gbit'), or None for no limit.
        hub: whether each sees what all others send.
        burst: what may pass at once, as tc writes it.
        latency: how long what waits in the queue may wait before it is dropped.
    """
    with open(Path(tempfile.gettempdir(), "dist_partial_hosts.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # there is one set of hosts, and tests run side by side
        for namespace in _made():
            if processes := _processes(namespace):
                raise RuntimeError(f"host {namespace} is in use by the processes {processes}, which had no lock")
        _remove()  # what an earlier run has left
        with _made_hosts(count, rate, hub, burst, latency):
            yield


@contextlib.contextmanager
def _made_hosts(count: int, rate: str | None, hub: bool, burst: str, latency: str) -> Iterator[None]:
    try:
        _run("ip", "link", "add", BRIDGE, "type", "bridge", *(["ageing_time", "0"] if hub else []))
        _run("ip", "link", "set", BRIDGE, "up")
        for host in range(1, count + 1):
            _run("ip", "netns", "add", name(host))
            _run("ip", "link", "add", _port(host), "type", "veth", "peer", "name", "e0", "netns", name(host))
            _run("ip", "link", "set", _port(host), "master", BRIDGE, "up")
            _run("ip", "-n", name(host), "addr", "add", f"{address(host)}/24", "dev", "e0")
            for device in ("e0", "lo"):
                _run("ip", "-n", name(host), "link", "set", device, "up")
            if rate:
                limit = ["tbf", "rate", rate, "burst", burst, "latency", latency]
                _run("ip", "netns", "exec", name(host), "tc", "qdisc", "add", "dev", "e0", "root", *limit)
        yield
    finally:
        _remove()


def sent_bytes(host: int) -> int:
    """What has left the host's interface so far, with all headers."""
    path = "/sys/class/net/e0/statistics/tx_bytes"
    return int(_run("ip", "netns", "exec", name(host), "cat", path))


def run(
    command: Sequence[str], count: int, timeout: float, environment: Mapping[str, str] | None = None
) -> list[tuple[int, str]]:
    """Runs a command on hosts 1 to `count` at once, each with its TF_CONFIG.

    Args:
        command: program and arguments.
        count: how many hosts.
        timeout: seconds for all together, after which those still running are killed.
        environment: variables to be set besides.

    Returns:
        Exit code and output of each; -9 is the code of one that was killed.
    """
    workers = [f"{address(host)}:{PORT}" for host in range(1, count + 1)]
    secret = secrets.token_hex(16)
    processes, outputs = [], []
    deadline = time.monotonic() + timeout
    try:
        for index in range(count):
            task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
            variables = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", "DIST_PARTIAL_SECRET": secret}
            variables |= environment or {}
            # A file and no pipe: a worker whose pipe is full would wait, and all others for it.
            outputs.append(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115 - closed below
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name(index + 1), *command],
                    cwd=ROOT,
                    env={**os.environ, **variables, "TF_CONFIG": json.dumps(task)},
                    stdout=outputs[-1],
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        results = []
        for process, output in zip(processes, outputs, strict=False):
            with contextlib.suppress(ProcessLookupError):  # the whole group has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with output:
                output.seek(0)
                results.append((process.returncode, output.read()))
    return results


def trained(
    config: Path, count: int, rate: str | None = None, meanwhile: contextlib.AbstractContextManager[Any] | None = None
) -> dict[str, Any]:
    """Trains on so many hosts, and gives the content of traffic.json.

    Args:
        config: a gin file.
        count: how many hosts.
        rate: as for `hosts`.
        meanwhile: entered once there are hosts, left after the run.
    """
    with tempfile.TemporaryDirectory() as folder, hosts(count, rate), meanwhile or contextlib.nullcontext():
        command = [sys.executable, "-m", "dist_partial.train", f"--gin_file={config}", f"--run_dir={folder}/run"]
        for code, output in run(command, count, timeout=560, environment={"TF_CPP_MIN_LOG_LEVEL": "3"}):
            if code:
                raise RuntimeError(output[-2000:])
        return json.loads(Path(folder, "run", "traffic.json").read_text())


def processes(host: int) -> list[int]:
    """Those that run on it."""
    return _processes(name(host))


def _port(host: int) -> str:
    """The bridge's end of its cable."""
    return f"v{PREFIX}{host}"


def _made() -> list[str]:
    """The namespaces of hosts that there are."""
    names = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]
    return [each for each in names if re.fullmatch(rf"{PREFIX}\d+", each)]


def _processes(namespace: str) -> list[int]:
    return [int(process) for process in _run("ip", "netns", "pids", namespace).split()]


def _remove() -> None:
    for namespace in _made():
        for process in _processes(namespace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        # Deleting one end of a cable deletes the other; the namespace alone would go later, in the background.
        subprocess.run(["ip", "-n", namespace, "link", "del", "e0"], capture_output=True)
        _run("ip", "netns", "del", namespace)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
