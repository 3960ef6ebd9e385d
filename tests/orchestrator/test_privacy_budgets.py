"""Neither a new name nor one row more nor a subset begins a new budget; runs keep within theirs."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from clients.accounting import BudgetSpent, epsilon
from orchestrator.budgets import Budgets, planned_spends, within_budgets
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.plan import RoundInputs, plan_round
from orchestrator.registering import register_client
from orchestrator.relating import relate_again
from orchestrator.spending import reserve
from storage.ledger import ClientRecord
from strategies.base import Broadcast
from strategies.spends import PrivacySpend

DP = {"noise_multiplier": 1.0, "delta": 1e-3, "accountant": "rdp"}
ROWS = [{"text": f"cat note {number} of the ward", "label": "cat"} for number in range(40)]


def spent(rounds, size=40, steps=2, batch=4):
    parameters = {"noise_multiplier": 1.0, "sample_rate": batch / size, "steps": steps * rounds}
    return epsilon([PrivacySpend("gaussian", "example", "add-remove", parameters)], 1e-3)


@pytest.fixture
def register(workspace, tmp_path):
    """Return a function that registers rows as a client of its own population."""

    def add(name, rows, file="", **fields):
        path = tmp_path / f"{file or name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = ClientRecord(name, f"jsonl:{path}", name, num_examples=len(rows), **fields)
        return register_client(workspace, record)

    return add


@pytest.fixture
def plan(workspace, tiny):
    """Return a function that plans a run on some clients."""

    def make(*names, privacy=DP, **changes):
        config = tiny(clients={"names": list(names)}, privacy=privacy, **changes)
        return plan_of(config, workspace.store, workspace.ledger, workspace.sites)

    return make


@pytest.fixture
def spend(workspace, tensors):
    """Return a function that asks a planned run's clients for a round; who may be asked."""

    def asked(plan, number=1, ledger=None):
        inputs = RoundInputs(number, "f" * 64, {}, {}, "/site")
        sent = Broadcast(tensors(number))
        assignments = plan_round(plan, inputs, lambda _: sent, plan.participants)
        people = {p.name: p for p in plan.participants}
        kept = reserve(assignments, people, ledger or workspace.ledger, lambda kind, data: None)
        return [a.client for a in kept]

    return asked


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(lambda rows: rows, id="another name"),
        pytest.param(lambda rows: [*rows, {"text": "one row more", "label": "dog"}], id="one row"),
        pytest.param(lambda rows: rows[17:31], id="subset"),
        pytest.param(
            lambda rows: [{**row, "text": f" {row['text'].upper()} "} for row in rows], id="retyped"
        ),
    ],
)
def test_data_that_come_again_inherit_what_was_spent(register, plan, spend, workspace, again):
    register("ward", ROWS, epsilon=spent(2) * 1.01, delta=1e-3)
    assert spend(plan("ward", rounds=2), 1) == ["ward"]
    assert spend(plan("ward", rounds=1), 2) == ["ward"]

    register("other", again(ROWS))

    with pytest.raises(BudgetSpent, match="population 'ward', with which its own 'other' shares"):
        plan("other", rounds=1)
    assert {row.population for row in workspace.ledger.spends("other")} == {"ward"}


def test_strangers_have_budgets_of_their_own(register, plan, spend):
    register("ward", ROWS, epsilon=spent(1) * 1.01, delta=1e-3)
    register("other", [{"text": "nothing of the kind", "label": "dog"}] * 40)
    spend(plan("ward", rounds=1))

    assert len(plan("other", rounds=9).participants) == 1


def test_a_simulation_of_a_budgeted_data_set_is_limited_too(register, plan, workspace, tiny):
    data = register("ward", ROWS, epsilon=0.01, delta=1e-3).data
    simulate = {"simulate": {"data": data, "parts": 2}}

    config = tiny(clients=simulate, privacy=DP)
    with pytest.raises(
        BudgetSpent, match=r"'ward', with which its own 'ward\.jsonl#part-0' shares"
    ):
        plan_of(config, workspace.store, workspace.ledger, workspace.sites)
    with pytest.raises(BadConfig, match="has a privacy budget"):
        plan_of(tiny(clients=simulate), workspace.store, workspace.ledger, workspace.sites)


def test_a_file_that_changed_after_its_registration_is_looked_at_again(register, plan, workspace):
    register("ward", ROWS, epsilon=0.01, delta=1e-3)
    strangers = [{"text": "nothing of the kind", "label": "dog"}] * 40
    other = register("other", strangers)
    Path(other.data.removeprefix("jsonl:")).write_text(json.dumps(ROWS[3]) + "\n")

    with pytest.raises(BudgetSpent, match="population 'ward'"):
        plan("other")


def test_a_file_that_changes_while_a_run_goes_on_is_stopped_at_its_round(
    register, plan, spend, workspace
):
    register("ward", ROWS, epsilon=0.01, delta=1e-3)
    other = register("other", [{"text": "nothing of the kind", "label": "dog"}] * 40)
    running = plan("other", rounds=3)
    assert spend(running, 1) == ["other"]

    Path(other.data.removeprefix("jsonl:")).write_text(json.dumps(ROWS[3]) + "\n")
    relate_again(running, ("other",), workspace.ledger, workspace.sites)

    assert spend(running, 2) == []


def test_a_run_planned_over_its_budget_is_refused(register, plan):
    register("ward", ROWS, epsilon=spent(3) * 1.01, delta=1e-3)

    assert plan("ward", rounds=3).config.rounds == 3
    with pytest.raises(BudgetSpent) as refused:
        plan("ward", rounds=4)

    assert str(refused.value) == (
        f"ward: its population 'ward' has spent ε = 0.00 of {spent(3) * 1.01:g} (δ = 0.001), and "
        f"this run would bring it to {spent(4):.2f}. There is room for 3 rounds: plan as many, or "
        "give the run more noise, raise the budget (weft privacy budget), or leave it out"
    )


def test_what_clients_tell_counts_against_their_budget_when_a_run_is_planned(register, plan):
    register("ward", ROWS, epsilon=spent(3) * 1.01, delta=1e-3)
    telling = DP | {"report": {"loss": 4.0, "steps": 2}}  # as many as a round has of training

    assert plan("ward", rounds=1, privacy=telling)
    with pytest.raises(BudgetSpent, match="There is room for 1 rounds"):
        plan("ward", rounds=2, privacy=telling)


def test_two_clients_that_share_records_spend_together(register, plan):
    register("ward", ROWS, epsilon=spent(3) * 1.01, delta=1e-3)
    register("twin", ROWS)

    assert plan("ward", rounds=3)
    with pytest.raises(BudgetSpent, match="There is room for 1 rounds"):
        plan("ward", "twin", rounds=3)


def test_two_runs_that_race_for_a_budget_cannot_both_have_it(register, plan, spend, workspace):
    register("ward", ROWS, epsilon=spent(1) * 1.01, delta=1e-3)
    register("twin", ROWS[:20] + [{"text": f"twin {i}", "label": "dog"} for i in range(20)])
    runs = [replace(plan(name, rounds=1), run=f"run-{name}") for name in ("ward", "twin")]

    with ThreadPoolExecutor(2) as pool:
        asked = list(pool.map(spend, runs))

    assert sorted(map(len, asked)) == [0, 1]
    assert len(workspace.ledger.spends("ward")) == 1


def test_a_policy_that_shortens_plans_as_many_rounds_as_fit(register, plan, spend, workspace):
    register("ward", ROWS, epsilon=spent(3) * 1.01, delta=1e-3)
    workspace.ledger.set_budget("ward", spent(3) * 1.01, 1e-3, "shorten")

    shortened = plan("ward", rounds=9)

    assert shortened.config.rounds == 3
    noise = shortened.participants[0].privacy.noise_multiplier
    assert noise == 1.0
    assert [len(spend(shortened, number)) for number in (1, 2, 3, 4)] == [1, 1, 1, 0]
    with pytest.raises(BudgetSpent, match="has spent"):
        plan("ward", rounds=9)


def test_a_policy_that_shortens_does_not_drown_the_run_in_noise(register, plan, workspace):
    register("ward", ROWS, epsilon=0.5, delta=1e-3)
    config = {"epsilon": 4, "delta": 1e-3, "accountant": "rdp"}
    drowned = plan("ward", rounds=9, privacy=config)
    workspace.ledger.set_budget("ward", 3.0, 1e-3, "shorten")
    shortened = plan("ward", rounds=9, privacy=config)

    assert drowned.config.rounds == 9
    assert 1 <= shortened.config.rounds < 9
    noise = [p.participants[0].privacy.noise_multiplier for p in (drowned, shortened)]
    assert noise[1] < noise[0]


def test_others_go_on_where_one_client_s_rounds_are_shortened(register, plan, workspace):
    register("ward", ROWS, epsilon=spent(1) * 1.01, delta=1e-3)
    register("other", [{"text": f"else {i}", "label": "dog"} for i in range(40)])
    workspace.ledger.set_budget("ward", spent(1) * 1.01, 1e-3, "shorten")

    assert plan("ward", "other", rounds=4).config.rounds == 4


def test_a_policy_that_asks_is_answered_in_the_run_s_file(register, plan, workspace):
    register("ward", ROWS, epsilon=spent(3) * 1.01, delta=1e-3)
    workspace.ledger.set_budget("ward", spent(3) * 1.01, 1e-3, "ask")

    for answer in ({}, {"over_budget": "refuse"}):
        with pytest.raises(BudgetSpent, match="ward: its population"):
            plan("ward", rounds=9, privacy=DP | answer)
    with pytest.raises(BudgetSpent, match=r"set privacy\.over_budget: shorten, and its clients"):
        plan("ward", rounds=9)
    assert plan("ward", rounds=9, privacy=DP | {"over_budget": "shorten"}).config.rounds == 3


def test_a_run_without_privacy_on_related_data_needs_a_reason(register, plan):
    register("ward", ROWS, epsilon=2.0, delta=1e-3)
    register("copy", ROWS[:5])

    with pytest.raises(BadConfig, match="'ward', with which its own 'copy' shares records, has"):
        plan("copy", privacy=None)

    accepted = plan("copy", privacy=None, accept_unbounded="the board agreed")
    assert accepted.participants[0].privacy is None


def test_a_reason_goes_with_no_privacy_alone(plan):
    with pytest.raises(BadConfig, match="accept_unbounded: it is for a run without privacy"):
        plan("a", accept_unbounded="why not")


def test_a_delta_above_one_over_the_size_is_no_budget(register, workspace):
    with pytest.raises(ValueError, match=r"delta must be below 1/40, one over the number of exam"):
        register("ward", ROWS, epsilon=1.0, delta=1 / 40)
    register("ward", ROWS)
    with pytest.raises(ValueError, match=r"delta must be below 1/40.*got 0\.5"):
        workspace.ledger.set_budget("ward", 1.0, 0.5)


def test_what_was_spent_per_person_is_not_added_to_what_was_per_example(
    register, plan, spend, workspace
):
    register("ward", ROWS, epsilon=9.0, delta=1e-3)
    spend(plan("ward"))
    [row] = workspace.ledger.spends("ward")
    workspace.ledger.record_spend(replace(row, event="e", unit="patient_id"))

    with pytest.raises(BudgetSpent, match="cannot be added"):
        plan("ward")


def test_budgets_that_are_not_touched_cost_nothing(make_plan, workspace, monkeypatch):
    many = [
        ClientRecord(f"c{i}", f"jsonl:/{i}", f"p{i}", epsilon=1.0, delta=1e-5) for i in range(50)
    ]
    workspace.ledger.add_clients(many)
    budgets = Budgets(workspace.ledger)
    monkeypatch.setattr(workspace.ledger, "spends", None)

    plan = make_plan(clients=("x", "y"))
    assert within_budgets(plan, budgets) is plan
    assert planned_spends(plan) == {}
    assert budgets.on("people-x") == []


PER_PATIENT = DP | {"unit": "patient"}


def of_patients(words="coughs"):
    return [{"text": f"{words} {i}", "label": "cat", "patient": f"p{i % 20}"} for i in range(60)]


def test_a_run_per_person_counts_samples_and_names_persons(register, plan, spend, workspace):
    register("ward", of_patients())

    made = plan("ward", privacy=PER_PATIENT)

    [who] = made.participants
    assert who.num_examples == 20
    assert (who.privacy.sample_rate, who.privacy.unit) == (4 / 20, "patient")
    assert who.data.unit == "patient"
    spend(made)
    assert workspace.ledger.spends("ward")[0].unit == "patient"
    with pytest.raises(BadConfig, match=r"is not below 1/20"):
        plan("ward", privacy=PER_PATIENT | {"delta": 0.05})


def test_other_notes_of_the_same_persons_share_their_budget(register, plan, spend):
    register("ward", of_patients(), epsilon=0.01, delta=1e-3)
    register("clinic", of_patients("sleeps"))

    assert plan("clinic")  # per example they are strangers
    with pytest.raises(BudgetSpent, match="'ward', with which its own 'clinic' shares"):
        plan("clinic", privacy=PER_PATIENT)


def test_a_unit_that_is_no_column_is_refused_when_the_run_is_planned(register, plan):
    register("ward", of_patients())

    with pytest.raises(BadConfig, match=r"privacy\.unit: ward: .*no field 'person' that says whos"):
        plan("ward", privacy=DP | {"unit": "person"})
