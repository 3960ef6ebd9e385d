"""Streams as runs: what is done is not done again, and stopping changes nothing."""

import json
import shutil
import threading
from contextlib import nullcontext, suppress

import pytest
import torch
import yaml

from clients.assignment import DataSpec
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.coordinator import Driving, Serving, Stopped, claim, drive, serve
from orchestrator.gate_setting import PrivateData
from orchestrator.service import evaluate, open_workspace
from orchestrator.stream import parse_stream
from orchestrator.stream_forks import forked
from orchestrator.stream_report import report
from orchestrator.streaming import (
    DETACHED,
    ChangedTask,
    Following,
    UnknownStream,
    advance,
    keep,
    recorded,
    run_stream,
    steps,
)
from orchestrator.suite_metrics import by_task
from storage.ledger import ClientRecord, Queueing

PETS, PARTS = ("cat", "dog"), ("model", "rank")


WORDS = ("the", "a", "learns", "weaves", "thread", "adapter", "private", "data", "round")


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """Return a function that writes a labelled jsonl file and returns its URI."""
    folder = tmp_path_factory.mktemp("notes")

    def write(name, size=12, labels=(*PETS, *PARTS), shift=0):
        rows = []
        for i in range(size):
            text = [labels[i % len(labels)], *(WORDS[(i + shift + j) % len(WORDS)] for j in (0, 1))]
            row = {"text": " ".join(text), "label": text[0], "ward": f"w{i % 2}"}
            rows.append(json.dumps(row))
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        return f"jsonl:{folder / name}.jsonl"

    return write


@pytest.fixture(scope="module")
def stream(tiny_encoder, notes):
    """Return a function that makes a stream of two tasks, two labels each, with changes."""
    base = {
        "model": {"id": str(tiny_encoder), "max_length": 16},
        "strategy": "fedavg",
        "adapter": {"name": "lora", "r": 2, "layers": [0]},
        "optimizer": {"name": "adamw", "lr": 0.05},
        "clients": {"simulate": {"by": "column", "column": "ward", "public": True}},
        "rounds": 1,
        "steps": 2,
        "batch_size": 4,
        "backend": "inline",
    }
    tasks = [
        {
            "name": name,
            "data": notes(name, labels=labels),
            "labels": list(labels),
            "evaluate": notes(f"{name}-test", labels=labels, shift=4),
        }
        for name, labels in (("pets", PETS), ("parts", PARTS))
    ]
    return lambda **changes: parse_stream({"name": "notes", "base": base, "tasks": tasks} | changes)


def driven(home, stream, stop=None, observe=lambda kind, data: None):
    """Drive a stream here and return what its tasks ended with."""
    driving = Driving(InlineBackend(), stop=stop or threading.Event())
    return [step.version for step in run_stream(home, stream, driving, lambda run: observe)]


@pytest.fixture(scope="module")
def done(stream, tmp_path_factory):
    """Return a workspace in which the stream is done; nobody may change that."""
    home = open_workspace(tmp_path_factory.mktemp("done"))
    driven(home, stream())
    return home


@pytest.fixture
def versions(done):
    return [done.store.version(f"notes:v{number}").id for number in (1, 2)]


def test_each_task_is_a_run_that_starts_from_the_version_before(done, stream, versions):
    first, second = versions
    store = done.store

    assert [step.result for step in steps(done, stream())] == [first, second]
    run = done.ledger.run("notes.parts")
    assert (run.config["start"], run.config["start_from"]) == ("continue", first)
    assert run.labels == {"stream": "notes", "task": "parts"}
    begun = done.ledger.last_event(run.id, "started").data["version"]
    assert [(p.id, p.kind) for p in store.version(begun).parents] == [(first, "continue")]


@pytest.mark.parametrize("public", [False, True])
def test_a_task_is_not_measured_on_data_of_a_client_that_are_not_public(
    workspace, stream, notes, tmp_path, public
):
    made = stream()
    tested = made.tasks[1].test.uri
    copy = tmp_path / "copy.jsonl"
    shutil.copy(tested.removeprefix("jsonl:"), copy)
    client = ClientRecord("north", f"jsonl:{copy}", "north", num_examples=12, public=public)
    workspace.ledger.add_client(client)
    if public:
        assert advance(workspace, made).labels["task"] == "pets"
        return
    with pytest.raises(PrivateData, match="'parts' has the data of client 'north'"):
        advance(workspace, made)
    assert workspace.ledger.runs() == []


def test_a_growing_head_keeps_its_old_rows_bit_for_bit(done, versions):
    first, second = (done.store.version(v) for v in versions)
    before, after = (done.store.tensors(v.id) for v in (first, second))

    assert first.recipe["model"]["labels"] == list(PETS)
    assert second.recipe["model"]["labels"] == [*PETS, *PARTS]
    assert second.recipe["seen_labels"] == [*PETS, *PARTS]
    for name in ("head.weight", "head.bias"):
        assert after[name].shape[0] == 4
        assert torch.equal(after[name][:2], before[name])
    begun = done.store.version(second.parents[0].id)
    assert begun.recipe["added_labels"] == list(PARTS)


def test_the_matrix_has_a_row_before_training_and_one_after_each_task(done):
    found = report(done, "notes")
    free, aware = found.task_free, found.task_aware

    assert (free.tasks, free.after) == (("pets", "parts"), (0, 1, 2))
    assert all(score is not None for row in (*free.rows, *aware.rows) for score in row)
    assert free.at(0, 2) == free.at(1, 2) == 0  # labels that nobody has heard of
    assert aware.at(1, 2) > 0  # told that it is one of two, chance has half of them
    for told, asked in zip(aware.rows, free.rows, strict=True):
        assert all(a >= f for a, f in zip(told, asked, strict=True))
    stored = by_task(done.store.version("notes:v2").metrics)
    assert {name.partition("@")[0] for name in stored} == {"pets", "parts"}
    assert all(scores["num_examples"] == 12 for scores in stored.values())


def test_what_was_scored_is_what_an_evaluation_of_the_version_says(done, stream):
    test = DataSpec(stream().tasks[0].test.uri, labels=PETS)
    scored = evaluate(done, "notes:v2", test).metrics
    row = report(done, "notes")
    assert scored["accuracy"] == row.task_free.at(2, 1)
    assert scored["task_accuracy"] == row.task_aware.at(2, 1)


def test_a_stream_that_is_done_runs_nothing_again(done, stream, versions):
    runs = len(done.ledger.runs())
    assert driven(done, stream()) == versions
    assert len(done.ledger.runs()) == runs


@pytest.mark.parametrize("kind", ["started", "committed", "completed"])
def test_a_stream_stopped_anywhere_goes_on_to_the_same_versions(
    workspace, done, stream, versions, kind
):
    stop, seen = threading.Event(), []

    def observe(event, data):
        seen.append(event)
        if event == kind:
            stop.set()

    with suppress(Stopped):
        driven(workspace, stream(), stop, observe)
    standing = steps(workspace, stream())[0].status
    assert standing == ("completed" if kind == "completed" else "queued")
    assert driven(workspace, stream()) == versions
    assert report(workspace, "notes").task_free == report(done, "notes").task_free


def test_a_task_that_arrives_is_appended_and_the_others_stay(workspace, stream, notes):
    tasks = stream().document["tasks"]
    [first] = driven(workspace, stream(tasks=tasks[:1]))
    more = {"name": "again", "data": notes("again", labels=PETS, shift=2), "labels": list(PETS)}

    versions = driven(workspace, stream(tasks=[tasks[0], more]))
    assert versions[0] == first
    assert workspace.store.version("notes:v2").id == versions[1]
    assert report(workspace, "notes").task_free.after == (0, 1, 2)


def test_a_task_that_was_run_and_changed_is_refused_by_name(done, stream):
    tasks = [dict(task) for task in stream().document["tasks"]]
    tasks[0]["rounds"] = 2

    with pytest.raises(ChangedTask, match="rounds: 1 was run, 2 is asked for") as error:
        driven(done, stream(tasks=tasks))
    assert str(error.value).startswith("task 'pets' of stream 'notes' was run otherwise")
    assert "weft stream fork notes FILE --at TASK" in str(error.value)
    assert recorded(done, "notes").document == stream().document


def test_a_task_is_the_same_whatever_the_order_of_its_options(workspace, stream):
    options = {"size": 4, "batch": 2}
    for order in (sorted(options), sorted(options, reverse=True)):
        rehearsed = {"name": "replay", **{key: options[key] for key in order}}
        record = advance(workspace, stream(method={"regularizers": [rehearsed]}))
    assert [
        step.record and step.record.id
        for step in steps(workspace, stream(method={"regularizers": [rehearsed]}))
    ] == [record.id, None]


def test_a_fork_goes_on_from_a_task_with_another_method(done, stream, versions):
    document = dict(stream().document) | {"name": "other", "method": "stacked"}
    fork = forked(done, "notes", document, at="pets")

    first, second = driven(done, fork)
    assert first == versions[0]
    assert second != versions[1]
    assert done.store.version(second).recipe["stack"] == [first]
    assert done.store.version("other:v1").id == first
    ours, theirs = (report(done, name).task_free for name in ("other", "notes"))
    assert ours.rows[:2] == theirs.rows[:2]


def test_a_test_set_may_change_without_a_task_being_run_again(workspace, stream, notes):
    tasks = [dict(stream().document["tasks"][0])]
    versions = driven(workspace, stream(tasks=tasks))
    tasks[0]["evaluate"] = notes("longer", size=40, labels=PETS)

    assert driven(workspace, stream(tasks=tasks)) == versions
    scored = by_task(workspace.store.version(versions[0]).metrics)
    assert sorted(one["num_examples"] for one in scored.values()) == [12, 40]


def test_a_fork_at_a_task_that_is_not_done_is_refused(workspace, stream):
    keep(workspace, stream())
    advance(workspace, stream())
    document = dict(stream().document) | {"name": "other"}
    with pytest.raises(BadConfig, match="has no result of a task 'pets'"):
        forked(workspace, "notes", document, at="pets")


def test_a_coordinator_drives_a_stream_to_its_end(workspace, done, stream, versions):
    advance(workspace, stream())

    def watch():
        return nullcontext(lambda kind, data: None)

    streams = Following(workspace)
    serving = Serving(until_idle=True, after=streams.after, idle=streams.idle)
    assert serve(workspace, serving, Driving(InlineBackend()), watch) == 2
    assert [step.version for step in steps(workspace, stream())] == versions
    assert report(workspace, "notes").task_free == report(done, "notes").task_free


def test_a_task_is_followed_though_its_coordinator_died_before_it_queued_the_next(
    workspace, stream, versions
):
    """It waits as the one before did; of a stream that is driven by hand nothing is queued."""
    queueing = Queueing(3, {"gpu": "a100"}, facts=DETACHED)
    first = advance(workspace, stream(), queueing)
    by_hand = advance(workspace, stream(name="other"))
    for record in (first, by_hand):
        drive(workspace, claim(workspace, record), lambda *event: None, Driving(InlineBackend()))
    assert len(workspace.ledger.runs()) == 2

    Following(workspace).idle()

    assert len(workspace.ledger.runs()) == 3
    second = workspace.ledger.run("notes.parts")
    assert (second.priority, second.labels["gpu"], second.status) == (3, "a100", "queued")
    streams = Following(workspace)
    serving = Serving(until_idle=True, after=streams.after, idle=streams.idle)
    serve(workspace, serving, Driving(InlineBackend()), lambda: nullcontext(lambda *event: None))
    assert [step.version for step in steps(workspace, stream())] == versions


def test_a_task_that_failed_is_tried_again_and_a_cancelled_one_begins_anew(
    workspace, stream, versions
):
    first = advance(workspace, stream()).id
    workspace.ledger.record(first, "failed", {}, status="failed", error="out of memory")
    assert advance(workspace, stream()).status == "failed"
    assert advance(workspace, stream(), retry=True).status == "queued"
    workspace.ledger.record(first, "cancelled", {}, status="cancelled")

    one = stream(tasks=stream().document["tasks"][:1])
    assert driven(workspace, one) == versions[:1]
    assert workspace.ledger.run("notes.pets").id != first


def test_two_who_queue_the_next_task_queue_one_run(workspace, stream):
    assert advance(workspace, stream()).id == advance(workspace, stream()).id
    assert len(workspace.ledger.runs()) == 1


def test_joint_training_is_one_run_on_the_data_of_all_tasks(workspace, stream):
    [version] = driven(workspace, stream(name="all", method="joint"))
    found = report(workspace, "all").task_free

    assert found.after == (0, 2)
    run = workspace.ledger.run("all.joint-2")
    assert run.rounds == 2
    assert len(workspace.ledger.plan(run.id)["participants"]) == 2
    updates = workspace.store.version(version).recipe["updates"]
    assert {leaf["num_examples"] for leaf in updates} == {12}


def test_clients_come_with_their_tasks_and_return(workspace, stream, notes):
    for name in ("north", "south", "west"):
        record = ClientRecord(name, notes(name, labels=(*PETS, *PARTS)), name, num_examples=12)
        workspace.ledger.add_client(record)
    base = dict(stream().document["base"]) | {"labels": [*PETS, *PARTS]}
    tasks = [
        {"name": name, "labels": list(labels), "clients": {"names": clients}}
        for name, labels, clients in (
            ("pets", PETS, ["north", "south"]),
            ("parts", PARTS, ["west"]),
            ("pets-again", PETS, ["north", "west"]),
        )
    ]
    versions = driven(workspace, stream(base=base, tasks=tasks, method="stacked"))
    took_part = [
        [leaf["client"] for leaf in workspace.store.version(version).recipe["updates"]]
        for version in versions
    ]
    assert took_part == [["north", "south"], ["west"], ["north", "west"]]
    assert workspace.store.version(versions[2]).recipe["stack"] == versions[:2]


def test_versions_are_merged_after_each_task_where_the_method_says(workspace, stream):
    method = {"start": "isolated", "merge": "cat"}
    first, second = driven(workspace, stream(method=method))
    store = workspace.store
    merged = store.version("notes:v2")

    assert store.version("notes:v1").id == first
    assert {p.id: p.kind for p in merged.parents} == {first: "merge", second: "merge"}
    assert merged.recipe["model"]["labels"] == [*PETS, *PARTS]
    head, learned = (store.tensors(v)["head.weight"] for v in (merged.id, first))
    assert torch.equal(head[:2], learned)
    assert torch.equal(head[2:], store.tensors(second)["head.weight"][2:])
    assert [v.id for v in store.versions(name="notes")] == [merged.id, first]
    found = report(workspace, "notes")  # told the task, its own adapter answers
    assert found.task_aware.at(2, 1) == found.task_aware.at(1, 1)
    assert found.task_aware.at(2, 2) > found.task_aware.at(1, 2)
    driven(workspace, stream(method=method))
    assert store.version("notes").id == merged.id


def test_a_router_chooses_the_adapter_by_public_data(workspace, stream):
    tasks = [
        {**task, "router": {"data": task["data"], "public": True}}
        for task in stream().document["tasks"]
    ]
    made = stream(tasks=tasks, method="isolated")
    versions = driven(workspace, made)
    found = report(workspace, "notes")

    assert found.routed.after == (1, 2)
    assert found.routed.at(1, 1) == found.task_aware.at(1, 1)  # there is one adapter to choose
    assert found.routed.at(1, 2) == 0  # which never heard of the other task
    scores = by_task(workspace.store.version(versions[1]).metrics)
    [right] = [
        s["routing"] for name, s in scores.items() if name.startswith("pets@") and "routing" in s
    ]
    assert right > 0.5  # the tasks differ in their words
    assert found.routed.at(2, 1) <= right
    before = workspace.store.version(versions[1]).metrics
    driven(workspace, made)
    assert workspace.store.version(versions[1]).metrics == before


def test_a_stream_that_there_is_not_is_told(workspace):
    with pytest.raises(UnknownStream, match="no stream is called 'nots'"):
        recorded(workspace, "nots")


def test_a_stream_is_extended_and_shown_from_the_command_line(
    ok, read, workspace, tmp_path, stream
):
    tasks = stream().document["tasks"]
    file, task = tmp_path / "stream.yaml", tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump({**stream().document, "tasks": tasks[:1]}))
    task.write_text(yaml.safe_dump(tasks[1]))

    ok("stream", "run", file)
    assert "forgetting" in ok("stream", "extend", "notes", "--task", task)
    found = read("stream", "show", "notes")
    assert [t["status"] for t in found["tasks"]] == ["completed", "completed"]
    assert len(found["matrices"]["task-free"]["rows"]) == 3
    [line] = read("stream", "list")
    assert (line["stream"], line["done"], line["tasks"]) == ("notes", 2, 2)
    shown = ok("show", "notes")
    assert "suite/" not in shown
    assert "pets: accuracy" in shown


@pytest.fixture
def instructions(tmp_path, tiny_decoder):
    """Return a stream of two instruction tasks on the tiny decoder, and general text."""

    def write(name, rows):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return f"jsonl:{file}"

    tasks = []
    for name, word in (("animals", "cat"), ("parts", "thread")):
        rows = [{"prompt": f"say {word} {n}", "completion": word} for n in range(6)]
        uri = write(name, rows)
        tasks.append({"name": name, "data": uri, "evaluate": {"data": uri, "generate": 8}})
    base = {
        "model": {"id": str(tiny_decoder), "max_length": 32},
        "task": "causal-lm",
        "strategy": "fedavg",
        "adapter": {"name": "lora", "r": 8},
        "optimizer": {"name": "adamw", "lr": 0.05},
        "clients": {"simulate": {"by": "iid", "parts": 1, "public": True}},
        "rounds": 1,
        "steps": 12,
        "batch_size": 6,
        "backend": "inline",
    }
    general = write("general", [{"text": "the dog learns a rank of the model"}])
    document = {"name": "talk", "base": base, "tasks": tasks, "general": general}
    return parse_stream(document | {"metric": "exact_match"})


def test_answers_are_scored_and_general_text_is_watched(workspace, instructions):
    driven(workspace, instructions)
    found = report(workspace, "talk")

    assert found.task_free.rows[0] == (0, 0)  # random weights have no answer
    assert found.task_free.at(1, 1) == 1
    assert len(found.general) == 3
    assert found.general[2] > found.general[0]  # so much training on one word leaves its mark
    begun = workspace.store.version(found.steps[0].version).metrics
    assert {name.rpartition("/")[2] for name in begun} >= {"rouge_l", "bits_per_byte", "perplexity"}
    assert found.to_json()["general_perplexity"] == list(found.general)


def test_a_new_head_learns_the_old_labels_again_from_what_clients_kept(workspace, stream):
    fresh = {"start": "fresh", "regularizers": ["replay"]}
    _, last = driven(workspace, stream(method=fresh))

    result = workspace.store.version(last)
    assert result.recipe["seen_labels"] == [*PETS, *PARTS]
    begun = workspace.store.tensors(result.parents[0].id)["head.weight"]
    moves = (workspace.store.tensors(last)["head.weight"] != begun).any(dim=1)
    assert moves.tolist() == [True] * 4
    alone = stream(name="alone", method="fresh")
    forgotten = workspace.store.version(driven(workspace, alone)[1]).recipe["seen_labels"]
    assert forgotten == list(PARTS)


def routed(stream):
    """Return a stream with an adapter a task, each of whose inputs chooses its own."""
    tasks = [
        {**task, "router": {"data": task["data"], "public": True}}
        for task in stream.document["tasks"]
    ]
    return parse_stream({**stream.document, "tasks": tasks, "method": "isolated"})


@pytest.mark.slow
def test_prompts_and_tagged_texts_choose_their_adapter_too(workspace, instructions, tags):
    for made in (routed(instructions), routed(tags)):
        driven(workspace, made)
        found = report(workspace, made.name)

        assert found.routed.tasks == found.task_free.tasks
        assert found.routed.at(1, 1) == found.task_aware.at(1, 1) > 0  # there is one to choose
        metrics = workspace.store.version(f"{made.name}:v2").metrics
        for number, task in enumerate(made.tasks, 1):
            [right] = [
                value
                for name, value in metrics.items()
                if name.startswith(f"suite/{task.name}@") and name.endswith("/routing")
            ]
            assert right > 0.5  # the tasks differ in their words
            best, chosen = found.task_aware.at(2, number), found.routed.at(2, number)
            assert 0 < chosen <= best
            # who is sent to the other task's adapter gets its word, or no entity of its own
            assert made.metric != "exact_match" or chosen == pytest.approx(right * best)
        assert found.routed.at(2, 2) > found.routed.at(1, 2)


def test_a_loss_has_no_answers_to_be_routed(instructions):
    document = {**instructions.document, "metric": "perplexity"}
    with pytest.raises(BadConfig, match=r"answers have no perplexity.*give metric: exact_match or"):
        routed(parse_stream(document))


@pytest.fixture
def tags(tmp_path, tiny_encoder):
    """Return a stream of two tasks whose words have tags, an entity of its own each."""
    tasks = []
    for name, word, rest in (("pets", "cat", "the dog sings"), ("parts", "rank", "a model weaves")):
        rows = [
            {"tokens": [*rest.split()[: n % 3], word], "tags": ["O"] * (n % 3) + [f"B-{word}"]}
            for n in range(9)
        ]
        file = tmp_path / f"tagged-{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        uri, own = f"jsonl:{file}", ["O", f"B-{word}"]
        tasks.append({"name": name, "data": uri, "labels": own, "evaluate": uri})
    base = {
        "model": {"id": str(tiny_encoder), "max_length": 16},
        "task": "token-classification",
        "strategy": "fedavg",
        "adapter": {"name": "lora", "r": 4},
        "optimizer": {"name": "adamw", "lr": 0.05},
        "clients": {"simulate": {"by": "iid", "parts": 1, "public": True}},
        "rounds": 1,
        "steps": 12,
        "batch_size": 9,
        "backend": "inline",
    }
    return parse_stream({"name": "marks", "base": base, "tasks": tasks})


@pytest.mark.parametrize("name", ["der-plus-plus", "ewc", "lwf", "replay"])
def test_what_a_method_remembers_goes_with_a_growing_head(workspace, stream, name):
    versions = driven(workspace, stream(method={"regularizers": [name]}))
    found = workspace.store.version(versions[1])
    assert found.recipe["model"]["labels"] == [*PETS, *PARTS]
    assert report(workspace, "notes").task_aware.at(2, 1) is not None
    before, after = (workspace.store.tensors(version)["head.weight"] for version in versions)
    assert torch.equal(after[:2], before) == (name in ("ewc", "lwf"))  # others have their examples
