"""Runs one worker on its host, for a launcher that may be elsewhere.

An agent reads from its stdin one line of JSON that says what to start, then signals to forward, and messages to the
worker (`distributed.membership`); when stdin ends, with the launcher or with the connection to it, it kills the worker.
What the worker prints goes to stdout; on stderr the agent reports what the run folder shows, which the launcher's own
machine need not see, and passes on the worker's messages.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from dist_partial.distributed.cluster import CONTROL, unresolved
from dist_partial.launch.restarts import Progress, look, progress

_REPORT = b"dist_partial agent: "  # begins an agent's report, a line of JSON


def run_agent() -> int:
    """Runs one worker; this is all that an agent does.

    The first line of stdin is `{"run_dir", "names": [], "arguments": [], "environment": {}, "module", "program": []}`:
    the run folder, to be reported on; hosts, which must be known here; arguments of the module, by default
    dist_partial.train, or of a program in its place; and variables to be set besides the agent's own. They are on no
    command line, where all users of the host could read them. Each further line is the name of a signal, such as 'INT'.

    Returns:
        The worker's exit code; 128 + n if signal n has ended it; 2 if a host is not known.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: None)  # SIG_IGN would be inherited by the worker
    # Python would not end while a thread waits in a buffered read.
    orders = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    order = json.loads(orders.readline())
    folder = Path(order["run_dir"])
    before = look(folder)
    _report(Progress(before.checkpoint))
    for name in order["names"]:
        if reason := unresolved(name):
            print(f"error: no host {name!r} is known here: {reason}; fix --hosts or /etc/hosts", flush=True)
            return 2
    ours, control = socket.socketpair()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    module = order.get("module", "dist_partial.train")
    worker = subprocess.Popen(
        [*(order.get("program") or [sys.executable, "-u", "-m", module]), *order["arguments"]],
        env={**os.environ, **order["environment"], **({} if "module" in order else {CONTROL: str(control.fileno())})},
        pass_fds=[control.fileno()],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,  # one pipe keeps the order of what is printed, over ssh too
        process_group=0,
        preexec_fn=lambda: prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG: it dies with an agent that is killed
    )
    control.close()
    threading.Thread(target=_obey, args=(worker, orders, ours), daemon=True).start()
    threading.Thread(target=_pass_on, args=(ours,), daemon=True).start()
    code = worker.wait()
    kill_group(worker.pid)  # what the worker has started and left
    _report(progress(before, look(folder)))
    return exit_code(code)


def _report(progress: Progress) -> None:
    _write(json.dumps(progress).encode() + b"\n")


def _write(line: bytes) -> None:
    with contextlib.suppress(OSError):  # the launcher is gone
        os.write(2, _REPORT + line)


def read_report(line: bytes) -> Progress | dict[str, Any] | None:
    """Reads what an agent has reported, or a message of its worker; None of a line that is neither.

    Examples:
        >>> read_report(b"dist_partial agent: [20, 25]")
        Progress(checkpoint=20, step=25)
        >>> read_report(b'dist_partial agent: {"stays": true}')
        {'stays': True}
    """
    if not line.startswith(_REPORT):
        return None
    found = json.loads(line.removeprefix(_REPORT))
    return found if isinstance(found, dict) else Progress(*found)


def _obey(worker: subprocess.Popen[bytes], orders: IO[bytes], control: socket.socket) -> None:
    for line in orders:
        if line.startswith(b"{"):
            with contextlib.suppress(OSError):  # the worker has ended
                control.sendall(line)
        else:
            worker.send_signal(signal.Signals[f"SIG{line.decode().strip()}"])
    kill_group(worker.pid)


def _pass_on(control: socket.socket) -> None:
    with contextlib.suppress(OSError), control.makefile("rb") as lines:
        for line in lines:
            _write(line)


def kill_group(group: int) -> None:
    """Kills all processes of a group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
        os.killpg(group, signal.SIGKILL)


def exit_code(code: int) -> int:
    """Computes a shell's exit code of a process's return code: 128 + n if signal n has ended it.

    Examples:
        >>> [exit_code(code) for code in (0, 2, -9)]
        [0, 2, 137]
    """
    return 128 - code if code < 0 else code
