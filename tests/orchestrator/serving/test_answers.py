"""What is asked over HTTP is answered as OpenAI's API does, by the version that it was asked of."""

import json

import pytest
import torch
from transformers import GenerationConfig

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import DataSpec
from clients.data import Batch
from clients.task_model import TaskModel
from orchestrator import versions
from tests.orchestrator.conftest import LABELS_OF as LABELS
from tests.orchestrator.serving.conftest import ask

CATS = {"model": "cats", "prompt": "the cat sings", "max_tokens": 6, "temperature": 0}


def used(workspace, version):
    """Return a version as weft's own evaluation attaches it, and how to take it off again."""
    assignment = versions.use(workspace, workspace.store.version(version), DataSpec("none:"))
    base = models.load(assignment.model)
    adapter = ADAPTERS.get(assignment.adapter.name).build(**assignment.adapter.options)
    model = TaskModel(adapter.attach(base.backbone, {}), assignment.model).eval()
    tensors = dict(assignment.broadcast.tensors)
    head = {k: tensors.pop(k) for k in list(tensors) if k.startswith("head.")}
    adapter.write(model.backbone, tensors)
    if head:
        model.write_head(head)
    return base, model, lambda: adapter.detach(model.backbone)


def said_alone(workspace, version, prompt, most):
    base, model, detach = used(workspace, version)
    ids = torch.tensor([base.tokenizer(prompt)["input_ids"]])
    end = base.tokenizer.eos_token_id
    greedy = GenerationConfig(
        max_new_tokens=most, do_sample=False, pad_token_id=end, eos_token_id=end
    )
    with torch.no_grad():
        said = model.backbone.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedy
        )
    detach()
    return base.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def two(publish, move):
    """Two names with a version each, that their aliases point at."""
    made = {"cats": publish("cats", 1), "dogs": publish("dogs", 2, r=4)}
    for name, version in made.items():
        move(f"{name}@production", version)
    return made


def test_adapters_in_one_batch_say_what_each_says_alone(workspace, two, serve):
    wanted = {name: said_alone(workspace, v, "the cat sings", 6) for name, v in two.items()}
    with serve("cats@production", "dogs@production") as (_, app, _):
        requests = [("/v1/completions", CATS | {"model": name}) for name in two for _ in range(3)]
        answers = ask(app, *requests)
    assert wanted["cats"] != wanted["dogs"]
    for (_, body), answer in zip(requests, answers, strict=True):
        found = answer.json()
        assert answer.status_code == 200
        assert found["choices"][0]["text"] == wanted[body["model"]]
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["version"] == answer.headers["weft-version"] == two[body["model"]]
        read = found["usage"]["prompt_tokens"]
        assert found["usage"] == {
            "prompt_tokens": read,
            "completion_tokens": 6,
            "total_tokens": read + 6,
        }


def test_a_stream_says_the_same_piece_by_piece(two, serve):
    with serve("cats@production") as (_, app, _):
        whole, stream = ask(
            app,
            ("/v1/completions", CATS),
            ("/v1/completions", CATS | {"stream": True, "stream_options": {"include_usage": True}}),
        )
    lines = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert chunks[-1]["usage"] == whole.json()["usage"]
    pieces = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(piece["text"] for piece in pieces) == whole.json()["choices"][0]["text"]
    assert len(pieces) > 2
    assert pieces[-1]["finish_reason"] == "length"
    assert {chunk["version"] for chunk in chunks} == {two["cats"]}


def test_several_prompts_texts_or_tokens_are_answered_in_their_order(two, serve):
    with serve("cats@production", base=None) as (made, app, _):
        tokens = list(made.asking._tokenizer("the cat sings")["input_ids"])
        one, both, ids = ask(
            app,
            ("/v1/completions", CATS),
            ("/v1/completions", CATS | {"prompt": ["dog", "the cat sings"]}),
            ("/v1/completions", CATS | {"prompt": tokens, "logprobs": 2}),
        )
    wanted = one.json()["choices"][0]["text"]
    assert [c["index"] for c in both.json()["choices"]] == [0, 1]
    assert both.json()["choices"][1]["text"] == wanted
    assert ids.json()["choices"][0]["text"] == wanted
    told = ids.json()["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == 6
    assert [max(top.values()) for top in told["top_logprobs"]] == told["token_logprobs"]


def test_a_conversation_goes_through_the_chat_template(two, serve):
    body = {"model": "cats", "messages": [{"role": "user", "content": "sings"}]}
    body |= {"max_completion_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 1}
    with serve("cats@production") as (made, app, _):
        (refused,) = ask(app, ("/v1/chat/completions", body))
        made.asking._tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
            "{% endif %}the cat {{ m.content }}{% endfor %}"
        )
        plain, chat, streamed, system = ask(
            app,
            ("/v1/completions", CATS | {"max_tokens": 4}),
            ("/v1/chat/completions", body),
            ("/v1/chat/completions", body | {"stream": True}),
            ("/v1/chat/completions", body | {"messages": [{"role": "system", "content": "x"}]}),
        )
    assert refused.status_code == 400
    assert "no chat template" in refused.json()["error"]["message"]
    message = chat.json()["choices"][0]
    assert message["message"]["role"] == "assistant"
    assert message["message"]["content"] == plain.json()["choices"][0]["text"]
    assert len(message["logprobs"]["content"]) == 4
    first = json.loads(streamed.text.split("\n\n")[0].removeprefix("data: "))
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["object"] == "chat.completion.chunk"
    assert system.status_code == 400


def test_texts_and_words_are_labelled_as_evaluation_would(workspace, publish, move, serve):
    made = {
        "topics": publish("topics", 3, kind="classification", seen=("cat", "model")),
        "tags": publish("tags", 4, kind="token-classification"),
    }
    for name, version in made.items():
        move(f"{name}@production", version)
    text = "the cat learns"
    with serve("topics@production", "tags@production") as (_, app, _):
        topics, tags, cut, long = ask(
            app,
            (
                "/v1/classify",
                {"model": "topics", "input": [text, {"text": text, "text_pair": "a"}]},
            ),
            ("/v1/classify", {"model": "tags", "input": text}),
            ("/v1/classify", {"model": "tags", "input": "dog " * 20, "truncate": True}),
            ("/v1/classify", {"model": "topics", "input": "dog " * 20}),
        )
    for name, answer in (("topics", topics), ("tags", tags)):
        base, model, detach = used(workspace, made[name])
        ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(Batch(ids, torch.ones_like(ids), ids))[0]
        detach()
        found = answer.json()["data"][0]
        assert answer.json()["version"] == made[name]
        if name == "topics":
            logits[1] = float("-inf")  # what was never learned
            wanted = dict(zip(LABELS["classification"], logits.softmax(-1).tolist(), strict=True))
            assert found["scores"] == pytest.approx(wanted, abs=1e-5)
            assert found["label"] == max(wanted, key=wanted.get)
        else:
            best = logits[1:4].softmax(-1).max(-1)
            labels = [LABELS["token-classification"][i] for i in best.indices.tolist()]
            assert [word["label"] for word in found["words"]] == labels
            assert [text[w["start"] : w["end"]] for w in found["words"]] == text.split()
            scores = [word["score"] for word in found["words"]]
            assert scores == pytest.approx(best.values.tolist(), abs=1e-5)
    assert len(topics.json()["data"]) == 2
    words = cut.json()["data"][0]["words"]
    assert [word["label"] is None for word in words] == [False] * 14 + [True] * 6
    assert long.status_code == 400
    assert "22 tokens, and 16 are allowed" in long.json()["error"]["message"]


def test_the_models_are_the_aliases_and_the_versions_behind_them(two, serve):
    with serve("cats@production", "dogs@production", base=None) as (_, app, _):
        (listed,) = ask(app, ("/v1/models", None))
        by_id, prefix = ask(
            app,
            ("/v1/completions", CATS | {"model": two["cats"]}),
            ("/v1/completions", CATS | {"model": two["dogs"][:12]}),
        )
    found = {model["id"]: model["version"] for model in listed.json()["data"]}
    assert found == {
        "cats@production": two["cats"],
        "dogs@production": two["dogs"],
        **{version: version for version in two.values()},
    }
    assert by_id.json()["version"] == two["cats"]
    assert prefix.json()["version"] == two["dogs"]


def test_the_base_model_by_its_name_is_answered_without_an_adapter(two, tiny_decoder, serve):
    base = str(tiny_decoder)
    with serve("cats@production", base=base) as (made, app, _):
        (answer,) = ask(app, ("/v1/completions", CATS | {"model": base}))
        assert answer.json()["version"] == made.spec.hash
    loaded = models.load(made.spec)
    ids = torch.tensor([loaded.tokenizer("the cat sings")["input_ids"]])
    with torch.no_grad():
        said = loaded.backbone.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
    assert answer.json()["choices"][0]["text"] == loaded.tokenizer.decode(said[0, ids.shape[1] :])
