"""What the benchmark of quality makes of its plan and of its runs' logs; nothing is trained."""

import json
import threading
from dataclasses import replace
from datetime import UTC, datetime

import _quality_bench as bench_of
import federated_quality as quality
import pytest
from _quality_kept import load, save
from _quality_plan import GROUPS, DataSet, Plan, held_back, only, sweep_document, write_sweep
from _quality_plan import Cell as CellOf
from _quality_report import Measured
from _quality_results import (
    CLAIMS,
    Claim,
    Result,
    Score,
    Tuned,
    affordable_rounds,
    curve,
    judged,
    within,
)

from orchestrator.sweep import Sweep, load_sweep, points
from orchestrator.sweeping import forecast
from orchestrator.workspace import open_workspace
from storage.records import Event

CELL = CellOf("sst2", 0.5)
CLAIM = Claim("new", "old", "0000.00000", "somewhere")


@pytest.fixture
def data(tmp_path):
    """Forty rows of two labels."""
    path = tmp_path / "sst2.train.jsonl"
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(40)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return DataSet(("no", "yes"), path, path)


def events(*told):
    moment = datetime(2026, 11, 22, tzinfo=UTC)
    return [Event(n, kind, data, moment, {}) for n, (kind, data) in enumerate(told, 1)]


def asked(round_, *clients):
    return "assigned", {"round": round_, "assigned": list(clients), "bytes": 10 * len(clients)}


def answered(round_, client):
    return "accepted", {"round": round_, "client": client, "bytes": 3}


def scored(round_, accuracy):
    return "evaluated", {"round": round_, "accuracy": accuracy}


def result(seed, method, accuracy, cell=CELL):
    point = Score(10, accuracy, 1, 1)
    return Result(cell, seed, method, point, point)


def pairs(*differences):
    return [
        result(seed, name, 0.5 + more)
        for seed, difference in enumerate(differences)
        for name, more in (("old", 0.0), ("new", difference))
    ]


def test_a_score_knows_what_was_sent_before_it_and_not_after():
    log = events(
        asked(1, "a", "b"),
        answered(1, "a"),
        answered(1, "b"),
        scored(1, 0.5),
        asked(2, "a"),
        answered(2, "a"),
        scored(2, 0.6),
    )
    assert curve(log) == [Score(1, 0.5, 6, 20), Score(2, 0.6, 9, 30)]


def test_a_client_that_is_asked_again_after_an_interruption_counts_once():
    log = events(asked(1, "a", "b"), answered(1, "a"), asked(1, "b"), answered(1, "b"))
    assert curve([*log, *events(scored(1, 0.5))]) == [Score(1, 0.5, 6, 20)]


def test_equal_bytes_are_the_last_score_that_they_pay_for():
    scores = [Score(2, 0.5, 10, 10), Score(4, 0.6, 20, 20), Score(6, 0.7, 30, 30)]
    assert within(scores, 59) == scores[1]
    assert within(scores, 60) == scores[2]
    assert within(scores, 19) is None


def test_what_moves_three_quarters_of_the_bytes_may_go_on_for_a_third_longer():
    assert affordable_rounds(Score(12, 0.5, 30, 60), 120) == 16
    assert affordable_rounds(Score(10, 0.5, 60, 60), 60) == 5


def test_an_ordering_holds_or_is_reversed_only_where_chance_is_left_out():
    def word(*differences):
        return judged(CLAIM, pairs(*differences), "steps").word

    assert word(0.03, 0.032, 0.028) == "holds"
    assert word(-0.03, -0.032, -0.028) == "reversed"
    assert word(0.03, -0.02, 0.01) == "undecided"
    assert word(0.03, 0.03) == "not measured"


def test_an_ordering_is_judged_by_runs_of_the_same_cell_and_seed_alone():
    other = CellOf("mnli", None)
    found = [result(0, "old", 0.5), result(0, "new", 0.6, other), result(1, "new", 0.6)]
    verdict = judged(CLAIM, found, "steps")
    assert (verdict.n, verdict.difference, str(verdict)) == (0, None, "-")


def test_the_margin_is_that_of_students_t():
    verdict = judged(CLAIM, pairs(0.01, 0.02, 0.03), "bytes")
    assert verdict.difference == pytest.approx(0.02)
    assert verdict.margin == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)


def test_a_rate_is_chosen_once_all_have_ended_and_never_one_that_failed():
    assert Tuned("m", {0.1: 0.7, 0.3: None, 0.9: 0.7}).rate == 0.1
    assert Tuned("m", {0.1: 0.7}, missing=(0.3,)).rate is None
    assert Tuned("m", {0.1: None, 0.3: None}).rate is None


def test_rates_are_judged_by_rows_that_are_neither_trained_on_nor_reported(data, tmp_path):
    tuning = held_back(data, tmp_path / "home")
    read = [set(path.read_text().splitlines()) for path in (tuning.train, tuning.test)]
    assert (len(read[0]), len(read[1])) == (30, 10)
    assert not read[0] & read[1]
    assert read[0] | read[1] == set(data.train.read_text().splitlines())


def test_a_sweep_has_the_chosen_runs_and_finds_them_again_among_more(data, tmp_path):
    plan = quality.default_plan("cpu")
    base = plan.base(CELL, 1, data)
    few = [method.values(0.01) for method in GROUPS[0]]
    more = [*few, *(method.values(0.3) for method in GROUPS[2])]

    names = {}
    for chosen in (few, more):
        path = write_sweep(tmp_path, sweep_document("s", 1, base, chosen))
        _, found = load_sweep(path)
        assert sorted(map(str, chosen)) == sorted(str(dict(p.values)) for p in found)
        names[len(chosen)] = {point.name for point in found}
    assert names[len(few)] < names[len(more)]


def test_every_method_of_every_plan_can_be_run(data, tmp_path, tiny_encoder):
    plan = replace(quality.full_plan("cpu"), model=str(tiny_encoder))
    base = plan.base(CellOf("sst2", None), 0, data)
    chosen = [method.values(method.rates[0]) for method in plan.methods]
    document = sweep_document("s", 0, base, chosen)
    workspace = open_workspace(tmp_path / "home")
    try:
        found = forecast(workspace, "s", points(Sweep.model_validate(document), base))
    finally:
        workspace.close()
    assert (len(found.missing), found.unprotected) == (len(plan.methods), ())


def test_claims_are_about_methods_of_the_default_plan():
    names = {method.name for method in quality.default_plan("cpu").methods}
    assert {name for claim in CLAIMS for name in (claim.better, claim.worse)} <= names


def test_what_is_missing_is_named():
    plan = quality.quick_plan()
    tuned = (Tuned("fedavg", {0.01: 0.5, 0.03: 0.4}), Tuned("ffa-lora", {0.01: 0.5}, (0.03,)))
    found = Measured(plan, tuned, (result(0, "fedavg", 0.5, plan.cells[0]),))
    assert list(found.missing()) == [
        "ffa-lora: not tuned yet, without learning rates 0.03",
        "parameter-types, alpha = 0.5: without seeds 0: ffa-lora",
    ]


def test_every_method_is_run_on_the_first_set_and_what_is_not_due_is_not_missing():
    plan = quality.default_plan("cpu")
    runs = {(cell, method.name) for cell, _, methods in plan.stages() for method in methods}
    found = Measured(plan, (), tuple(result(s, m, 0.5, c) for c, m in runs for s in plan.seeds))
    assert list(found.missing()) == []
    assert len(runs) == 12 + 2 * 4 + 3 * 4


def test_which_orderings_hold_is_said_in_a_sentence():
    plan = quality.default_plan("cpu")
    runs = pairs(0.03, 0.032, 0.028)
    named = {"old": "fedavg", "new": "fedsvd"}
    found = Measured(plan, (), tuple(replace(r, method=named[r.method]) for r in runs))
    said = found.sentence("bytes")
    assert said.startswith(
        "published orderings at equal bytes: holds: fedsvd > fedavg. reversed: none. undecided: "
    )
    assert "rolora > ffa-lora" in said.partition("not measured")[2]


@pytest.fixture
def bench(data, tmp_path, tiny_encoder):
    """Return a function that gives the bench of some methods on the tiny encoder, in one home."""
    workspace = open_workspace(tmp_path / "home")
    plan = Plan((), (CELL,), (0,), 6, 1, 1, 4, clients=2, model=str(tiny_encoder), max_length=16)

    def make(*methods):
        groups = tuple((replace(method, rates=(0.01,)),) for method in methods)
        return bench_of.Bench(
            replace(plan, groups=groups), workspace, {"sst2": data}, threading.Event()
        )

    yield make
    workspace.close()


def test_what_moves_less_goes_on_until_it_has_moved_as_much_and_is_scored_there(bench):
    whole = bench(*GROUPS[0][:2])
    whole.run()
    found = whole.measured()

    assert list(found.missing()) == []
    fedavg, ffa = found.results
    assert fedavg.bytes == fedavg.steps
    assert ffa.steps.round == 6 < ffa.bytes.round
    round_ = (ffa.steps.up + ffa.steps.down) / 6
    budget = fedavg.steps.up + fedavg.steps.down
    assert ffa.bytes.up + ffa.bytes.down <= budget < ffa.bytes.up + ffa.bytes.down + 1.05 * round_


def test_the_same_command_again_runs_only_what_is_missing(bench):
    bench(GROUPS[0][0]).run()
    first = bench(GROUPS[0][0]).measured().results
    before = bench().workspace.ledger.runs()

    whole = bench(GROUPS[0][0], GROUPS[1][0])
    assert list(whole.measured().missing()) == [
        "flexlora: not tuned yet, without learning rates 0.01",
        "sst2, alpha = 0.5: without seeds 0: flexlora",
    ]
    whole.run()

    found = whole.measured()
    assert [r.method for r in found.results] == ["fedavg", "flexlora"]
    assert found.results[0] == first[0]
    runs = whole.workspace.ledger.runs()
    assert len(before) == 2
    assert len(runs) == 4
    assert {r.id for r in before} < {r.id for r in runs}


def test_a_run_that_was_stopped_goes_on_where_it_was(bench, monkeypatch):
    stopped = bench(GROUPS[0][0])

    def told(record):
        def seen(kind, data):
            if kind == "committed" and data["round"] == 2:
                stopped.stop.set()

        return seen

    with monkeypatch.context() as patch:
        patch.setattr(bench_of, "told", told)
        stopped.run()
    assert stopped.measured().results == ()

    again = bench(GROUPS[0][0])
    again.run()

    assert [r.steps.round for r in again.measured().results] == [6]
    ledger = again.workspace.ledger
    committed = [
        e.data["round"] for r in ledger.runs() for e in ledger.events(r.id, kinds={"committed"})
    ]
    assert sorted(committed) == [1, 1, 2, 3, 4, 5, 6]


def test_nothing_is_begun_after_it_was_asked_to_stop(bench):
    stopped = bench(GROUPS[0][0])
    stopped.stop.set()
    stopped.run()
    assert stopped.workspace.ledger.runs() == []


def test_what_was_kept_is_not_run_again_in_another_home(bench, tmp_path):
    first = bench(*GROUPS[0][:2])
    first.run()
    measured = first.measured()
    save(tmp_path / "kept.json", measured)
    ran = len(first.workspace.ledger.runs())

    def beside(*methods):
        made = bench(*methods)
        return replace(made, kept=load([tmp_path / "kept.json"], made.plan, measured.setting))

    again = beside(*GROUPS[0][:2])
    again.run()
    assert again.measured() == measured
    assert len(again.workspace.ledger.runs()) == ran

    workspace = open_workspace(tmp_path / "elsewhere")
    elsewhere = replace(beside(*GROUPS[0][:3]), workspace=workspace)
    elsewhere.run()
    found = elsewhere.measured()
    assert list(found.missing()) == []
    assert found.results[:2] == measured.results
    assert len(workspace.ledger.runs()) == 2  # a rate and a run of the third alone
    workspace.close()


def test_what_was_kept_of_another_setting_is_refused_and_what_is_unfinished_is_not_kept(tmp_path):
    plan = quality.quick_plan()
    path = tmp_path / "kept.json"
    begun = replace(result(0, "fedavg", 0.5, plan.cells[0]), bytes=None)
    tuned = (Tuned("fedavg", {0.01: 0.5, 0.03: None}), Tuned("ffa-lora", {0.01: 0.5}, (0.03,)))
    found = Measured(plan, tuned, (begun, result(0, "ffa-lora", 0.5, plan.cells[0])))
    save(path, found)

    kept = load([path, tmp_path / "none.json"], plan, found.setting)
    assert kept.tuned == {"fedavg": tuned[0]}
    assert list(kept.results.values()) == [found.results[1]]

    other = Measured(plan, (tuned[0],), (result(0, "fedavg", 0.6, plan.cells[0]),))
    save(path, other)
    both = load([path], plan, found.setting)
    assert both.tuned.keys() == {"fedavg"}
    assert {r.method: r.steps.accuracy for r in both.results.values()} == {
        "fedavg": 0.6,
        "ffa-lora": 0.5,
    }
    with pytest.raises(SystemExit, match="was measured in another setting"):
        load([path], plan, "elsewhere")


def test_a_part_of_the_plan_is_some_methods_their_reference_and_the_cells_they_are_due_in():
    plan = only(quality.default_plan("cpu"), ["flora", "rolora"])
    due = [[m.name for m in plan.methods_in(cell)] for cell in plan.cells]
    assert due == [["fedavg", "rolora", "flora"]]
    with pytest.raises(SystemExit, match="the plan has no nobody"):
        only(plan, ["nobody"])
