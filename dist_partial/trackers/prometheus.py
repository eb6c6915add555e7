"""Prometheus (the extra `prometheus`)."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from dist_partial.trackers.base import Row, Tracker, needed
from dist_partial.validation import AtLeast, AtMost, check


@dataclasses.dataclass
class Prometheus(Tracker):
    """Serves the newest numbers to Prometheus, as gauges such as `dist_partial_train_loss`, until the run ends.

    Args:
        port: on which `/metrics` is served; 0 is any that is free.
        address: of the interface. Whoever reaches it can read: others than this machine do only where it is changed.

    Raises:
        UserError: prometheus_client is not installed.

    Examples:
        >>> Prometheus(port=9401).address
        '127.0.0.1'
    """

    port: Annotated[int, AtLeast(0), AtMost(65535)] = 9400
    address: str = "127.0.0.1"

    def __post_init__(self) -> None:
        check(self, "Prometheus")
        needed("prometheus_client", "Prometheus")
        self._gauges: dict[str, Any] = {}

    def begin(self, folder: Path, known: str) -> str:
        import prometheus_client

        self._registry = prometheus_client.CollectorRegistry()
        self._server, self._thread = prometheus_client.start_http_server(self.port, self.address, self._registry)
        return ""

    @property
    def served(self) -> int:
        """The port on which it serves."""
        return self._server.server_port

    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name, value in {"step": row.step, **row.numbers}.items():
                self._gauge(re.sub(r"\W", "_", f"dist_partial_{name}")).set(value)

    def end(self, outcome: str) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _gauge(self, name: str) -> Any:
        import prometheus_client

        if name not in self._gauges:
            self._gauges[name] = prometheus_client.Gauge(name, name, registry=self._registry)
        return self._gauges[name]
