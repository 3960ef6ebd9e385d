"""Prometheus metrics of the runs of this process, over HTTP or as a textfile for batch jobs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.observers.phases import PHASES, Phases

_LOG = logging.getLogger(__name__)
_MOST_POPULATIONS = 100
_OTHERS = "(others)"
_OUTCOMES = ("accepted", "refused", "late")
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
_WRITTEN = frozenset({"committed", "evaluated", "completed", "failed", "paused", "cancelled"})


class MetricsUnavailable(ImportError):
    """The package that metrics need is not installed."""


class BadMetricsPort(ValueError):
    """Metrics cannot be served where they were asked for."""


class Metrics:
    """Counts what a run does; every series begins at 0 with the process.

    Args:
        port: where to serve them over HTTP, 0 for any free port, or None not to.
        address: of which network interface.
        file: where to write them after each round, or None not to.

    Attributes:
        port: where they are served, or None.

    Raises:
        MetricsUnavailable: if prometheus-client is not installed.
        BadMetricsPort: if the port is taken or no port.
        OSError: if the file cannot be written.
    """

    def __init__(
        self, port: int | None = None, address: str = "127.0.0.1", file: Path | None = None
    ) -> None:
        try:
            import prometheus_client as client
        except ImportError:
            raise MetricsUnavailable(
                "metrics need the package prometheus-client, which is not installed; "
                "pip install 'weft[metrics]'"
            ) from None
        self.registry = client.CollectorRegistry()
        self._client, self._file = client, file
        self._phases, self._capped = Phases(), False

        def made(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(name, text, labels, registry=self.registry, **options)

        counter, gauge = client.Counter, client.Gauge
        self._rounds = made(counter, "weft_rounds", "Rounds committed.")
        self._clients = made(counter, "weft_clients", "Answers of clients.", "outcome")
        self._bytes = made(counter, "weft_bytes", "Bytes of broadcasts and updates.", "direction")
        self._seconds = made(
            client.Histogram,
            "weft_phase_seconds",
            "Seconds that a phase of a round took.",
            "phase",
            buckets=_SECONDS,
        )
        self._epsilon = made(
            gauge, "weft_epsilon", "What the run has spent of a population's ε.", "population"
        )
        self._round = made(gauge, "weft_round", "The last committed round of the run.")
        for outcome in _OUTCOMES:
            self._clients.labels(outcome)
        for direction in ("sent", "received"):
            self._bytes.labels(direction)
        for phase in PHASES:
            self._seconds.labels(phase)
        self._write()  # a folder that is not there is missed at once
        self._server: Any = None
        self.port: int | None = None
        if port is not None:
            self._serve(port, address)

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Count the event."""
        for phase in self._phases.after(kind, data):
            self._seconds.labels(phase.name).observe(phase.seconds)
        if kind == "run":
            self._round.set(data.get("done", 0))
            self._epsilon.clear()
            self._spent(data)
        elif kind == "assigned":
            self._bytes.labels("sent").inc(data.get("bytes", 0))
        elif kind in _OUTCOMES:
            self._clients.labels(kind).inc()
            self._bytes.labels("received").inc(data.get("bytes", 0))
        elif kind == "committed":
            self._rounds.inc()
            self._round.set(data["round"])
            self._spent(data)
        if kind in _WRITTEN:
            self._write()

    def close(self) -> None:
        """Write the file once more and stop serving."""
        self._write()
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()

    def _write(self) -> None:
        if self._file is not None:
            self._client.write_to_textfile(str(self._file), self.registry)

    def _serve(self, port: int, address: str) -> None:
        try:
            self._server = self._client.start_http_server(port, address, self.registry)
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None)  # a host that is not known has none of its own
            why = os.strerror(number) if number and number > 0 else str(error)
            raise BadMetricsPort(
                f"metrics cannot be served on {address}, port {port} ({why}); choose another "
                "port (0 is any free one) or $WEFT_METRICS_ADDRESS"
            ) from None
        self.port = self._server[0].server_port

    def _spent(self, data: Mapping[str, Any]) -> None:
        """Set ε by population; beyond a hundred populations, the largest of the rest as one."""
        spent = data["spent"]() if "spent" in data else {}
        names = sorted(spent)
        for name in names[:_MOST_POPULATIONS]:
            self._epsilon.labels(name).set(spent[name].epsilon)
        rest = names[_MOST_POPULATIONS:]
        if not rest:
            return
        self._epsilon.labels(_OTHERS).set(max(spent[name].epsilon for name in rest))
        if not self._capped:
            self._capped = True
            _LOG.warning(
                "weft_epsilon shows %d of %d populations by name, and the largest ε of the others "
                "as population %r; the ledger has them all: weft clients show",
                _MOST_POPULATIONS,
                len(names),
                _OTHERS,
            )
