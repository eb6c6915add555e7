"""Bytes that leave a network interface: predicted, and as the system counts them."""

import dataclasses
import fcntl
import socket
import statistics
import struct
import time
from pathlib import Path
from typing import Any

from dist_partial.selection.payload import nic_bytes
from dist_partial.selection.plan import Plan


@dataclasses.dataclass
class Meter:
    """Counts what one worker's replica has sent since this process began to train.

    Attributes:
        workers: how many there are.
        interface: the counter of this worker's network interface, from `interface`, or None.
        first: the step before the first that is metered.
        planned: bytes by the plans of these steps.
        expected: bytes at the interface for them, without headers.
        full: bytes if everything were trained and sent in its own dtype.
        counted: bytes by the collectives of the graphs that ran.
        metrics: bytes of losses and norms that were summed over the workers, besides.
        read: bytes that the interface has sent meanwhile.
        step_ms: time of the steps of each call, in milliseconds; the first call, which is still warming up, left out.
    """

    workers: int
    interface: Path | None
    first: int
    planned: int = 0
    expected: float = 0.0
    full: int = 0
    counted: int = 0
    metrics: int = 0
    read: int = 0
    step_ms: list[float] = dataclasses.field(default_factory=list)
    _start: tuple[float, int] | None = None
    _calls: int = 0

    def start(self) -> None:
        """Begins a call of the step."""
        self._start = time.perf_counter(), sent(self.interface) if self.interface else 0

    def stop(self, plan: Plan, first: int, last: int, counted: int, metrics: int) -> None:
        """Ends it, once all workers have what they were sent.

        Args:
            plan: what each of its steps should send.
            first: steps before the call.
            last: steps after it.
            counted: bytes by its graphs.
            metrics: bytes of losses and norms besides.
        """
        steps = last - first
        for payload in plan.payloads:
            self.planned += payload.times(first, last) * payload.bytes
            self.expected += payload.times(first, last) * float(nic_bytes(payload.kind, payload.bytes, self.workers))
        self.full += plan.full_wire_bytes * steps
        assert self._start is not None
        began, before = self._start
        if self._calls:
            self.step_ms.append((time.perf_counter() - began) * 1e3 / steps)
        self._calls += 1
        self.read += sent(self.interface) - before if self.interface else 0
        self.counted += counted
        self.metrics += metrics if self.workers > 1 else 0

    def to_json(self, step: int) -> dict[str, Any]:
        """The content of traffic.json after `step`; `nic` is the network interface."""
        return {
            "first_step": self.first + 1,
            "last_step": step,
            "workers": self.workers,
            "planned_bytes": self.planned,
            "counted_bytes": self.counted,
            "metrics_bytes": self.metrics,
            "full_bytes": self.full,
            "expected_nic_bytes": round(self.expected + nic_bytes("sum", self.metrics, self.workers)),
            "nic_bytes": self.read if self.interface else None,
            "nic": self.interface.parts[-3] if self.interface else None,
            "step_ms": round(statistics.median(self.step_ms), 3) if self.step_ms else None,
        }


def interface(address: str) -> Path | None:
    """The counter of bytes sent by the network interface that has an address.

    Args:
        address: a host name or IPv4 address of this machine.

    Returns:
        The file that Linux keeps, or None: on another system, or for the loopback device, through which the peers'
        bytes go, too.
    """
    try:
        wanted = socket.gethostbyname(address)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                try:
                    found = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                except OSError:  # it has no address
                    continue
                path = Path("/sys/class/net", name, "statistics/tx_bytes")
                if socket.inet_ntoa(found[20:24]) == wanted and name != "lo" and path.is_file():
                    return path
    except OSError:
        pass
    return None


def sent(counter: Path) -> int:
    """Reads how many bytes an interface has sent since it was set up."""
    return int(counter.read_text())
