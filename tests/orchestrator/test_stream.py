"""A stream's file: which runs it stands for, and what is refused before any of them."""

import pytest
import yaml

from orchestrator.config import BadConfig
from orchestrator.stream import load_stream, parse_stream

SIMULATED = {"simulate": {"by": "iid", "parts": 2, "data": "jsonl:/all.jsonl"}}


@pytest.fixture
def file(document):
    """Return a function that makes a stream's document of two tasks, with changes."""

    def make(*tasks, base=None, **changes):
        base = document(**{"labels": None, "clients": SIMULATED, **(base or {})})
        chosen = tasks or (
            {"name": "mail", "labels": ["bill", "login"], "data": "jsonl:/mail.jsonl"},
            {"name": "chat", "labels": ["login", "delay"], "data": "jsonl:/chat.jsonl"},
        )
        return {"name": "desk", "base": base, "tasks": list(chosen), **changes}

    return make


def test_the_label_set_grows_by_what_each_task_brings(file):
    stream = parse_stream(file())
    first, second = (stream.config(i, ("v1",)[:i]) for i in (0, 1))

    assert (first.labels, first.task_labels) == (("bill", "login"), ("bill", "login"))
    assert second.labels == stream.labels == ("bill", "login", "delay")
    assert second.task_labels == ("login", "delay")
    assert second.clients.simulate.data == "jsonl:/chat.jsonl"


def test_a_declared_label_set_stays_as_it_is(file):
    stream = parse_stream(file(base={"labels": ["delay", "bill", "login"]}))
    assert {stream.config(i, ("v1",)[:i]).labels for i in (0, 1)} == {("delay", "bill", "login")}
    assert stream.tasks[1].labels == ("delay", "login")


def test_tasks_without_labels_share_the_bases(file):
    tasks = [{"name": name, "data": f"jsonl:/{name}.jsonl"} for name in ("books", "films")]
    stream = parse_stream(file(*tasks, base={"labels": ["good", "bad"]}))
    config = stream.config(1, ("v1",))
    assert (config.labels, config.task_labels) == (("good", "bad"), ())


@pytest.mark.parametrize(
    ("method", "start", "start_from"),
    [
        ("sequential", "continue", "v1"),
        ("stacked", "stack", "v1"),
        ("fresh", "fresh", "v1"),
        ("isolated", "fresh", None),
        ({"regularizers": ["o-lora"]}, "stack", "v1"),
        ({"regularizers": ["n-lora"]}, "stack", "v1"),
        ({"regularizers": ["proximal"]}, "continue", "v1"),
        ({"strategy": "lori"}, "stack", "v1"),
        ({"regularizers": ["o-lora"], "start": "continue"}, "continue", "v1"),
    ],
)
def test_how_a_task_starts_is_the_methods(file, method, start, start_from):
    stream = parse_stream(file(method=method))
    first, second = stream.config(0, ()), stream.config(1, ("v1",))
    assert (first.start, first.start_from) == ("fresh", None)
    assert (second.start, second.start_from) == (start, start_from)


def test_a_strategy_that_recycles_starts_from_all_versions_before(file):
    stream = parse_stream(file(method={"strategy": "lori"}))
    assert stream.config(1, ("v1",)).library == ("v1",)
    off = parse_stream(file(method={"strategy": "lori", "library": False}))
    assert off.config(1, ("v1",)).library == ()


def test_a_task_overrides_any_key_of_the_base(file):
    tasks = [dict(task) for task in file()["tasks"]]
    tasks[1] |= {"rounds": 7, "set": {"adapter.r": 2, "clients.simulate.parts": 3}}
    config = parse_stream(file(*tasks)).config(1, ("v1",))
    assert (config.rounds, config.adapter.options, config.clients.simulate.parts) == (
        7,
        {"r": 2},
        3,
    )


def test_a_tasks_own_clients_replace_the_bases(file):
    tasks = [*file()["tasks"], {"name": "calls", "clients": {"names": ["north"]}}]
    assert parse_stream(file(*tasks)).config(2, ("v1", "v2")).clients.names == ("north",)


def test_joint_training_reads_the_data_of_all_tasks_as_one(file):
    stream = parse_stream(file(method="joint"))
    [stage] = stream.stages
    config = stream.config(0, ())
    assert (stage.name, stage.trained, config.rounds) == ("joint-2", 2, 4)
    assert config.clients.simulate.data == "several:jsonl:/mail.jsonl;jsonl:/chat.jsonl"
    assert config.labels == ("bill", "login", "delay")


def test_joint_training_joins_registered_clients_by_name(file):
    tasks = [
        {"name": n, "labels": ["x", "y"], "clients": {"names": c}}
        for n, c in (("a", ["north", "south"]), ("b", ["south", "west"]))
    ]
    config = parse_stream(file(*tasks, method="joint")).config(0, ())
    assert config.clients.names == ("north", "south", "west")


def test_the_document_makes_the_same_stream_again_from_anywhere(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = [{**task, "data": "jsonl:mail.jsonl"} for task in file()["tasks"]]
    tasks[0]["evaluate"] = "jsonl:test.jsonl"
    made = parse_stream(file(*tasks, method={"regularizers": ["o-lora"], "strategy": "fedavg"}))
    monkeypatch.chdir("/")
    assert parse_stream(made.document) == made
    assert made.tasks[0].test.uri == f"jsonl:{tmp_path}/test.jsonl"


def test_the_base_may_be_a_file_beside_it(file, tmp_path):
    document = file()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document["base"]))
    (tmp_path / "desk.yaml").write_text(yaml.safe_dump({**document, "base": "run.yaml"}))
    assert load_stream(tmp_path / "desk.yaml") == parse_stream(document)


@pytest.mark.parametrize(
    ("tags", "metric"),
    [
        ((["O", "B-CAT", "I-CAT"], ["O", "B-DOG"]), "entity_f1"),
        ((["NOUN", "VERB"], ["VERB", "DET"]), "accuracy"),
    ],
)
def test_tasks_of_tags_are_measured_by_what_their_tags_mark(file, tags, metric):
    tasks = [
        {"name": name, "labels": labels, "data": "jsonl:/a.jsonl"}
        for name, labels in zip(("cats", "dogs"), tags, strict=True)
    ]
    stream = parse_stream(file(*tasks, base={"task": "token-classification"}))
    assert (stream.metric, stream.lower_is_better) == (metric, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "tasks"),
        ({"method": "magic"}, "there is no method 'magic' (sequential, stacked"),
        ({"metric": "bleu"}, "classification is not scored by 'bleu' (accuracy"),
        ({"tasks": [{"name": "a"}, {"name": "a"}]}, "two are called 'a'"),
        ({"tasks": [{"name": "a", "label": ["x"]}]}, "label"),
        ({"tasks": [{"name": "a", "labels": ["x", "y"], "set": {"rouns": 1}}]}, "task a: rouns"),
        ({"tasks": [{"name": "a", "data": "jsonl:/a", "clients": {}}]}, "not both"),
        ({"method": {"start": "twice"}}, "start"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(file, changes, message):
    with pytest.raises(BadConfig) as error:
        parse_stream(file() | changes, "desk.yaml")
    assert "desk.yaml" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"head": "personal"}, "none can be scored"),
        ({"strategy": "fedsa-lora"}, "none can be scored"),
        ({"head": "freeze"}, "rows of labels that tasks bring would stay as they were drawn"),
    ],
)
def test_a_head_that_cannot_do_what_is_asked_is_refused(file, base, message):
    tasks = [{**task, "evaluate": "jsonl:/test.jsonl"} for task in file()["tasks"]]
    with pytest.raises(BadConfig, match=message):
        parse_stream(file(*tasks, base=base))


ROUTER = {"data": "jsonl:/mail.jsonl", "public": True}


@pytest.mark.parametrize(
    ("router", "method", "message"),
    [
        ("jsonl:/mail.jsonl", "isolated", "jsonl:/mail.jsonl is not known to be public"),
        (ROUTER, "sequential", "one adapter answers for all tasks"),
        (ROUTER, "isolated", "task 'chat' has none"),
    ],
)
def test_a_router_that_could_not_choose_is_refused(file, router, method, message):
    tasks = [dict(task) for task in file()["tasks"]]
    tasks[0]["router"] = router
    with pytest.raises(BadConfig, match=message):
        parse_stream(file(*tasks, method=method))


LORI = {"name": "lori", "form": "linear"}


@pytest.mark.parametrize("merge", ["linear", LORI])
@pytest.mark.parametrize("strategy", ["fedavg", "rolora"])
def test_a_merge_over_one_a_of_tasks_that_each_train_theirs_is_refused(file, merge, strategy):
    method = {"start": "isolated", "strategy": strategy, "merge": merge}
    with pytest.raises(BadConfig, match=r"method\.merge: .* share the row space of A, and here"):
        parse_stream(file(method=method))


@pytest.mark.parametrize("merge", ["linear", LORI])
@pytest.mark.parametrize("regularizer", [{"name": "o-lora", "form": "hard"}, "inflora"])
def test_a_merge_over_one_a_of_tasks_that_each_choose_theirs_is_refused(file, merge, regularizer):
    method = {"start": "isolated", "strategy": "ffa-lora", "merge": merge}
    with pytest.raises(BadConfig, match=r"method\.merge: .* gives each task one of its own"):
        parse_stream(file(method={**method, "regularizers": [regularizer]}))


@pytest.mark.parametrize(
    ("strategy", "merge"), [("ffa-lora", "linear"), ("ffa-lora", LORI), ("fedavg", "svd")]
)
def test_a_merge_goes_with_a_frozen_a_or_does_not_need_one(file, strategy, merge):
    stream = parse_stream(file(method={"start": "isolated", "strategy": strategy, "merge": merge}))
    assert stream.merge is not None


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"labels": "refund"}, "base: labels must be a list of names, got 'refund'"),
        ({"labels": [1, 2]}, "base: labels must be a list of names"),
        ({"clients": 5}, "clients"),
    ],
)
def test_what_is_no_base_of_a_run_is_refused_by_its_place(file, base, message):
    with pytest.raises(BadConfig, match=message):
        parse_stream(file(base={**file()["base"], **base}))


def test_a_base_without_labels_may_say_so(file):
    assert parse_stream(file(base={**file()["base"], "labels": None})) == parse_stream(file())


def test_joint_training_of_a_task_without_data_is_refused(file):
    tasks = [*file()["tasks"], {"name": "calls", "labels": ["x"]}]
    split = {k: v for k, v in file()["base"]["clients"]["simulate"].items() if k != "data"}
    base = {**file()["base"], "clients": {"simulate": split}}
    with pytest.raises(BadConfig, match="needs the clients of all tasks as one"):
        parse_stream(file(*tasks, base=base, method="joint"))


def test_joint_training_of_tasks_that_differ_in_more_than_data_is_refused(file):
    tasks = [dict(task) for task in file()["tasks"]]
    tasks[1]["clients"] = {"names": ["north"]}
    del tasks[1]["data"]
    with pytest.raises(BadConfig, match="needs the clients of all tasks as one"):
        parse_stream(file(*tasks, method="joint"))
