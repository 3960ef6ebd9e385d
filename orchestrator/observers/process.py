"""What watches every run of a process, as its flags ask and its environment: logs to traces."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from orchestrator.observers.base import Observer
from orchestrator.observers.logs import EventLog, LogFormat
from orchestrator.observers.prometheus import Metrics
from orchestrator.observers.traces import traces_from_environment


@dataclass(frozen=True, slots=True)
class Watch:
    """How a process is watched; by default not at all.

    Attributes:
        log_format: ``text`` or ``json``; None for no event log, unless there is a ``log_file``.
        log_file: where events are logged, in place of stderr.
        metrics_port: where Prometheus metrics are served.
        metrics_file: where they are written as a textfile.
    """

    log_format: LogFormat | None = None
    log_file: Path | None = None
    metrics_port: int | None = None
    metrics_file: Path | None = None

    def observers(self) -> list[Observer]:
        """Return the observers; closing them gives back the port and the log.

        Raises:
            OSError: if the log cannot be written.
            MetricsUnavailable: if prometheus-client is not installed.
            BadMetricsPort: if the port is taken.
        """
        found: list[Observer] = []
        if self.metrics_port is not None or self.metrics_file is not None:
            address = os.environ.get("WEFT_METRICS_ADDRESS", "127.0.0.1")
            found.append(Metrics(self.metrics_port, address, self.metrics_file))
        if self.log_format is not None or self.log_file is not None:
            found.append(EventLog(self.log_format or "text", self.log_file))
        traces = traces_from_environment()
        return found if traces is None else [*found, traces]
