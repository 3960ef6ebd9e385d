"""What the benchmark of continual learning makes of its plan and of what its streams found."""

import json
import threading
from dataclasses import replace

import _continual_bench as bench_of
import continual
import pytest
from _continual_bench import Bench, Streams
from _continual_data import Part, task_data
from _continual_perplexity import METHODS as OF_LM
from _continual_perplexity import Perplexities, Size, _document, json_perplexities
from _continual_plan import CONTROLS, DOMAINS, METHODS, Cell, Method, Plan
from _continual_plan import Part as Piece
from _continual_report import Measured, draw
from _continual_results import (
    AWARE,
    FREE,
    Found,
    Tuned,
    keep,
    keep_all,
    load,
    load_all,
    tuning_score,
)

from orchestrator.stream import parse_stream
from orchestrator.workspace import open_workspace

CELL = Cell("two", "two small tasks", (("pets",), ("parts",)), steps=1, max_length=16)
LAYER = {"name": "lora", "r": 2, "layers": [0]}


def part(name, *labels, rows=10):
    """A part of so many rows of each label, which share nothing."""
    kept = {
        split: tuple(
            {"text": f"{label} {split} {n}", "label": f"{name}: {label}"}
            for n in range(rows)
            for label in labels
        )
        for split in ("train", "test")
    }
    return Part(name, tuple(f"{name}: {label}" for label in labels), kept)


PARTS = {one.name: one for one in (part("pets", "cat", "dog"), part("parts", "model", "rank"))}
SEQUENTIAL = Method("sequential", "", {"start": "continue", "adapter": LAYER}, (0.05,))
JOINT = replace(SEQUENTIAL, name="joint", how={"start": "joint", "adapter": LAYER})


def found(average, forgetting=0.0, told=0.9):
    aware = {"average": told, "forgetting": forgetting / 2}
    scores = {FREE: {"average": average, "forgetting": forgetting}, AWARE: aware}
    return Found(scores, cpu_s=100.0)


def plan_of(*methods, seeds=(0,)):
    return Plan((Piece(CELL, methods, seeds),), replace(CELL, name="tune"))


def measured(plan, **scores):
    tuned = tuple(Tuned(m, dict.fromkeys(m.choices, 0.5)) for m in plan.methods)
    named = {("two", 0, name.replace("_", "-")): one for name, one in scores.items()}
    return Measured(plan, tuned, named, 100.0)


@pytest.fixture
def bench(tmp_path, tiny_encoder):
    """Return a function that gives the bench of some methods on the tiny encoder, in one home."""
    workspace = open_workspace(tmp_path / "home")

    def make(*methods, retry=False):
        plan = replace(plan_of(*methods), batch_size=4, model=str(tiny_encoder))
        plan = replace(plan, compute_dtype="float32")
        return Bench(plan, Streams(workspace, threading.Event(), retry), PARTS)

    yield make
    workspace.close()


def test_every_method_of_the_plan_makes_a_stream_that_is_accepted(tmp_path):
    plan = continual.full_plan("cpu")
    tasks = [task_data([one], tmp_path, tuning=False) for one in PARTS.values()]
    streams = {}
    for method in plan.methods:
        for cell in plan.cells:
            document = plan.document(cell, 2, method, method.choices[-1], tasks)
            assert len(document["name"]) <= 31
            streams[document["name"]] = method
        parse_stream(document)
    assert len(streams) == len(plan.methods) * len(plan.cells)


def test_every_method_has_as_many_tries_and_trains_as_many_numbers():
    width, layers = 384, 12  # query and value of six layers
    for method in (*CONTROLS, *METHODS):
        adapter = method.how["adapter"]
        cores = adapter["name"] in ("lora-sb", "curlora")
        halves = 1 if "ffa-lora" in str(method.how) or "lori" in str(method.how) else 2
        each = adapter["r"] ** 2 if cores else adapter["r"] * width * halves
        assert len(method.choices) == 4, method.name
        assert each * layers == pytest.approx(73_728, rel=0.01), method.name


def test_the_default_plan_begins_with_every_method_on_ten_tasks_and_has_all_in_the_end():
    plan = continual.default_plan("cpu")
    streams = list(plan.streams())
    first = streams[: len(plan.methods)]
    assert {method.name for _, _, method in first} == {m.name for m in (*CONTROLS, *METHODS)}
    assert {(cell.name, seed) for cell, seed, _ in first} == {("c10", 0)}
    ten = {(seed, method.name) for cell, seed, method in streams if cell.name == "c10"}
    assert len(ten) == 3 * len(plan.methods)
    assert len(streams) == len({(c.name, s, m.name) for c, s, m in streams})


def test_a_seed_decides_the_order_of_the_tasks_and_the_first_keeps_it():
    assert continual.TEN.order(0) == tuple((name,) for name in DOMAINS)
    assert continual.TEN.order(1) != continual.TEN.order(2)
    assert sorted(continual.TEN.order(1)) == sorted(continual.TEN.order(0))
    assert continual.TEXT[0].order(1) == continual.TEXT[0].tasks


def test_rates_are_judged_by_rows_that_are_neither_trained_on_nor_reported(tmp_path):
    told, tuned = (task_data([PARTS["pets"]], tmp_path, tuning) for tuning in (False, True))
    fit, held, train, test = (
        set(path.read_text().splitlines())
        for path in (tuned.train, tuned.test, told.train, told.test)
    )
    assert fit | held == train
    assert (len(fit), len(held)) == (16, 4)
    assert not held & (fit | test)
    assert sorted({json.loads(row)["label"] for row in held}) == list(told.labels)


def test_a_task_of_two_parts_has_the_labels_and_rows_of_both(tmp_path):
    both = task_data(list(PARTS.values()), tmp_path, tuning=False)
    assert both.name == "pets-parts"
    assert both.labels == (*PARTS["pets"].labels, *PARTS["parts"].labels)
    assert len(both.train.read_text().splitlines()) == 40


def test_a_choice_is_made_once_all_have_ended_and_never_of_what_failed():
    method = Method("m", "", {}, (0.1, 0.3), (1.0, 2.0))
    one, two, three, four = method.choices
    assert (one, four) == ((0.1, 1.0), (0.3, 2.0))
    assert Tuned(method, {one: 0.5, two: None, three: 0.7, four: 0.7}).choice == three
    assert Tuned(method, {one: 0.5}, (two, three, four)).choice is None
    assert tuning_score(Found(failed="no directions left")) is None
    assert tuning_score(found(0.5, told=0.9)) == pytest.approx(0.7)


def test_what_was_found_is_read_as_it_was_kept(tmp_path):
    one = replace(found(0.5), general=(4.0, 4.5), memory=3)
    keep(tmp_path / "found" / "a.json", one)
    assert load(tmp_path / "found" / "a.json") == one
    assert load(tmp_path / "found" / "b.json") is None


def test_what_was_kept_of_other_homes_is_not_driven_again(bench, tmp_path):
    done, failed = found(0.5), Found(failed="refused")
    keep_all(tmp_path / "kept.json", {"done": done, "failed": failed})
    kept = load_all(tmp_path / "kept.json")
    assert kept == {"done": done, "failed": failed}
    assert load_all(None) == load_all(tmp_path / "none.json") == {}

    made = bench(SEQUENTIAL)
    ((cell, seed, method),) = made.plan.streams()
    name = made._document(cell, seed, method, method.choices[0])["name"]
    streams = replace(made.streams, kept={name: done})
    keep(made.streams.workspace.home / "found" / "here.json", found(0.4))
    keep(made.streams.workspace.home / "found" / "begun.json", Found(cpu_s=3.0))
    again = replace(made, streams=streams)
    again.run()
    assert again.measured().found == {("two", 0, "sequential"): done}
    assert streams.all_known().keys() > {name, "here"}
    assert "begun" not in streams.all_known()


def test_the_goals_are_held_against_the_best_method_that_is_no_control():
    plan = plan_of(*CONTROLS, *METHODS[:2])
    best, told, least = measured(
        plan,
        sequential=found(0.4, 0.6, 0.85),
        joint=found(0.9, told=0.95),
        isolated=found(0.9, 0.0, 0.94),
        o_lora_hard=found(0.6, 0.12, 0.90),
        replay=found(0.7, 0.24, 0.92),
    ).goals()
    assert (best.value, best.setting) == (pytest.approx(0.92 / 0.95), "replay")
    assert (least.value, least.setting) == (pytest.approx(0.2), "o-lora-hard")
    assert (best.verdict, least.verdict) == ("met", "met")
    assert (told.value, told.name.partition("task ")[2]) == (0.2, "told, of sequential")


def test_what_is_missing_is_named_with_why_and_about_how_long_it_takes():
    plan = plan_of(*CONTROLS, seeds=(0, 1))
    some = measured(plan, sequential=found(0.4, 0.6), joint=Found(failed="no room"))
    assert list(some.missing()) == [
        "two small tasks: without seed 0 (no room): joint",
        "two small tasks: without seed 0: isolated",
        "two small tasks: without seed 1: sequential, joint, isolated",
    ]
    assert some.left_s() == pytest.approx(500.0)


def test_the_same_command_again_runs_only_what_is_missing(bench):
    bench(SEQUENTIAL).run()
    first = bench(SEQUENTIAL).measured()
    before = bench(SEQUENTIAL).streams.workspace.ledger.runs()
    assert list(first.missing()) == []
    assert len(before) == 4

    whole = bench(SEQUENTIAL, JOINT)
    assert list(whole.measured().missing()) == [
        "joint: not tuned yet, without 0.05",
        "two small tasks: without seed 0: joint",
    ]
    whole.run()

    again = whole.measured()
    assert again.found["two", 0, "sequential"] == first.found["two", 0, "sequential"]
    runs = whole.streams.workspace.ledger.runs()
    assert len(runs) == 6
    assert {run.id for run in before} < {run.id for run in runs}
    one = again.found["two", 0, "joint"]
    assert one.done
    assert 0 <= one.scores[AWARE]["average"] <= 1
    assert one.sent > 4 * one.adapter  # a head goes with it


def test_a_stream_that_was_stopped_goes_on_where_it_was(bench, monkeypatch):
    stopped = bench(SEQUENTIAL)

    def told(record):
        def seen(kind, data):
            if kind == "committed" and data["round"] == 1:
                stopped.streams.stop.set()

        return seen

    with monkeypatch.context() as patch:
        patch.setattr(bench_of, "told", told)
        stopped.run()
    assert stopped.measured().found == {}

    bench(SEQUENTIAL).run()
    ledger = stopped.streams.workspace.ledger
    rounds = [
        (run.id, event.data["round"])
        for run in ledger.runs()
        for event in ledger.events(run.id, kinds={"committed"})
    ]
    assert len(rounds) == len(set(rounds)) == 8
    assert list(bench(SEQUENTIAL).measured().missing()) == []


def test_a_stream_that_is_refused_is_named_and_left_alone_unless_told_to_retry(bench):
    adrift = replace(
        SEQUENTIAL, how={"adapter": LAYER, "strategy": "fedsvd", "regularizers": ["l2-sp"]}
    )
    first = bench(adrift)
    first.run()
    [path] = (first.streams.workspace.home / "found").iterdir()
    kept = load(path)
    assert "l2-sp" in kept.failed
    assert first.measured().tuned[0].choice is None

    keep(path, replace(kept, failed="as before"))
    bench(adrift).run()
    assert load(path).failed == "as before"
    bench(adrift, retry=True).run()
    assert load(path).failed == kept.failed


def test_the_plot_has_a_panel_a_sequence_and_follows_from_what_was_found(tmp_path):
    pytest.importorskip("matplotlib")
    some = measured(plan_of(*CONTROLS), sequential=found(0.4, 0.6), isolated=found(0.9))
    for name in ("a.svg", "b.svg"):
        draw(some, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "two small tasks" in text
    assert "joint" not in text


def told(loss, perplexity=9.0):
    return replace(
        found(0.0, 0.0),
        scores={FREE: {"average": loss, "learning_accuracy": loss - 0.1}},
        general=(8.0, perplexity),
    )


def test_a_rate_for_a_language_model_is_that_of_the_lowest_loss_on_held_back_rows(capsys):
    lora, size = OF_LM[0], Size(methods=OF_LM[:1])
    tuned = {
        (lora.name, choice, 100): told(loss)
        for choice, loss in zip(lora.choices, (4.0, 3.5, 3.0, 3.2), strict=True)
    }
    reported = {(lora.name, choice, 0): told(5.0, 12.0) for choice in lora.choices}
    whole = Perplexities(size, tuned | reported)
    assert whole.best(lora) == lora.choices[2]
    assert list(whole.missing()) == []
    json_perplexities(whole)
    figure = json.loads(capsys.readouterr().out)
    assert (figure["value"], figure["setting"][:13]) == (12.0, "before: 8.000")

    few = {key: one for key, one in tuned.items() if key[1] != lora.choices[3]}
    some = Perplexities(size, few)
    assert some.best(lora) is None
    assert "lora at 0.03, seed 100" in list(some.missing())


def test_every_method_for_a_language_model_makes_a_stream_that_is_accepted(tmp_path, tiny_decoder):
    files = {
        task: dict.fromkeys(("train", "test", "held"), tmp_path / f"{task}.jsonl")
        for task in ("shakespeare_speakers", "agnews", "amazon5")
    }
    for method in OF_LM:
        asked = (method, method.choices[-1])
        document = _document(tiny_decoder, Size(), asked, 100, (files, tmp_path / "s.jsonl"))
        assert parse_stream(document).lower_is_better
