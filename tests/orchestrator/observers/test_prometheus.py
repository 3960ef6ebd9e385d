"""Metrics count what a run did, and are served or written as Prometheus reads them."""

import builtins
import logging
import socket
import urllib.request

import pytest

pytest.importorskip("prometheus_client", reason="extra 'metrics' is not installed")

from orchestrator.observers.prometheus import BadMetricsPort, Metrics, MetricsUnavailable


@pytest.fixture
def told(events):
    """Return metrics that have been told the run's events."""
    metrics = Metrics()
    for kind, data in events:
        metrics(kind, data)
    return metrics.registry.get_sample_value


def test_rounds_clients_and_bytes_are_counted(told):
    assert told("weft_rounds_total") == 2
    assert told("weft_round") == 2
    assert told("weft_clients_total", {"outcome": "accepted"}) == 3
    assert told("weft_clients_total", {"outcome": "refused"}) == 1
    assert told("weft_clients_total", {"outcome": "late"}) == 0
    assert told("weft_bytes_total", {"direction": "sent"}) == 4000
    assert told("weft_bytes_total", {"direction": "received"}) == 900


@pytest.mark.parametrize("phase", ["plan", "reserve", "train", "aggregate", "commit", "evaluate"])
def test_every_phase_is_timed_once_a_round(told, phase):
    assert told("weft_phase_seconds_count", {"phase": phase}) == 2
    assert told("weft_phase_seconds_sum", {"phase": phase}) >= 0


def test_epsilon_is_the_last_by_population(told):
    assert told("weft_epsilon", {"population": "north"}) == 1.5
    assert told("weft_epsilon", {"population": "south"}) == 3.0


def test_a_resumed_run_is_right_before_its_first_round(events, spent):
    metrics = Metrics()
    metrics("run", {**events[0][1], "done": 7, "spent": spent(north=4.0)})

    assert metrics.registry.get_sample_value("weft_round") == 7
    assert metrics.registry.get_sample_value("weft_epsilon", {"population": "north"}) == 4.0
    assert metrics.registry.get_sample_value("weft_rounds_total") == 0


def test_another_run_of_the_process_has_populations_of_its_own(events, spent):
    metrics = Metrics()
    metrics("run", {**events[0][1], "spent": spent(north=4.0)})
    metrics("run", {**events[0][1], "spent": spent(east=1.0)})

    value = metrics.registry.get_sample_value
    assert value("weft_epsilon", {"population": "north"}) is None
    assert value("weft_epsilon", {"population": "east"}) == 1.0


def test_many_populations_become_one_beyond_a_hundred_and_it_is_said_once(spent, caplog):
    many = {f"p{number:03d}": float(number) for number in range(150)}
    metrics = Metrics()
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            metrics("committed", {"round": number, "updates": 1, "spent": spent(**many)})

    value = metrics.registry.get_sample_value
    assert value("weft_epsilon", {"population": "p099"}) == 99
    assert value("weft_epsilon", {"population": "p100"}) is None
    assert value("weft_epsilon", {"population": "(others)"}) == 149
    [record] = caplog.records
    assert "100 of 150 populations" in record.getMessage()


def test_they_are_served_over_http_until_closed(events):
    metrics = Metrics(port=0)
    for kind, data in events:
        metrics(kind, data)
    url = f"http://127.0.0.1:{metrics.port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    metrics.close()
    metrics.close()

    assert "weft_rounds_total 2.0" in text
    assert 'weft_clients_total{outcome="refused"} 1.0' in text
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


def test_a_textfile_is_right_after_every_round_and_at_the_end(events, tmp_path):
    file = tmp_path / "weft.prom"
    metrics = Metrics(file=file)
    for kind, data in events:
        metrics(kind, data)
        if kind == "committed":
            assert f"weft_rounds_total {data['round']}.0" in file.read_text()
    metrics.close()

    assert 'weft_phase_seconds_count{phase="evaluate"} 2.0' in file.read_text()


def test_a_textfile_that_cannot_be_written_is_missed_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        Metrics(file=tmp_path / "gone" / "weft.prom")


def test_a_port_that_is_taken_is_refused_with_a_sentence():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            BadMetricsPort, match=rf"port {port} \(Address already in use\); choose"
        ):
            Metrics(port=port)


@pytest.mark.parametrize(("port", "address"), [(70_000, "127.0.0.1"), (0, "no.such.host.invalid")])
def test_what_is_no_port_or_address_is_refused_with_a_sentence(port, address):
    with pytest.raises(BadMetricsPort, match=f"served on {address}, port {port}"):
        Metrics(port=port, address=address)


def test_a_missing_package_is_a_sentence(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "prometheus_client":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MetricsUnavailable, match=r"pip install 'weft\[metrics\]'"):
        Metrics()
