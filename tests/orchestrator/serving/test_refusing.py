"""Bad input, wrong keys, too much and too slow: one sentence each, in OpenAI's shape."""

import asyncio
import json
import threading

import pytest

from orchestrator.serving.guard import Patience
from orchestrator.serving.keys import ApiKeys, BadApiKeys, read_api_keys
from tests.orchestrator.serving.conftest import ask, client_of

CATS = {"model": "cats", "prompt": "the cat", "max_tokens": 2}
KEY = "0123456789abcdef-key"


@pytest.fixture
def cats(publish, move):
    version = publish("cats", 1)
    move("cats@production", version)
    return version


REFUSED = (
    ("completions", CATS | {"model": "dogs"}, 404, "model_not_found", "no model 'dogs' is"),
    ("classify", {"model": "cats", "input": "a"}, 400, "wrong_endpoint", "is for causal-lm"),
    (
        "completions",
        CATS | {"prompt": "cat " * 60},
        400,
        "context_length_exceeded",
        "tokens, and 40 are allowed",
    ),
    (
        "completions",
        CATS | {"max_tokens": 120},
        400,
        "context_length_exceeded",
        "max_tokens is 120, and 100 are allowed",
    ),
    (
        "completions",
        CATS | {"prompt": [5] * 40, "max_tokens": 100},
        400,
        "context_length_exceeded",
        "takes 128 together",
    ),
    ("completions", CATS | {"prompt": ""}, 400, "invalid_prompt", "the prompt is empty"),
    ("completions", CATS | {"prompt": [99999]}, 400, "invalid_prompt", "tokens are 0 to"),
    ("completions", CATS | {"prompt": []}, 400, "invalid_request", "a prompt has at least"),
    ("completions", CATS | {"prompt": ["a"] * 65}, 400, "context_length_exceeded", "got 65"),
    ("completions", {"model": "cats"}, 400, "invalid_request", "prompt: field required"),
    ("completions", CATS | {"n": 2}, 400, "invalid_request", "n: input should be 1"),
    ("completions", CATS | {"top_p": 0}, 400, "invalid_request", "top_p: input should be gre"),
    ("completions", CATS | {"best": 1}, 400, "invalid_request", "best: this server knows no"),
    ("completions", "not json", 400, "invalid_request", "the body is no JSON"),
    ("completions", [1], 400, "invalid_request", "the body: input should be"),
    ("completions", CATS | {"prompt": "x" * 30_000}, 413, "request_too_large", "20000 bytes"),
    ("nothing", {}, 404, "no_such_path", "not found"),
)
"""Path, body, and what it is answered: status, code and a part of the sentence."""


def test_what_cannot_be_answered_is_refused_in_a_sentence(cats, serve):
    async def post(app):
        async with client_of(app) as client:
            headers = {"content-type": "application/json"}
            return [
                await client.post(
                    f"/v1/{path}",
                    content=body if isinstance(body, str) else json.dumps(body),
                    headers=headers,
                )
                for path, body, *_ in REFUSED
            ]

    with serve("cats@production", prompt_tokens=40, answer_tokens=100) as (_, app, _):
        answers = asyncio.run(post(app))
    for answer, (_, _, status, code, message) in zip(answers, REFUSED, strict=True):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code), message
        assert message in error["message"]
        assert "\n" not in error["message"]
        assert "xxxx" not in error["message"]
        assert error.keys() == {"message", "type", "param", "code"}


def test_who_has_no_key_is_let_in_nowhere_but_where_health_is_asked(cats, serve, caplog):
    with serve("cats@production", keys=(KEY,)) as (_, app, _):
        refused = [
            *ask(app, ("/v1/completions", CATS), ("/v1/models", None)),
            *ask(app, ("/v1/models", None), headers={"authorization": "Bearer wrong"}),
            *ask(app, ("/v1/models", None), headers={"authorization": f"Basic {KEY}"}),
        ]
        (let_in,) = ask(app, ("/v1/models", None), headers={"authorization": f"Bearer {KEY}"})
        open_to_all = ask(app, ("/healthz", None), ("/readyz", None), ("/metrics", None))
    assert [answer.status_code for answer in refused] == [401] * 4
    assert refused[0].json()["error"]["code"] == "invalid_api_key"
    assert let_in.status_code == 200
    assert [answer.status_code for answer in open_to_all] == [200] * 3
    assert KEY not in caplog.text + "".join(answer.text for answer in [*refused, *open_to_all])


def test_keys_are_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{KEY}\n\n{KEY}-2  # of another\n")
    keys = read_api_keys(file)
    assert keys.admits(f"Bearer {KEY}")
    assert keys.admits(f"bearer {KEY}-2")
    assert not keys.admits(None)
    monkeypatch.setenv("WEFT_API_KEYS", f"{KEY}-3, {KEY}-4")
    assert read_api_keys(None).admits(f"Bearer {KEY}-4")
    monkeypatch.delenv("WEFT_API_KEYS")
    assert not read_api_keys(None)
    file.write_text("# none\n")
    with pytest.raises(BadApiKeys, match="has no API key"):
        read_api_keys(file)
    with pytest.raises(BadApiKeys, match="at least 16 characters"):
        ApiKeys(("short",))


@pytest.fixture
def held():
    """A function that keeps an engine busy until the test lets it go."""
    go = threading.Event()

    def hold(made):
        made.model.engine.call(lambda: go.wait(60))
        return go

    yield hold
    go.set()


def test_more_than_may_wait_is_answered_with_429_and_when_to_come_back(cats, serve, held):
    with serve("cats@production", waiting=1) as (made, app, _):
        go = held(made)

        async def all_at_once():
            async with client_of(app) as client:
                asked = [
                    asyncio.create_task(client.post("/v1/completions", json=CATS)) for _ in range(5)
                ]
                done = set()
                while len(done) < 4:  # one waits, four are refused before anything is answered
                    done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.sleep(0)
                refused = [task.result() for task in done]
                go.set()
                return refused, await asyncio.gather(*asked)

        refused, answers = asyncio.run(all_at_once())
    assert {answer.status_code for answer in refused} == {429}
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429, 429, 429]


def test_an_answer_that_takes_too_long_is_given_up(cats, serve):
    with serve("cats@production", timeout_s=1e-6) as (made, app, _):
        whole, stream = ask(
            app, ("/v1/completions", CATS), ("/v1/completions", CATS | {"stream": True})
        )
        assert made.model.engine.load().running == 0
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    assert '"code": "timeout"' in stream.text


def test_a_model_that_fails_is_an_error_of_the_server_that_says_nothing_of_it(cats, serve, caplog):
    with serve("cats@production") as (made, app, _):
        made.model.worker._decoding.join = None  # as a broken driver would
        (answer,) = ask(app, ("/v1/completions", CATS))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_failed")
    assert "the model failed" in caplog.text


def test_who_sends_too_slowly_is_told_and_left(cats, serve):
    async def never():
        yield b'{"model": '
        await asyncio.Event().wait()

    with serve("cats@production", patience=Patience(1000, 0.01, 5)) as (_, app, _):

        async def post():
            async with client_of(app) as client:
                return await client.post("/v1/completions", content=never())

        answer = asyncio.run(post())
    assert (answer.status_code, answer.headers["connection"]) == (408, "close")


def test_who_takes_no_answer_is_left_and_what_it_asked_is_given_up(cats, serve, caplog):
    body = json.dumps(CATS | {"stream": True, "max_tokens": 100}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1"}
    scope |= {"asgi": {"version": "3.0", "spec_version": "2.4"}, "raw_path": b"", "scheme": "http"}
    taken = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        taken.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # the reader's window is full

    with serve("cats@production", patience=Patience(1000, 5, 0.01)) as (made, app, _):
        asyncio.run(app(scope, receive, send))
        (answer,) = ask(app, ("/v1/completions", CATS))
        load = made.model.engine.load()
        assert made.shelf.is_drained("cats@production")
    assert taken == ["http.response.start", "http.response.body"]
    assert answer.status_code == 200
    assert (load.running, load.waiting) == (0, 0)
    assert "did not take its answer" in caplog.text


def test_who_leaves_is_not_answered_and_holds_nothing(cats, serve, held):
    with serve("cats@production") as (made, app, _):
        go = held(made)

        async def leave():
            async with client_of(app) as client:
                task = asyncio.create_task(client.post("/v1/completions", json=CATS))
                while not made.model.engine.load().waiting:
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(leave())
        go.set()
        (answer,) = ask(app, ("/v1/completions", CATS))
        assert made.model.engine.load().running == 0
        made.shelf.point("other", cats)
        assert made.shelf.is_drained("cats@production")
    assert answer.status_code == 200


def test_the_metrics_count_what_was_asked_and_show_the_state(cats, serve):
    with serve("cats@production") as (_, app, _):
        ask(app, ("/v1/completions", CATS), ("/v1/completions", CATS | {"model": "no"}))
        (scraped,) = ask(app, ("/metrics", None))
    for line in (
        'weft_serve_requests_total{path="/v1/completions",status="200"} 1.0',
        'weft_serve_requests_total{path="/v1/completions",status="404"} 1.0',
        f'weft_serve_answered_total{{model="cats@production",version="{cats[:12]}"}} 1.0',
        'weft_serve_tokens_total{direction="answer"} 2.0',
        "weft_serve_loaded 1.0",
        "weft_serve_store_up 1.0",
        'weft_serve_behind{model="cats@production"} 0.0',
    ):
        assert line in scraped.text
