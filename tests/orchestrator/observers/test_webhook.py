"""Notifications reach a real server, or are given up; the address is told to nobody."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator.config import BadConfig, parse_config
from orchestrator.observers.webhook import BadWebhook, Notify, Webhook


class Receiver:
    """A webhook at a real port, which answers with the given codes, then with 200."""

    def __init__(self):
        self.answers, self.bodies, received = [], [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.bodies.append(json.loads(body))
                code = received.answers.pop(0) if received.answers else 200
                self.send_response(code)
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/s3cret"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receiver(monkeypatch):
    made = Receiver()
    monkeypatch.setenv("WEFT_WEBHOOK", made.url)
    yield made
    made.close()


def post(events, **options):
    webhook = Webhook(Notify(url_env="WEFT_WEBHOOK", **options), pause_s=0.0)
    for kind, data in events:
        webhook(kind, data)
    webhook.close()


def test_a_completed_run_is_posted_once(receiver, events):
    post(events)

    [body] = receiver.bodies
    assert (body["event"], body["run"], body["name"]) == ("completed", "run-1", "task-1")
    assert (body["round"], body["version_name"], body["version"]) == (2, "task-1:v1", "ab" * 32)
    assert body["text"] == "task-1 (run run-1) completed: task-1:v1 abababababab"
    assert "plan" not in body


def test_only_what_is_asked_for_is_posted(receiver, events):
    post([*events, ("failed", {"reason": "oh"})], on=["failed"])

    [body] = receiver.bodies
    assert body["text"] == "task-1 (run run-1) failed in round 2: oh"


def test_slack_gets_its_own_form(receiver, events):
    below = ("below quorum", {"updates": 2, "quorum": 3})
    post([events[0], events[3], below], format="slack")

    assert receiver.bodies == [{"text": "task-1 (run run-1): round 1 got 2 updates and needs 3"}]


def test_a_low_budget_is_said_once_a_population(receiver, events):
    low = {"population": "north", "epsilon": 6.5, "limit": 8.0, "delta": 1e-5}
    other = {**low, "population": "south"}
    post([events[0], *[("budget low", facts) for facts in (low, low, other)]])

    assert [body["population"] for body in receiver.bodies] == ["north", "south"]
    assert "population north has spent ε = 6.50 of 8" in receiver.bodies[0]["text"]


def test_a_server_that_fails_is_tried_three_times(receiver, events, caplog):
    receiver.answers = [503, 429]
    post([events[0], ("failed", {"reason": "oh"})])
    assert len(receiver.bodies) == 3
    assert caplog.records == []

    receiver.answers = [500] * 9
    with caplog.at_level(logging.WARNING):
        post([events[0], ("failed", {"reason": "oh"})])
    assert len(receiver.bodies) == 6
    assert "'failed' could not be posted to the address in WEFT_WEBHOOK (it answered 500)" in (
        caplog.text
    )


def test_an_address_that_is_refused_is_not_tried_again(receiver, events, caplog):
    receiver.answers = [404]
    with caplog.at_level(logging.WARNING):
        post([events[0], ("failed", {"reason": "oh"})])

    assert len(receiver.bodies) == 1
    assert "it answered 404" in caplog.text


def test_a_server_that_is_not_there_stops_nothing_and_is_not_named(monkeypatch, events, caplog):
    monkeypatch.setenv("WEFT_WEBHOOK", "http://127.0.0.1:9/s3cret")
    with caplog.at_level(logging.WARNING):
        post(events)

    assert "(ConnectionRefusedError)" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    ("value", "said"), [(None, "is not set"), ("file:///etc/passwd", "no http or https")]
)
def test_an_environment_without_an_address_is_refused(monkeypatch, value, said):
    monkeypatch.delenv("WEFT_WEBHOOK", raising=False)
    if value:
        monkeypatch.setenv("WEFT_WEBHOOK", value)
    with pytest.raises(BadWebhook, match=f"variable WEFT_WEBHOOK .*{said}") as caught:
        Webhook(Notify(url_env="WEFT_WEBHOOK"))

    assert value is None or value not in str(caught.value)


@pytest.mark.parametrize(
    "notify",
    [
        "https://hooks.example/s3cret",
        {"url": "https://hooks.example/s3cret"},
        {"url_env": "https://hooks.example/s3cret"},
    ],
)
def test_a_literal_address_is_refused_and_not_repeated(document, notify):
    with pytest.raises(BadConfig, match="a webhook's address is a secret") as caught:
        parse_config(document(notify=notify))

    assert "notify: {url_env: WEFT_WEBHOOK}" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("notify", "said"),
    [
        ({"url_env": "X", "on": ["sometimes"]}, "notify.on.0"),
        ({"url_env": "X", "on": []}, "notify.on"),
        ({"url_env": "X", "format": "teams"}, "notify.format"),
        ({"on": ["failed"]}, "notify.url_env: is required"),
        ({"url_env": "X", "onn": ["failed"]}, "did you mean 'on'?"),
    ],
)
def test_a_mistake_in_notify_is_named(document, notify, said):
    with pytest.raises(BadConfig) as caught:
        parse_config(document(notify=notify))

    assert said in str(caught.value)
