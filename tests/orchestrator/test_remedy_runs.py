"""What forgot is trained on for a little, on past tasks too, where that may be."""

import json
import shutil
import threading
from contextlib import nullcontext

import pytest

from clients.assignment import DataSpec
from clients.site import Site
from orchestrator import remedies, service
from orchestrator.backends.inline import InlineBackend
from orchestrator.coordinator import Driving, Stopped
from orchestrator.deploying import GateFailed, Intent
from orchestrator.gate_file import parse_gate
from orchestrator.gate_setting import set_gate
from orchestrator.remedies import promote_or_remedy
from orchestrator.remedy_runs import NoReplay, plan_replay
from orchestrator.service import open_workspace
from orchestrator.stream import parse_stream
from orchestrator.streaming import run_stream

PETS, PARTS = ("cat", "dog"), ("model", "rank")
WORDS = ("the", "a", "learns", "weaves", "thread", "adapter", "private", "data", "round")
BOT = ("notes", "production")


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    """The data of two tasks, by name."""
    folder = tmp_path_factory.mktemp("notes")
    for name, labels in (("pets", PETS), ("parts", PARTS)):
        rows = []
        for i in range(12):
            text = [labels[i % 2], WORDS[i % len(WORDS)], WORDS[(i + 1) % len(WORDS)]]
            rows.append({"text": " ".join(text), "label": text[0], "ward": f"w{i // 2 % 2}"})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: f"jsonl:{folder / name}.jsonl" for name in ("pets", "parts")}


@pytest.fixture(scope="module")
def streamed(tiny_encoder, uris, tmp_path_factory):
    """Return a function that returns a home where both tasks were learned, by a method."""

    def make(public, method, rounds):
        base = {
            "model": {"id": str(tiny_encoder), "max_length": 16},
            "strategy": "fedavg",
            "adapter": {"name": "lora", "r": 2, "layers": [0]},
            "optimizer": {"name": "adamw", "lr": 0.05},
            "clients": {"simulate": {"by": "column", "column": "ward", "public": public}},
            "rounds": rounds,
            "steps": 4,
            "batch_size": 4,
            "backend": "inline",
        }
        tasks = [
            {"name": name, "data": uris[name], "labels": list(labels)}
            for name, labels in (("pets", PETS), ("parts", PARTS))
        ]
        stream = parse_stream({"name": "notes", "base": base, "method": method, "tasks": tasks})
        home = tmp_path_factory.mktemp("streamed")
        workspace = open_workspace(home)
        run_stream(workspace, stream, Driving(InlineBackend()), lambda run: _unheard)
        workspace.close()
        return home

    return make


def _unheard(kind, data):
    pass


@pytest.fixture(scope="module")
def learned(streamed):
    """A home with both tasks, of public data."""
    return streamed(True, "sequential", 4)


@pytest.fixture(scope="module")
def rehearsed(streamed):
    """A home with both tasks, of clients that keep examples."""
    return streamed(False, {"regularizers": [{"name": "replay", "size": 99, "batch": 4}]}, 1)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Return a function that opens a copy of a home."""

    def make(home):
        shutil.copytree(home, tmp_path / "home", dirs_exist_ok=True)
        monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
        return open_workspace(tmp_path / "home")

    return make


def loss(workspace, ref, uri):
    return service.evaluate(workspace, ref, DataSpec(uri)).metrics["loss"]


def asking(workspace, uris, at_most, **more):
    """Ask of what is deployed a loss on the first task."""
    asked = {"metrics": {"pets": {"loss": {"at_most": at_most}}}, **more}
    document = {"suite": {"pets": uris["pets"]}, "aliases": {"production": asked}}
    set_gate(workspace, "notes", parse_gate(document), "ada")


def test_what_was_forgotten_is_learned_again_and_promoted(learned, opened, uris, read, ok):
    workspace = opened(learned)
    store = workspace.store
    before = loss(workspace, "notes:v2", uris["pets"])
    assert before > 2 * loss(workspace, "notes:v1", uris["pets"])
    asking(workspace, uris, at_most=0.5 * before)

    asked = ("promote", "notes:v2", "--to", "production", "--name", "notes")
    told = ok(*asked, "--remedy", "--by", "replay")

    made = store.version("notes@production")
    assert made.names == ("notes:v3", "notes.remedy:v1")
    assert loss(workspace, made.id, uris["pets"]) <= 0.5 * before
    run = workspace.ledger.run("notes.remedy")
    assert (run.status, run.rounds, run.version) == ("completed", 1, made.id)
    assert run.config["optimizer"]["options"]["lr"] == 0.05
    behind = store.lineage(made.id)
    begun = {edge.parent: edge.kind for edge in behind.edges}
    assert begun[store.resolve("notes:v2")] == "continue"
    assert made.recipe["task_labels"] == [*PETS, *PARTS]
    (move,) = read("alias", "log", "notes@production")
    (tried,) = move["evidence"]["tried"]
    assert (tried["passed"], tried["version"]) == (True, made.id)
    assert tried["what"].startswith("replay, 1 round on the data of pets, parts (run notes.remedy")
    assert f"trying {tried['what']}" in " ".join(told.split())


def test_a_run_that_did_not_pass_is_kept_and_not_run_again(learned, opened, uris, monkeypatch):
    workspace = opened(learned)
    monkeypatch.setattr(remedies.MERGES, "names", lambda: ("cat",))
    service.promote(workspace, *BOT, "notes:v1")
    asking(workspace, uris, at_most=0.0)
    for _ in range(2):
        with pytest.raises(GateFailed) as refused:
            promote_or_remedy(workspace, BOT, "notes:v2", Intent())
        merged, replayed = refused.value.tried[:-1], refused.value.tried[-1]
        assert {one["what"].split()[0] for one in merged} == {"merge"}
        assert replayed["said"].startswith("fails: metrics: pets loss is")
        assert replayed["version"] == workspace.store.resolve("notes.remedy")
    assert len(workspace.ledger.runs()) == 3
    assert workspace.store.version("notes.remedy").names == ("notes.remedy:v1",)
    assert workspace.store.pointing(*BOT) == workspace.store.resolve("notes:v1")


def test_a_run_that_was_stopped_goes_on(learned, opened, uris):
    workspace = opened(learned)
    stop = threading.Event()
    stop.set()
    asking(workspace, uris, at_most=0.5 * loss(workspace, "notes:v2", uris["pets"]))
    for running, ends in (
        (lambda replay: nullcontext((_unheard, Driving(stop=stop))), pytest.raises(Stopped)),
        (lambda replay: nullcontext((_unheard, Driving())), nullcontext()),
    ):
        with ends:
            promote_or_remedy(workspace, BOT, "notes:v2", Intent(), ("replay",), running)
    (run, *_) = workspace.ledger.runs()
    assert (len(workspace.ledger.runs()), run.status) == (3, "completed")
    assert workspace.store.pointing(*BOT) == run.version


def test_clients_that_kept_examples_rehearse_them(rehearsed, opened, uris):
    workspace = opened(rehearsed)
    newest = workspace.store.resolve("notes:v2")
    replay = plan_replay(workspace, newest, "notes")
    assert (replay.kept, replay.tasks, replay.config.rounds) == (True, ("pets", "parts"), 1)
    assert replay.config.clients.simulate.data == uris["parts"]
    assert replay.seconds > 0
    asking(workspace, uris, at_most=0.0)
    with pytest.raises(GateFailed):
        promote_or_remedy(workspace, BOT, newest, Intent(), ("replay",))
    made = workspace.store.version("notes.remedy")
    for leaf in made.recipe["updates"]:
        parts = Site(workspace.sites).kept_examples(leaf["client"], leaf["digest"])
        (document,) = map(json.loads, parts.values())
        # they were offered 6 examples of each task before, and those of the last once more
        assert document["offered"] == 18
        assert {row["label"] for row in document["kept"]} == {*PETS, *PARTS}


def test_where_clients_forgot_what_they_kept_the_data_are_read(rehearsed, opened, uris):
    workspace = opened(rehearsed)
    for name in ("w0", "w1"):
        assert Site(workspace.sites).forget_examples(name)
    replay = plan_replay(workspace, workspace.store.resolve("notes:v2"), "notes")
    assert not replay.kept
    assert replay.config.clients.simulate.data == "several:" + ";".join(uris.values())


def test_training_is_not_tried_where_it_cannot_help(learned, opened, uris):
    workspace = opened(learned)
    asking(workspace, uris, at_most=0.0, size={"max_rank": 1})
    with pytest.raises(GateFailed) as refused:
        promote_or_remedy(workspace, BOT, "notes:v2", Intent())
    assert [one["said"] for one in refused.value.tried] == [
        "cannot be: the alias points at no version yet",
        "cannot help: training mends no size",
    ]
    assert len(workspace.ledger.runs()) == 2


def test_a_version_without_a_past_task_has_nothing_to_replay(learned, opened):
    workspace = opened(learned)
    with pytest.raises(NoReplay, match=r"notes.pets is the only one here .* no earlier task"):
        plan_replay(workspace, workspace.store.resolve("notes:v1"), "notes")
    made = workspace.store.version("notes:v1")
    alone = workspace.store.commit(
        workspace.store.tensors(made.id), parents={}, recipe={**made.recipe, "kind": "import"}
    )
    with pytest.raises(NoReplay, match="no run here made the version"):
        plan_replay(workspace, alone, "notes")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"privacy": {"epsilon": 8.0}}, "task-1 was trained with differential privacy, and data"),
        ({}, "task-1 was trained by registered clients, whose data are not public"),
    ],
)
def test_data_that_may_not_be_read_again_are_not(workspace, make_plan, grow, changes, reason):
    first = grow("task-1", clients=("a",), private=False)
    second = grow("task-2", {first: "continue"}, clients=("a",), private=False)
    for version, name in ((first, "task-1"), (second, "task-2")):
        plan = make_plan(name=name, **changes)
        config = plan.config.model_dump(mode="json")
        workspace.ledger.create_run(name, name, config, plan.to_json(), rounds=2)
        workspace.ledger.record(name, "completed", {}, status="completed", version=version)
    with pytest.raises(NoReplay, match=reason):
        plan_replay(workspace, second, "task-2")


def test_a_remedy_is_chosen_with_remedy_alone(refused):
    told = refused("promote", "bot:v2", "--to", "production", "--by", "replay")
    assert "--by replay chooses among remedies; give --remedy too" in told
