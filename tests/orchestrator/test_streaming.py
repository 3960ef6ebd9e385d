"""Streams as runs: what is done is not done again, and stopping changes nothing."""

import json
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import yaml

from clients.assignment import DataSpec
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.coordinator import Driving, Serving, Stopped, serve
from orchestrator.service import evaluate, open_workspace
from orchestrator.stream import parse_stream
from orchestrator.stream_forks import forked
from orchestrator.stream_report import report
from orchestrator.streaming import (
    ChangedTask,
    UnknownStream,
    advance,
    follow,
    keep,
    recorded,
    run_stream,
    steps,
)
from orchestrator.suite_metrics import by_task
from storage.ledger import ClientRecord

PETS, PARTS = ("cat", "dog"), ("model", "rank")


@pytest.fixture
def stream(tiny_encoder, notes):
    """Return a function that makes a stream of two tasks, two labels each, with changes."""

    def make(**changes):
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
        document = {"name": "notes", "base": base, "tasks": tasks}
        return parse_stream(document | changes)

    return make


@pytest.fixture
def drive(workspace):
    """Return a function that drives a stream here and returns its versions."""

    def run(stream, home=workspace, stop=None, observe=lambda kind, data: None):
        driving = Driving(InlineBackend(), stop=stop or threading.Event())
        return [step.version for step in run_stream(home, stream, driving, lambda r: observe)]

    return run


def test_each_task_is_a_run_that_starts_from_the_version_before(workspace, stream, drive):
    first, second = drive(stream())
    store = workspace.store

    assert store.version("notes:v1").id == first
    assert store.version("notes:v2").id == second
    run = workspace.ledger.run("notes.parts")
    assert (run.config["start"], run.config["start_from"]) == ("continue", first)
    assert run.labels == {"stream": "notes", "task": "parts"}
    begun = workspace.ledger.last_event(run.id, "started").data["version"]
    assert [(p.id, p.kind) for p in store.version(begun).parents] == [(first, "continue")]


def test_a_growing_head_keeps_its_old_rows_bit_for_bit(workspace, stream, drive):
    first, second = (workspace.store.version(v) for v in drive(stream()))
    before, after = (workspace.store.tensors(v.id) for v in (first, second))

    assert first.recipe["model"]["labels"] == list(PETS)
    assert second.recipe["model"]["labels"] == [*PETS, *PARTS]
    assert second.recipe["seen_labels"] == [*PETS, *PARTS]
    for name in ("head.weight", "head.bias"):
        assert after[name].shape[0] == 4
        assert torch.equal(after[name][:2], before[name])
    begun = workspace.store.version(second.parents[0].id)
    assert begun.recipe["added_labels"] == list(PARTS)


def test_the_matrix_has_a_row_before_training_and_one_after_each_task(workspace, stream, drive):
    drive(stream())
    found = report(workspace, "notes")
    free, aware = found.task_free, found.task_aware

    assert (free.tasks, free.after) == (("pets", "parts"), (0, 1, 2))
    assert all(score is not None for row in (*free.rows, *aware.rows) for score in row)
    assert free.at(0, 2) == free.at(1, 2) == 0  # labels that nobody has heard of
    assert aware.at(1, 2) > 0  # told that it is one of two, chance has half of them
    for told, asked in zip(aware.rows, free.rows, strict=True):
        assert all(a >= f for a, f in zip(told, asked, strict=True))
    stored = by_task(workspace.store.version("notes:v2").metrics)
    assert {name.partition("@")[0] for name in stored} == {"pets", "parts"}
    assert all(scores["num_examples"] == 12 for scores in stored.values())


def test_what_was_scored_is_what_an_evaluation_of_the_version_says(workspace, stream, drive):
    made = stream()
    drive(made)
    test = DataSpec(made.tasks[0].test.uri, labels=PETS)
    scored = evaluate(workspace, "notes:v2", test).metrics
    row = report(workspace, "notes")
    assert scored["accuracy"] == row.task_free.at(2, 1)
    assert scored["task_accuracy"] == row.task_aware.at(2, 1)


def test_a_stream_that_is_done_runs_nothing_again(workspace, stream, drive):
    versions, runs = drive(stream()), len(workspace.ledger.runs())
    assert drive(stream()) == versions
    assert len(workspace.ledger.runs()) == runs


@pytest.mark.parametrize("kind", ["round", "committed", "started", "completed"])
def test_a_stream_stopped_anywhere_goes_on_to_the_same_versions(
    workspace, stream, drive, tmp_path, kind
):
    whole = drive(stream())
    home, stop = open_workspace(tmp_path / "other"), threading.Event()
    seen = []

    def observe(event, data):
        seen.append(event)
        if seen.count(kind) == 2:  # in the second task
            stop.set()

    try:
        drive(stream(), home, stop, observe)
    except Stopped:
        assert [step.status for step in steps(home, stream())] == ["completed", "queued"]
    assert stop.is_set()
    assert drive(stream(), home) == whole
    assert report(home, "notes").task_free == report(workspace, "notes").task_free


def test_a_task_that_arrives_is_appended_and_the_others_stay(workspace, stream, drive, notes):
    first, second = drive(stream())
    more = {"name": "pets-again", "data": notes("again", labels=PETS, shift=2)}
    tasks = [*stream().document["tasks"], {**more, "labels": list(PETS)}]

    versions = drive(stream(tasks=tasks))
    assert versions[:2] == [first, second]
    assert workspace.store.version("notes:v3").id == versions[2]
    assert report(workspace, "notes").task_free.after == (0, 1, 2, 3)


def test_a_task_that_was_run_and_changed_is_refused_by_name(workspace, stream, drive):
    drive(stream())
    tasks = [dict(task) for task in stream().document["tasks"]]
    tasks[0]["rounds"] = 2

    with pytest.raises(ChangedTask, match="rounds: 1 was run, 2 is asked for") as e:
        drive(stream(tasks=tasks))
    assert str(e.value).startswith("task 'pets' of stream 'notes' was run otherwise")
    assert "weft stream fork notes FILE --at TASK" in str(e.value)
    assert recorded(workspace, "notes").document == stream().document


def test_a_test_set_may_change_without_a_task_being_run_again(workspace, stream, drive, notes):
    versions = drive(stream())
    before = report(workspace, "notes").task_free
    tasks = [dict(task) for task in stream().document["tasks"]]
    tasks[0]["evaluate"] = notes("longer", size=40, labels=PETS)

    assert drive(stream(tasks=tasks)) == versions
    after = report(workspace, "notes").task_free
    assert [row[1] for row in after.rows] == [row[1] for row in before.rows]
    assert "pets" in str(by_task(workspace.store.version(versions[1]).metrics))


def test_a_fork_goes_on_from_a_task_with_another_method(workspace, stream, drive, notes):
    first, second = drive(stream())
    document = dict(stream().document) | {"name": "other", "method": "stacked"}
    fork = forked(workspace, "notes", document, at="pets")

    versions = drive(fork)
    assert versions[0] == first
    assert versions[1] != second
    assert workspace.store.version(versions[1]).recipe["stack"] == [first]
    assert workspace.store.version("other:v1").id == first
    assert (
        report(workspace, "other").task_free.rows[:2]
        == report(workspace, "notes").task_free.rows[:2]
    )


def test_a_fork_at_a_task_that_is_not_done_is_refused(workspace, stream, drive):
    keep(workspace, stream())
    advance(workspace, stream())
    document = dict(stream().document) | {"name": "other"}
    with pytest.raises(BadConfig, match="has no result of a task 'pets'"):
        forked(workspace, "notes", document, at="pets")


def test_a_coordinator_drives_a_stream_to_its_end(workspace, stream, drive, tmp_path):
    home = open_workspace(tmp_path / "other")
    advance(home, stream())

    def watch():
        return nullcontext(lambda kind, data: None)

    serving = Serving(until_idle=True, after=partial(follow, home))
    assert serve(home, serving, Driving(InlineBackend()), watch) == 2
    assert [step.version for step in steps(home, stream())] == drive(stream())
    assert report(home, "notes").task_free == report(workspace, "notes").task_free


def test_two_who_queue_the_next_task_queue_one_run(workspace, stream):
    assert advance(workspace, stream()).id == advance(workspace, stream()).id
    assert len(workspace.ledger.runs()) == 1


def test_joint_training_is_one_run_on_the_data_of_all_tasks(workspace, stream, drive):
    [version] = drive(stream(name="all", method="joint"))
    found = report(workspace, "all").task_free

    assert found.after == (0, 2)
    run = workspace.ledger.run("all.joint-2")
    assert run.rounds == 2
    assert len(workspace.ledger.plan(run.id)["participants"]) == 2
    updates = workspace.store.version(version).recipe["updates"]
    assert {leaf["num_examples"] for leaf in updates} == {12}


def test_clients_come_with_their_tasks_and_return(workspace, stream, drive, notes):
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
    versions = drive(stream(base=base, tasks=tasks, method="stacked"))
    took_part = [
        [leaf["client"] for leaf in workspace.store.version(version).recipe["updates"]]
        for version in versions
    ]
    assert took_part == [["north", "south"], ["west"], ["north", "west"]]
    assert workspace.store.version(versions[2]).recipe["stack"] == versions[:2]


def test_versions_are_merged_after_each_task_where_the_method_says(workspace, stream, drive):
    method = {"start": "isolated", "merge": "cat"}
    first, second = drive(stream(method=method))
    store = workspace.store
    merged = store.version("notes:v2")

    assert store.version("notes:v1").id == first
    assert {p.id: p.kind for p in merged.parents} == {first: "merge", second: "merge"}
    assert merged.recipe["model"]["labels"] == [*PETS, *PARTS]
    head, learned = (store.tensors(v)["head.weight"] for v in (merged.id, first))
    assert torch.equal(head[:2], learned)
    assert torch.equal(head[2:], store.tensors(second)["head.weight"][2:])
    assert [v.id for v in store.versions(name="notes")] == [merged.id, first]
    drive(stream(method=method))
    assert store.version("notes").id == merged.id


def test_each_task_is_answered_by_its_own_adapter_where_the_task_is_told(workspace, stream, drive):
    drive(stream(method="isolated"))
    found = report(workspace, "notes")
    assert found.task_aware.at(2, 1) == found.task_aware.at(1, 1)
    assert found.task_free.at(2, 1) == 0  # the newest adapter alone has never heard of pets


def test_a_stream_that_there_is_not_is_told(workspace):
    with pytest.raises(UnknownStream, match="no stream is called 'nots'"):
        recorded(workspace, "nots")


def test_a_stream_is_run_extended_and_shown_from_the_command_line(
    ok, read, tmp_path, stream, notes
):
    document = json.loads(json.dumps(stream().document))
    document["tasks"] = document["tasks"][:1]
    file = tmp_path / "stream.yaml"
    file.write_text(yaml.safe_dump(document))
    ok("stream", "run", file)
    task = tmp_path / "task.yaml"
    task.write_text(yaml.safe_dump(dict(stream().document["tasks"][1])))

    assert "forgetting" in ok("stream", "extend", "notes", "--task", task)
    found = read("stream", "show", "notes")
    assert [t["status"] for t in found["tasks"]] == ["completed", "completed"]
    assert len(found["matrices"]["task-free"]["rows"]) == 3
    [line] = read("stream", "list")
    assert (line["stream"], line["done"], line["tasks"]) == ("notes", 2, 2)
    assert "suite/" not in ok("show", "notes")


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


def test_answers_are_scored_and_general_text_is_watched(workspace, instructions, drive):
    drive(instructions)
    found = report(workspace, "talk")

    assert found.task_free.rows[0] == (0, 0)  # random weights have no answer
    assert found.task_free.at(1, 1) == 1
    assert len(found.general) == 3
    assert found.general[2] > found.general[0]  # so much training on one word leaves its mark
    begun = workspace.store.version(found.steps[0].version).metrics
    assert {name.rpartition("/")[2] for name in begun} >= {"rouge_l", "bits_per_byte", "perplexity"}
    assert found.to_json()["general_perplexity"] == list(found.general)
