"""OpenTelemetry traces: a run's span holds its rounds', a round's those of phases and clients."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from orchestrator.observers.phases import Phases

_LOG = logging.getLogger(__name__)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_ENDS = frozenset({"completed", "failed", "paused", "cancelled"})
_OUTCOMES = frozenset({"accepted", "refused", "late"})
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


class Traces:
    """Turns the events of runs into spans.

    A span is sent when it has ended, so a run that is killed leaves the rounds it finished.

    Args:
        provider: an OpenTelemetry SDK ``TracerProvider``; it is shut down at the end.
        clock: returns seconds since 1970.
    """

    def __init__(self, provider: Any, clock: Callable[[], float] = time.time) -> None:
        from opentelemetry import trace

        self._trace, self._provider, self._clock = trace, provider, clock
        self._tracer = provider.get_tracer("weft")
        self._phases = Phases(clock)
        self._run: Any = None
        self._round: Any = None
        self._begun: dict[str, float] = {}

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Begin or end what the event begins or ends."""
        now = self._clock()
        phases = self._phases.after(kind, data)
        if kind == "run":
            self._finish(None)
            facts = {"weft.run": data.get("run", ""), "weft.name": data.get("name", "")}
            self._run = self._span(f"run {data.get('name', '')}", None, now, facts)
        if kind == "round" and phases:
            self._end_round(phases[0].began)
            self._begin_round(data["round"], phases[0].began)
        for phase in phases:
            if self._round is None:  # a run that goes on inside a round
                self._begin_round(phase.round, phase.began)
            self._span(phase.name, self._round, phase.began).end(_ns(phase.ended))
        client = data.get("client")
        if kind == "training":
            self._begun[str(client)] = now
        elif kind in _OUTCOMES and client is not None:
            self._client(kind, data, now)
        if kind in _ENDS:
            self._finish(data.get("reason") if kind == "failed" else None)

    def close(self) -> None:
        """End what is open and send what waits."""
        self._finish(None)
        self._provider.shutdown()

    def _client(self, outcome: str, data: Mapping[str, Any], now: float) -> None:
        """Write the span of one client's answer: from where a worker began with it."""
        client = str(data["client"])
        facts = {"weft.client": client, "weft.outcome": outcome}
        if "bytes" in data:
            facts["weft.bytes"] = data["bytes"]
        began = self._begun.pop(client, now)
        span = self._span(f"client {client}", self._round or self._run, began, facts)
        if outcome == "refused":
            self._fail(span, str(data.get("reason", "")))
        span.end(_ns(now))

    def _begin_round(self, number: int, began: float) -> None:
        facts = {"weft.round": number}
        self._round = self._span(f"round {number}", self._run, began, facts)
        self._begun = {}

    def _end_round(self, ended: float) -> None:
        if self._round is not None:
            self._round.end(_ns(ended))
            self._round = None

    def _finish(self, reason: Any) -> None:
        """End the round and the run, as failed where there is a reason."""
        now = self._clock()
        self._end_round(now)
        if self._run is not None:
            if reason is not None:
                self._fail(self._run, str(reason))
            self._run.end(_ns(now))
            self._run = None

    def _span(
        self, name: str, parent: Any, began: float, facts: Mapping[str, Any] | None = None
    ) -> Any:
        context = None if parent is None else self._trace.set_span_in_context(parent)
        return self._tracer.start_span(
            name, context=context, attributes=dict(facts or {}), start_time=_ns(began)
        )

    def _fail(self, span: Any, reason: str) -> None:
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, reason))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def traces_from_environment() -> Traces | None:
    """Return what the standard ``OTEL_*`` variables ask for, or None where they ask for nothing.

    Traces are on where ``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_TRACES_EXPORTER`` is set. What
    cannot be had is said in the log: these variables are often set for a whole cluster.
    """
    env = os.environ
    wanted = env.get("OTEL_TRACES_EXPORTER", "")
    asked = bool(wanted) or any(env.get(name) for name in _ENDPOINTS)
    if not asked or wanted == "none" or env.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _LOG.warning(
            "OTEL_* variables ask for traces, and opentelemetry-sdk is not installed; "
            "pip install 'weft[otel]', or set OTEL_TRACES_EXPORTER=none"
        )
        return None
    resource = Resource.create()
    if str(resource.attributes.get("service.name")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "weft"}))
    provider = TracerProvider(resource=resource)
    exporters = [_exporter(one.strip()) for one in (wanted or "otlp").split(",")]
    for exporter in exporters:
        if exporter is not None:
            provider.add_span_processor(BatchSpanProcessor(exporter))
    return Traces(provider) if any(exporters) else None


def _exporter(name: str) -> Any:
    """Return the installed exporter of this name, or None and a sentence in the log."""
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    wanted = _OTLP.get(protocol, protocol) if name == "otlp" else name
    for entry in entry_points(group="opentelemetry_traces_exporter", name=wanted):
        return entry.load()()
    _LOG.warning(
        "OTEL_TRACES_EXPORTER: no exporter is installed as %r; pip install 'weft[otel]' brings "
        "otlp (http/protobuf) and console",
        wanted,
    )
    return None
