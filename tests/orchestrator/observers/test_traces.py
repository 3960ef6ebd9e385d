"""Spans nest as run, round, phase and client; the standard variables decide where they go."""

import logging
import os
from types import SimpleNamespace

import pytest

pytest.importorskip("opentelemetry.sdk", reason="extra 'otel' is not installed")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from orchestrator.observers.traces import Traces, traces_from_environment


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def traced(clock):
    """Return a function that tells events, a second apart, and returns the spans as dicts."""

    def tell(events):
        exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        traces = Traces(provider, clock)
        for kind, data in events:
            clock.now += 1
            traces(kind, data)
        spans = exporter.get_finished_spans()
        traces.close()
        return exporter.get_finished_spans(), len(spans)

    return tell


def tree(spans):
    """Return (parent's name, name) of every span, in order of beginning."""
    names = {s.context.span_id: s.name for s in spans}
    ordered = sorted(spans, key=lambda s: (s.start_time, -s.end_time))
    return [(names[s.parent.span_id] if s.parent else None, s.name) for s in ordered]


def test_a_run_holds_rounds_and_a_round_its_phases_and_clients(traced, events):
    spans, before_closing = traced(events)

    assert before_closing == len(spans)  # a completed run leaves nothing open
    assert tree(spans)[0] == (None, "run task-1")
    assert ("run task-1", "round 1") in tree(spans)
    assert ("run task-1", "round 2") in tree(spans)
    inside = sorted(name for parent, name in tree(spans) if parent == "round 2")
    phases = ["aggregate", "client a", "client b", "commit", "evaluate", "plan", "reserve", "train"]
    assert inside == phases


def test_spans_have_the_events_times(traced, events):
    spans, _ = traced(events)

    lasted = {s.name: (s.end_time - s.start_time) / 1e9 for s in spans}
    assert lasted["train"] == 4  # assigned; training a, b; accepted a, b
    assert lasted["client a"] == 2
    assert lasted["client b"] == 2
    assert lasted["round 1"] == 9
    assert lasted["run task-1"] == len(events) - 1
    starts = {s.name: s.start_time for s in spans}
    ends = {s.name: s.end_time for s in spans}
    assert starts["run task-1"] <= starts["round 1"]
    assert ends["round 1"] <= starts["round 2"]


def test_a_refused_client_is_an_error_with_its_reason(traced, events):
    spans, _ = traced(events)

    refused = [s for s in spans if s.attributes.get("weft.outcome") == "refused"]
    [span] = refused
    assert (span.name, span.status.is_ok, span.status.description) == (
        "client b",
        False,
        "out of memory",
    )


def test_a_failed_run_is_an_error_and_what_was_open_is_ended(traced, events):
    spans, _ = traced([*events[:6], ("failed", {"reason": "the power went"})])

    run = next(s for s in spans if s.name == "run task-1")
    assert run.status.description == "the power went"
    assert "round 1" in {s.name for s in spans}


def test_a_run_that_is_abandoned_is_ended_by_closing(traced, events):
    spans, before_closing = traced(events[:6])

    assert len(spans) == before_closing + 2  # the round and the run


def test_a_run_that_goes_on_inside_a_round_has_that_round(traced, events):
    spans, _ = traced([events[0], *events[7:12]])

    assert ("round 1", "train") in tree(spans)
    assert ("run task-1", "round 1") in tree(spans)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"},
        {"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_without_being_asked_there_are_no_traces(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert traces_from_environment() is None


def test_the_standard_variables_choose_the_exporter_and_the_service(monkeypatch, events):
    exporter, asked = InMemorySpanExporter(), []

    def entry_points(group, name):
        asked.append((group, name))
        return [SimpleNamespace(load=lambda: lambda: exporter)]

    monkeypatch.setattr("orchestrator.observers.traces.entry_points", entry_points)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "memory")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    traces = traces_from_environment()
    for kind, data in events:
        traces(kind, data)
    traces.close()

    assert asked == [("opentelemetry_traces_exporter", "memory")]
    run = next(s for s in exporter.get_finished_spans() if s.name == "run task-1")
    assert run.resource.attributes["service.name"] == "weft"
    assert run.resource.attributes["deployment.environment"] == "test"


def test_an_endpoint_alone_asks_for_otlp(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    traces = traces_from_environment()

    assert traces._provider.resource.attributes["service.name"] == "mine"
    traces.close()  # nothing was traced, so nobody is called


def test_an_exporter_that_is_not_installed_is_said(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "smoke-signals")
    with caplog.at_level(logging.WARNING):
        assert traces_from_environment() is None

    assert "no exporter is installed as 'smoke-signals'" in caplog.text
