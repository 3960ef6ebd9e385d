"""What the benchmark of utility under privacy makes of its plan; little is trained."""

import json
import threading
from dataclasses import replace

import dp_utility as utility
import pytest
from _quality_bench import Bench
from _quality_plan import Cell as CellOf
from _quality_plan import DataSet, sweep_document
from _quality_report import Measured
from _quality_results import Result, Score, judged

from orchestrator.sweep import Sweep, points
from orchestrator.sweeping import forecast
from orchestrator.workspace import open_workspace


@pytest.fixture
def data(tmp_path):
    """Sixty rows of two labels."""
    path = tmp_path / "sst2.train.jsonl"
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(60)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return DataSet(("no", "yes"), path, path)


def result(cell, seed, method, accuracy):
    return Result(cell, seed, method, Score(30, accuracy, 1, 1), None)


def test_the_plan_is_what_was_published_on_two_sets_in_ten_hours():
    plan = utility.default_plan("cpu")
    assert [m.name for m in plan.methods] == [
        "fedavg",
        "ffa-lora",
        "ffa-lora, orthonormal",
        "fedsvd",
    ]
    assert {(c.data, c.epsilon) for c in plan.cells} == {
        (data, epsilon) for data in ("sst2", "mnli") for epsilon in (1.0, 3.0, 6.0, None)
    }
    assert (plan.clients, plan.cohort, len(plan.seeds), len(utility.RATES)) == (6, 3, 3, 4)
    runs = len(plan.cells) * len(plan.methods) * len(plan.seeds) + 4 * len(plan.methods)
    assert runs == 112


def test_every_run_of_the_plan_can_be_planned_and_a_cell_s_epsilon_is_its_own(
    data, tmp_path, tiny_encoder
):
    plan = replace(utility.default_plan("cpu"), model=str(tiny_encoder), clients=2, cohort=1)
    plan = replace(plan, privacy={**plan.privacy, "accountant": "rdp"})
    for cell in plan.cells[:2]:
        base = plan.base(cell, 1, data)
        privacy = base.get("privacy")
        assert (privacy and privacy["epsilon"]) == cell.epsilon
        document = sweep_document("s", 1, base, [m.values(0.01) for m in plan.methods])
        workspace = open_workspace(tmp_path / cell.name)
        try:
            found = forecast(workspace, "s", points(Sweep.model_validate(document), base))
        finally:
            workspace.close()
        assert len(found.missing) == 4


def test_a_published_ordering_is_judged_by_its_own_cell_alone():
    claim = next(c for c in utility.claims() if "mnli, ε = 6" in c.about and c.worse == "fedavg")
    own, other = CellOf("mnli", 0.5, 6.0), CellOf("mnli", 0.5)
    found = [
        result(cell, seed, method, accuracy)
        for seed in range(3)
        for cell, better in ((own, 0.6 + seed / 1000), (other, 0.1))
        for method, accuracy in (("fedsvd", better), ("fedavg", 0.5))
    ]
    verdict = judged(claim, found, "steps")
    assert (verdict.word, verdict.n) == ("holds", 3)


def test_what_was_published_stands_beside_what_was_found():
    plan = utility.default_plan("cpu")
    found = Measured(plan, (), tuple(result(plan.cells[0], s, "fedsvd", 0.8) for s in range(3)))
    table = utility.beside(found)
    cells = [list(column.cells) for column in table.columns]
    heads = [str(column.header) for column in table.columns]
    row = cells[0].index("fedsvd")
    assert cells[heads.index("sst2, ε = 3")][row] == "80.0 ± 0.0 / 90.5"
    assert cells[heads.index("mnli, ε = 6")][row] == "- / 71.7"


def test_private_and_plain_runs_go_through_and_only_steps_are_compared(
    data, tmp_path, tiny_encoder
):
    quick = utility.quick_plan()
    cells = (CellOf("sst2", None, 8.0), CellOf("sst2", None))
    one = ((replace(quick.methods[1], rates=(0.01,)),),)
    plan = replace(quick, groups=one, cells=cells, clients=2, cohort=1, model=str(tiny_encoder))
    workspace = open_workspace(tmp_path / "home")
    try:
        bench = Bench(replace(plan, max_length=16), workspace, {"sst2": data}, threading.Event())
        bench.run()
        found = bench.measured()
    finally:
        workspace.close()
    assert list(found.missing()) == []
    assert [r.cell.epsilon for r in found.results] == [8.0, None]
    assert found.kinds == ("steps",)
    assert len(workspace.ledger.runs()) == 3
