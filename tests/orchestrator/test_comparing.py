"""Runs beside each other: means and spreads over seeds, and what differs but the seed."""

import csv
import io
import json
from dataclasses import replace

import pytest

from orchestrator.comparing import Measured, compare, compared, flat
from orchestrator.config import BadConfig, parse_config
from orchestrator.sweep import Sweep, points
from orchestrator.sweeping import forecast, queue
from storage.ledger import Queueing


def run(number, lr="0.1", status="completed", **figures):
    costs = {"bytes up": 10.0, "bytes down": 20.0, "rounds": 2.0}
    return Measured(
        f"id-{number}", f"r{number}", status, {"optimizer.lr": lr}, {**figures, **costs}
    )


def test_runs_that_differ_in_their_seed_are_one_line():
    found = compared([run(1, accuracy=0.5), run(2, accuracy=0.7), run(3, lr="0.2", accuracy=0.4)])

    assert found.keys == ("optimizer.lr",)
    assert [(line.setting["optimizer.lr"], len(line.runs)) for line in found.lines] == [
        ("0.1", 2),
        ("0.2", 1),
    ]
    first = found.lines[0].figures["accuracy"]
    assert (first.n, first.mean) == (2, pytest.approx(0.6))
    assert first.spread == pytest.approx(0.02**0.5)  # of a sample: ((0.1² + 0.1²) / 1) ** 0.5
    assert found.lines[1].figures["accuracy"].spread is None


def test_a_table_says_of_how_many_runs_a_figure_is_and_what_is_missing():
    found = compared([run(1, accuracy=0.5), run(2, accuracy=0.7), run(3, status="failed")])

    row = dict(zip(found.header(), next(found.rows()), strict=True))
    assert row["n"] == "3"
    assert row["accuracy"] == "0.6 ± 0.1414 (n = 2)"
    assert row["bytes up"] == "10 ± 0"
    assert found.notes == ("no accuracy: r3 (failed)", "1 of 3 runs are not completed")


def test_a_setting_without_a_figure_has_a_dash_and_a_null():
    found = compared([run(1, accuracy=0.5), run(2, lr="0.2", status="queued")])

    assert list(found.rows())[1][2] == "-"
    assert found.to_json()["lines"][1]["figures"]["accuracy"] is None


def test_only_the_metrics_that_are_asked_for_are_columns():
    runs = [run(1, accuracy=0.5, loss=1.0)]

    assert compared(runs, ["loss"]).columns[0] == "loss"
    assert "accuracy" not in compared(runs, ["loss"]).columns
    with pytest.raises(BadConfig, match=r"no run has the metric 'f1' \(accuracy, loss\)"):
        compared(runs, ["f1"])


def test_epsilon_is_a_column_where_a_run_has_one_and_says_what_it_is():
    spent = replace(run(1, epsilon=2.5), guarantee="δ = 1e-05, unit example, add-remove")
    found = compared([spent, run(2, lr="0.2")])

    assert "epsilon" not in compared([run(1)]).columns
    assert found.notes[0].endswith("populations, δ = 1e-05, unit example, add-remove")
    assert found.notes[1] == "no epsilon: r2 (completed)"


def test_csv_has_unrounded_means_spreads_and_numbers():
    found = compared([run(1, accuracy=1 / 3), run(2, accuracy=2 / 3), run(3, lr="a,b")])

    rows = list(csv.DictReader(io.StringIO(found.to_csv())))

    assert float(rows[0]["accuracy mean"]) == 0.5
    assert float(rows[0]["accuracy spread"]) == pytest.approx(1 / 18**0.5, rel=1e-15)
    assert (rows[1]["optimizer.lr"], rows[1]["accuracy n"]) == ("a,b", "0")


def test_latex_is_escaped_and_its_lines_are_whole():
    found = compared([run(1, lr="a_b & 5%", macro_f1=0.5), run(2, lr="c", macro_f1=0.7)])

    text = found.to_latex()

    assert text.splitlines()[:2] == [r"\begin{tabular}{lrrrrrrr}", r"\toprule"]
    assert r"a\_b \& 5\% & 1 & 0.5" in text
    assert r"macro\_f1" in text
    assert all(line.count(" & ") == 7 for line in text.splitlines() if line.endswith(r"\\"))


def test_a_setting_is_told_by_the_keys_that_set_it(document):
    first = flat(parse_config(document(strategy={"name": "fedsvd", "every": 3})))
    same = flat(parse_config(document(strategy="fedsvd", adapter={"name": "lora", "r": 8})))

    assert (first["strategy"], first["strategy.every"]) == ("fedsvd", "3")
    assert not {"strategy.every", "adapter.r", "name", "seed", "privacy"} & set(same)
    assert (same["adapter"], same["rounds"], same["labels"]) == (
        "lora",
        "2",
        "cat + dog + model + rank",
    )


def test_the_runs_of_a_sweep_are_compared_by_what_its_grid_chose(
    ok, read, run_yaml, tmp_path, notes
):
    run_yaml(rounds=1, evaluate={"data": notes("test")}, strategy="ffa-lora")
    file = tmp_path / "sweep.yaml"
    file.write_text("name: ranks\nbase: run.yaml\nseeds: 2\ngrid: {adapter.r: [1, 2]}\n")
    ok("sweep", file, "--run")

    found = read("runs", "compare", "--sweep", "ranks")

    assert [line["setting"] for line in found["lines"]] == [{"adapter.r": "1"}, {"adapter.r": "2"}]
    assert [len(line["runs"]) for line in found["lines"]] == [2, 2]
    one, two = (line["figures"] for line in found["lines"])
    assert one["accuracy"]["n"] == 2
    assert 0 < one["bytes up"]["mean"] < two["bytes up"]["mean"]
    head = 4 * 32 + 4
    assert (
        2 * (one["trained parameters"]["mean"] - head) == two["trained parameters"]["mean"] - head
    )
    assert found["notes"] == []
    log = [
        json.loads(line)["data"]
        for line in ok("runs", "log", found["lines"][0]["runs"][0], "--json").splitlines()
    ]
    sent = sum(facts["bytes"] for facts in log if "assigned" in facts)
    assert one["bytes down"]["mean"] == sent
    assert "\\toprule" in ok("runs", "compare", "--sweep", "ranks", "--latex")


def test_what_is_nowhere_cannot_be_compared(refused):
    assert refused("runs", "compare") == "give runs, or --sweep NAME"
    assert "no run is of a sweep called 'rates'" in refused("runs", "compare", "--sweep", "rates")


def test_runs_that_wait_have_no_results_and_are_named(home, document, tiny_encoder):
    base = document(model={"id": str(tiny_encoder), "max_length": 16}, steps=1)
    chosen = points(Sweep(name="rates", base={}, seeds=2), base)
    queue(home, forecast(home, "rates", chosen), Queueing())

    found = compare(home, sweep="rates")

    assert "2 of 2 runs are not completed" in found.notes
    assert found.lines[0].figures["rounds"].mean == 0
    assert "seconds" not in found.lines[0].figures
