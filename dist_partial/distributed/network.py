"""Bytes that leave a network interface: predicted, and as the system counts them."""

import dataclasses
import ipaddress
import socket
import statistics
import time
from typing import Any

import psutil

from dist_partial.selection.payload import exact_number, nic_bytes
from dist_partial.selection.plan import Plan


@dataclasses.dataclass
class Meter:
    """Counts what one worker's replica has sent since this process began to train.

    Attributes:
        workers: how many there are.
        interface: this worker's network interface, from `interface`, or None.
        first: the step before the first that is metered.
        planned: bytes by the plans of these steps.
        expected: bytes at the interface for them, without headers.
        full: bytes if everything were trained and sent in its own dtype.
        counted: bytes by the collectives of the graphs that ran.
        metrics: bytes of losses and norms that were summed over the workers, besides.
        copied: bytes of what the worker alone has, sent to the next one, besides.
        read: bytes that the interface has sent meanwhile.
        step_ms: time of the steps of each call, in milliseconds; the first call, which is still warming up, left out.
        seconds: of all these calls together, and steps that they made.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([10]), keras.layers.Dense(10, use_bias=False)])
        >>> meter = Meter(workers=2, interface=None, first=0)
        >>> meter.start()
        >>> meter.stop(resolve([("train", ".*")], model, AllReduce()), first=0, last=3, counted=1200, metrics=24)
        >>> meter.to_json(3)["planned_bytes"], meter.to_json(3)["expected_nic_bytes"]
        (1200, 1224)
    """

    workers: int
    interface: str | None
    first: int
    planned: int = 0
    expected: float = 0.0
    full: int = 0
    counted: int = 0
    metrics: int = 0
    copied: int = 0
    read: int = 0
    step_ms: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    _start: tuple[float, int] | None = None
    _calls: int = 0

    def start(self) -> None:
        """Begins a call of the step."""
        self._start = time.perf_counter(), sent(self.interface) if self.interface else 0

    def stop(self, plan: Plan, first: int, last: int, counted: int, metrics: int, copied: int = 0) -> None:
        """Ends it, once all workers have what they were sent.

        Args:
            plan: what each of its steps should send.
            first: steps before the call.
            last: steps after it.
            counted: bytes by its graphs.
            metrics: bytes of losses and norms besides.
            copied: bytes of what this worker alone has, to the next one.
        """
        steps = last - first
        for payload in plan.payloads:
            self.planned += payload.times(first, last) * payload.bytes
            self.expected += payload.times(first, last) * float(nic_bytes(payload.kind, payload.bytes, self.workers))
        self.full += round(plan.full_wire_bytes * steps)
        assert self._start is not None
        began, before = self._start
        if self._calls:
            took = time.perf_counter() - began
            self.step_ms.append(took * 1e3 / steps)
            self.seconds, self.steps = self.seconds + took, self.steps + steps
        self._calls += 1
        self.read += sent(self.interface) - before if self.interface else 0
        self.counted += counted
        self.metrics += metrics if self.workers > 1 else 0
        self.copied += copied

    def to_json(self, step: int) -> dict[str, Any]:
        """The content of traffic.json after `step`; `nic` is the network interface."""
        return {
            "first_step": self.first + 1,
            "last_step": step,
            "workers": self.workers,
            "planned_bytes": exact_number(self.planned),
            "counted_bytes": self.counted,
            "metrics_bytes": self.metrics,
            "copied_bytes": self.copied,
            "full_bytes": self.full,
            "expected_nic_bytes": round(self.expected + self.copied + nic_bytes("sum", self.metrics, self.workers)),
            "nic_bytes": self.read if self.interface else None,
            "nic": self.interface,
            "step_ms": round(statistics.median(self.step_ms), 3) if self.step_ms else None,
            "mean_step_ms": round(self.seconds * 1e3 / self.steps, 3) if self.steps else None,
        }


def interface(address: str) -> str | None:
    """Finds the name of the network interface that has an address.

    Args:
        address: a host name or an IP address of this machine.

    Returns:
        The name, or None: no interface has it, or it is the loopback device's, through which the peers' bytes go, too.

    Examples:
        >>> interface("127.0.0.1") is None  # the loopback device
        True
    """
    try:
        wanted = {str(info[4][0]) for info in socket.getaddrinfo(address, None)}
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        own = {each.address.partition("%")[0] for each in addresses if each.family in (socket.AF_INET, socket.AF_INET6)}
        if any(not ipaddress.ip_address(each).is_loopback for each in own & wanted):
            return name
    return None


def sent(interface: str) -> int:
    """Reads how many bytes an interface has sent since it was set up."""
    # In the network namespace of this process; /sys shows that in which it was mounted.
    return psutil.net_io_counters(pernic=True, nowrap=False)[interface].bytes_sent
