"""``weft privacy``: what was spent, what a run would spend, and what a board is told."""

import json
import re

import pytest

from clients.accounting import epsilon
from orchestrator.privacy_report import privacy_report, written
from orchestrator.service import open_workspace
from orchestrator.statements import statements
from storage.ledger import ClientRecord, SpendRow
from strategies.spends import PrivacySpend

PARAMETERS = {"noise_multiplier": 2.0, "sample_rate": 0.1, "steps": 10.0}
CANARIES = ("zebrafinch", "okapi-8831", "quokka-secret")


def of(count, delta=1e-3):
    return epsilon([PrivacySpend("gaussian", "example", "add-remove", PARAMETERS)] * count, delta)


def spend(event, population="ward", run="r1", **changes):
    facts = ("a", run, int(event[-1]), "d", "gaussian", "example", "add-remove", PARAMETERS)
    row = SpendRow(event, population, *facts)
    for name, value in changes.items():
        object.__setattr__(row, name, value)
    return row


@pytest.fixture
def spent(workspace):
    """A workspace in which `ward` has spent two rounds, and `copy`, which shares records, one."""
    ledger = workspace.ledger
    record = ClientRecord("a", "jsonl:/a", "ward", num_examples=100, epsilon=9.0, delta=1e-3)
    ledger.add_client(record)
    for row in (spend("e1"), spend("e2"), spend("e3", "copy", "r2")):
        ledger.record_spend(row)
    ledger.relations.add({"ward": {"copy"}})
    return workspace


def test_a_statement_says_what_is_spent_and_left_and_by_which_run(spent):
    [ward] = statements(spent, ["a"])

    assert ward.population == "ward"
    assert ward.clients == ("a",)
    assert ward.related == ("copy",)
    assert [e.epsilon for e in ward.spent] == [of(3)]
    assert ward.left == pytest.approx(9.0 - of(3))
    assert [(run.run, run.rounds, run.populations) for run in ward.runs] == [
        ("r1", 2, ("ward",)),
        ("r2", 1, ("copy",)),
    ]
    assert [run.spent[0].epsilon for run in ward.runs] == [of(2), of(1)]


def test_different_units_are_stated_apart(spent):
    spent.ledger.record_spend(spend("e4", unit="patient_id"))

    [ward] = statements(spent, ["ward"])

    assert [(e.unit, e.epsilon) for e in ward.spent] == [("example", of(3)), ("patient_id", of(1))]
    assert "unit patient_id" in str(ward.spent[1])


def test_what_runs_that_go_on_may_spend_is_planned(spent, make_plan):
    from dataclasses import replace

    from clients.assignment import Privacy

    plan = make_plan(
        clients=("a",),
        noise=Privacy(2.0, 1.0, 0.1),
        steps=10,
        rounds=5,
        privacy={"noise_multiplier": 2.0, "delta": 1e-3},
    )
    people = tuple(replace(p, population="ward") for p in plan.participants)
    plan = replace(plan, run="r1", participants=people)
    spent.ledger.create_run("r1", "task-1", {}, plan.to_json(), rounds=5)

    [ward] = statements(spent, ["ward"])

    assert [e.epsilon for e in ward.spent] == [of(3)]
    assert [e.epsilon for e in ward.planned] == [of(5 + 1)]  # all of r1, and what r2 has spent


def test_the_command_line_shows_all_populations_by_page(ok, read, refused, tmp_path):
    ledger = open_workspace(tmp_path / "home").ledger
    for name in ("a", "b", "c"):
        ledger.add_client(ClientRecord(name, f"jsonl:/{name}", name, num_examples=100))
    ledger.record_spend(spend("e1", "b"))
    ledger.unprotected.add("r9", {"b"}, "the board agreed", "ada")

    assert [one["population"] for one in read("privacy", "status")] == ["a", "b", "c"]
    assert [
        one["population"] for one in read("privacy", "status", "--limit", 1, "--after", "a")
    ] == ["b"]
    said = ok("privacy", "status", "b")
    assert f"spent    ε = {of(1, 1e-5):.2f} (δ = 1e-05, unit example, add-remove)" in said
    assert (
        "run r9: without DP, no ε bounds what it tells (accepted by ada: the board agreed)" in said
    )
    assert "no population or client is called 'd'" in refused("privacy", "status", "d")


def test_a_budget_and_its_policy_are_set(ok, read, refused, tmp_path):
    ledger = open_workspace(tmp_path / "home").ledger
    ledger.add_client(ClientRecord("a", "jsonl:/a", "ward", num_examples=100))

    said = ok("privacy", "budget", "ward", "--epsilon", 4, "--delta", 1e-3, "--policy", "shorten")

    assert said == "ward: budget ε 4 (δ 0.001), policy shorten\n"
    [ward] = read("privacy", "status")
    assert ward["budget"] == {"epsilon": 4.0, "delta": 0.001, "policy": "shorten"}
    assert ward["left"] == 4.0
    wrong = ("privacy", "budget", "ward", "--epsilon", 4, "--delta")
    assert "below 1/100, one over the number of examples" in refused(*wrong, 0.01)
    assert "refuse, shorten, ask, got 'beg'" in refused(*wrong, 1e-3, "--policy", "beg")


def test_what_a_version_inherited_is_shown(grow, weft, ok, read, tmp_path):
    grow("bot", clients=("a",))

    [row] = read("privacy", "status", "--version", "bot")

    assert row["population"] == "people-a"
    assert row["unit"] == "example"
    assert f"people-a: ε = {row['epsilon']:.2f}" in ok("privacy", "status", "--version", "bot")


def test_a_report_names_what_is_promised_and_what_is_not(grow, workspace, tmp_path):
    grow("bot", clients=("a",))
    report = privacy_report(workspace, "bot")
    files = written(report, tmp_path / "out")

    assert [path.suffix for path in files] == [".md", ".html"]
    text = files[0].read_text()
    assert "All data that are not public were trained on with differential privacy" in text
    assert re.search(
        r"\| people\\-a \| \d\.\d{3} \| 1e\\-05 \| example \| add\\-remove \| no", text
    )
    assert "the update of each single client, and not only their sum" in text
    assert "No audit of this version is on record" in text
    assert json.loads(json.dumps(report.to_json()))["inherited"][0]["population"] == "people-a"


def test_a_report_says_what_was_trained_without_dp_and_why(grow, workspace, tmp_path):
    grow("bot", clients=("a",), private=False, unbounded="the <i>board</i> agreed")
    grow("merged", {"bot:v1": "merge"})
    report = privacy_report(workspace, "merged")

    assert list(report.unbounded.values()) == ["the <i>board</i> agreed"]
    for path in written(report, tmp_path):
        text = path.read_text()
        assert "Nothing is promised to the people whose data" in text
        assert "&lt;i&gt;board&lt;/i&gt; agreed" in text


def test_an_audit_s_result_and_an_insecure_seed_are_in_the_report(grow, workspace, tmp_path):
    insecure = {"delta": 1e-5, "max_grad_norm": 0.5, "insecure_seed": 3}
    grow("bot", clients=("a",), privacy=insecure, metrics={"audit/epsilon": 1.25})
    report = privacy_report(workspace, "bot")

    text = written(report, tmp_path)[0].read_text()
    assert "whose noise anybody can compute" in text
    assert "audit/epsilon: 1.25" in text


def test_no_text_of_a_record_is_in_anything_that_a_private_run_leaves(ok, weft, run_yaml, tmp_path):
    """Everything below the home, what is printed and exported: but for the data file itself."""
    text, ward, broken = CANARIES
    rows = [{"text": f"{text} cat {i}", "label": "cat", "ward": ward} for i in range(40)]
    data = tmp_path / "data" / "ward.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [ok("clients", "add", "a", "--data", f"jsonl:{data}", "--epsilon", 9, "--delta", 1e-3)]
    privacy = {"noise_multiplier": 2.0, "delta": 1e-3, "accountant": "rdp"}
    path = run_yaml(clients={"names": ["a"]}, privacy=privacy, rounds=1)
    log = tmp_path / "home" / "log.jsonl"

    said += [*weft("run", path, "--log-format", "json", "--log-file", log)[1:]]
    with data.open("a") as file:  # a record that no run can use, and whose error says nothing of it
        file.write(json.dumps({"text": 7, "label": broken * 9, "ward": ward}) + "\n")
    code, *failed = weft("run", path, "--set", "name=task-2")
    assert code != 0
    said += failed
    said += [ok("privacy", "report", "task-1", "--to", tmp_path / "home" / "report")]
    said += [ok("export", "task-1", tmp_path / "home" / "exported"), ok("lineage", "task-1")]

    artefacts = [p for p in (tmp_path / "home").rglob("*") if p.is_file()]
    kinds = {p.suffix for p in artefacts}
    assert {".db", ".md", ".html", ".jsonl", ".safetensors"} <= kinds
    held = b"".join(p.read_bytes() for p in artefacts) + "".join(said).encode()
    assert len(held) > 100_000
    for canary in CANARIES:
        assert canary.encode() not in held
