"""Budgets are kept: by the noise before round 1, and by the ledger before every round."""

from dataclasses import replace

import pytest
import torch

from clients.accounting import BudgetSpent, epsilon
from clients.assignment import Clipping, DataSpec, Privacy, Report
from clients.keys import data_key
from orchestrator import spending
from orchestrator.epsilons import epsilon_by
from orchestrator.plan import RoundInputs, plan_round
from orchestrator.sections import PrivacyConfig
from orchestrator.spending import calibrated, reserve, spent_by_run
from storage.ledger import ClientRecord
from strategies.base import Broadcast
from strategies.spends import PrivacySpend

RDP = PrivacyConfig(epsilon=2.0, delta=1e-5, accountant="rdp")
NOISE = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1)


def spend(noise=1.0, rate=0.1, steps=10):
    parameters = {"noise_multiplier": noise, "sample_rate": rate, "steps": float(steps)}
    return PrivacySpend("gaussian", "example", "add-remove", parameters)


def people(plan):
    return {p.name: p for p in plan.participants}


@pytest.fixture
def round_of(make_plan, tensors):
    """Return a function that plans round ``number`` for clients that spend with ``noise``."""

    def make(number=1, noise=NOISE, **changes):
        plan = make_plan(
            noise=noise, steps=10, rounds=5, privacy={"noise_multiplier": 1}, **changes
        )
        inputs = RoundInputs(number, "f" * 64, {}, {}, "/site")
        sent = Broadcast(tensors(number))
        return plan, plan_round(plan, inputs, lambda c: sent, plan.participants)

    return make


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_calibrated_noise_keeps_the_run_within_its_epsilon(accountant):
    config = RDP.model_copy(update={"accountant": accountant})

    privacy = calibrated(config, sample_rate=0.1, steps=50)

    used = epsilon([spend(privacy.noise_multiplier, 0.1, 50)], 1e-5, accountant)
    assert used <= 2.0
    assert used > 1.9  # and no more noise than that needs


def test_every_way_of_clipping_is_calibrated_to_the_same_noise_and_reaches_the_client():
    clipping = {"mode": "quantile", "share": 0.2, "rate": 1.0}
    config = PrivacyConfig.model_validate({"epsilon": 2, "accountant": "rdp", "clipping": clipping})

    found = calibrated(config, sample_rate=0.1, steps=50)

    assert found.clipping == Clipping("quantile", share=0.2, rate=1.0)
    assert replace(found, clipping=Clipping()) == calibrated(RDP, sample_rate=0.1, steps=50)


def test_how_many_records_of_a_unit_a_step_takes_costs_nothing():
    config = PrivacyConfig.model_validate(RDP.model_dump() | {"unit": "person", "per_unit": 4})

    found = calibrated(config, sample_rate=0.1, steps=50)

    assert found.per_unit == 4
    assert replace(found, unit="example", per_unit=1) == calibrated(RDP, sample_rate=0.1, steps=50)


def test_noise_is_calibrated_for_what_clients_tell_besides_their_updates():
    plain = calibrated(RDP, sample_rate=0.1, steps=50)
    config = PrivacyConfig.model_validate({**RDP.model_dump(), "report": {"loss": 4, "steps": 5}})
    telling = calibrated(config, sample_rate=0.1, steps=5 * config.steps_a_round(10))

    assert telling.report == Report(4.0, steps=5)
    assert telling.noise_multiplier > plain.noise_multiplier
    assert epsilon([spend(telling.noise_multiplier, steps=75)], 1e-5, "rdp") <= 2.0


def test_what_a_round_costs_is_on_the_ledger_with_its_report(workspace, round_of):
    plan, assignments = round_of(noise=replace(NOISE, report=Report(4.0, steps=2)))

    reserve(assignments, people(plan), workspace.ledger, lambda k, d: None)

    assert [row.parameters["steps"] for row in workspace.ledger.spends("people-a")] == [12.0]


def test_a_noise_multiplier_that_is_given_is_used_as_it_is():
    config = PrivacyConfig(noise_multiplier=0.7, max_grad_norm=3, insecure_seed=4)

    privacy = calibrated(config, sample_rate=0.2, steps=9)

    assert privacy == Privacy(0.7, 3.0, 0.2, "example", 4)


def test_a_budget_with_history_asks_for_more_noise():
    alone = calibrated(RDP, sample_rate=0.1, steps=50, budget=(2.0, 1e-5))
    later = calibrated(
        RDP, sample_rate=0.1, steps=50, history=[spend(2.0, 0.1, 50)], budget=(2.0, 1e-5)
    )

    assert later.noise_multiplier > alone.noise_multiplier
    both = [spend(2.0, 0.1, 50), spend(later.noise_multiplier, 0.1, 50)]
    assert epsilon(both, 1e-5, "rdp") <= 2.0


def test_a_budget_larger_than_the_run_s_epsilon_changes_nothing():
    assert calibrated(RDP, sample_rate=0.1, steps=50, budget=(50.0, 1e-5)) == calibrated(
        RDP, sample_rate=0.1, steps=50
    )


def test_an_exhausted_budget_is_refused_before_the_run():
    with pytest.raises(BudgetSpent, match=r"of 0\.5"):
        calibrated(
            RDP, sample_rate=0.1, steps=10, history=[spend(0.8, 0.5, 99)], budget=(0.5, 1e-5)
        )


def test_spends_are_on_the_ledger_when_reserve_returns(workspace, round_of):
    plan, assignments = round_of()

    kept = reserve(assignments, people(plan), workspace.ledger, lambda kind, data: None)

    assert kept == assignments
    rows = workspace.ledger.spends_of_run("run-1")
    assert [row.client for row in rows] == ["a", "b", "c"]
    assert [row.population for row in rows] == ["people-a", "people-b", "people-c"]
    assert [row.assignment for row in rows] == [a.digest() for a in assignments]
    assert all(row.parameters == spend().parameters for row in rows)


def test_what_was_spent_is_there_before_anybody_is_told(workspace, round_of):
    plan, assignments = round_of()
    seen = []

    def log(kind, data):
        seen.append((kind, len(workspace.ledger.spends_of_run("run-1"))))

    reserve(assignments, people(plan), workspace.ledger, log)

    assert seen == [("spent", 3), ("assigned", 3)]


def test_a_round_that_is_run_again_spends_once(workspace, round_of):
    plan, assignments = round_of()
    for _ in range(2):
        assert (
            reserve(assignments, people(plan), workspace.ledger, lambda k, d: None) == assignments
        )

    assert len(workspace.ledger.spends_of_run("run-1")) == 3


def test_a_round_that_is_run_again_by_a_site_that_lost_its_keys_spends_again(
    workspace, round_of, tmp_path
):
    def asked(site):
        plan, assignments = round_of()
        moved = [replace(a, site=str(site)) for a in assignments]
        reserve(moved, people(plan), workspace.ledger, lambda k, d: None)
        return len(workspace.ledger.spends("people-a"))

    for name in ("here", "anew"):
        data_key(tmp_path / name)
    assert [asked(tmp_path / name) for name in ("here", "here", "anew", "anew", "here")] == [
        1,
        1,
        2,
        2,
        2,
    ]


def test_an_insecure_seed_s_noise_is_the_same_at_any_site(workspace, round_of, tmp_path):
    for name in ("here", "anew"):
        data_key(tmp_path / name)
        plan, assignments = round_of(noise=replace(NOISE, insecure_seed=7))
        moved = [replace(a, site=str(tmp_path / name)) for a in assignments]
        reserve(moved, people(plan), workspace.ledger, lambda k, d: None)
    assert len(workspace.ledger.spends("people-a")) == 1


def test_the_keys_here_say_nothing_of_a_client_whose_data_lie_at_a_site(
    workspace, round_of, tmp_path
):
    for name in ("here", "anew"):
        data_key(tmp_path / name)
        plan, assignments = round_of()
        away = [
            replace(a, site=str(tmp_path / name), data=DataSpec("site:notes")) for a in assignments
        ]
        reserve(away, people(plan), workspace.ledger, lambda k, d: None)
    assert len(workspace.ledger.spends("people-a")) == 1


def test_another_broadcast_in_the_same_round_spends_again(workspace, round_of, tensors):
    plan, assignments = round_of()
    other = [replace(a, broadcast=Broadcast(tensors(99))) for a in assignments]
    for sent in (assignments, other):
        reserve(sent, people(plan), workspace.ledger, lambda k, d: None)

    assert len(workspace.ledger.spends_of_run("run-1")) == 6


def test_who_would_go_over_its_budget_is_left_out_with_a_sentence(workspace, round_of):
    one = epsilon([spend()], 1e-5)
    record = ClientRecord("b", "jsonl:/b", "people-b", epsilon=one * 1.01, delta=1e-5)
    workspace.ledger.add_client(record)
    events = []

    def log(kind, data):
        events.append((kind, data))

    plan, first = round_of(1)
    _, second = round_of(2)
    assert len(reserve(first, people(plan), workspace.ledger, log)) == 3
    assert [a.client for a in reserve(second, people(plan), workspace.ledger, log)] == ["a", "c"]
    # the first round again, as after a crash: already counted, so not refused now
    assert len(reserve(first, people(plan), workspace.ledger, log)) == 3

    [(_, refused)] = [event for event in events if event[0] == "refused"]
    assert (refused["client"], refused["round"], refused["fault"]) == ("b", 2, False)
    assert refused["reason"].startswith(f"b has spent ε = {one:.2f} of")
    assert "population people-b" in refused["reason"]
    assert len(workspace.ledger.spends("people-b")) == 1


def test_a_round_without_privacy_spends_nothing(workspace, round_of):
    plan, assignments = round_of(noise=None)

    assert reserve(assignments, people(plan), workspace.ledger, lambda k, d: None) == assignments
    assert workspace.ledger.spends_of_run("run-1") == []


def by_population(recipes):
    return list(epsilon_by(recipes, lambda leaf: (leaf["population"],)).values())


def test_what_a_run_spent_is_composed_by_population(workspace, round_of):
    for number in (1, 2):
        plan, assignments = round_of(number)
        reserve(assignments, people(plan), workspace.ledger, lambda k, d: None)

    spent = spent_by_run(plan, workspace.ledger)

    assert list(spent) == ["people-a", "people-b", "people-c"]
    assert spent["people-a"].epsilon == epsilon([spend(), spend()], 1e-5)
    assert str(spent["people-a"]).endswith("(δ = 1e-05, unit example, add-remove)")


def recipe(*leaves, delta=1e-5):
    return {"privacy": {"delta": delta}, "updates": list(leaves)}


def leaf(digest, population="people", noise=1.0, public=False):
    parameters = {"noise_multiplier": noise, "sample_rate": 0.1, "steps": 10.0}
    one = {
        "mechanism": "gaussian",
        "unit": "example",
        "adjacency": "add-remove",
        "parameters": parameters,
    }
    return {"digest": digest, "population": population, "public": public, "spends": [one]}


def test_a_diamond_s_shared_round_counts_once():
    shared, left, right = leaf("1"), leaf("2"), leaf("3")

    [found] = by_population([recipe(shared), recipe(shared, left), recipe(shared, right)])

    assert found.epsilon == epsilon([spend()] * 3, 1e-5)


def test_two_equal_spends_of_different_updates_count_twice():
    [found] = by_population([recipe(leaf("1")), recipe(leaf("2"))])

    assert found.epsilon == epsilon([spend(), spend()], 1e-5)
    assert found.epsilon > epsilon([spend()], 1e-5)


def test_two_populations_are_never_added():
    found = by_population([recipe(leaf("1", "north"), leaf("2", "south", noise=2.0))])

    assert [(e.population, e.epsilon) for e in found] == [
        ("north", epsilon([spend(1.0)], 1e-5)),
        ("south", epsilon([spend(2.0)], 1e-5)),
    ]


def test_a_lineage_is_accounted_at_its_strictest_delta():
    [found] = by_population([recipe(leaf("1"), delta=1e-3), recipe(leaf("2"), delta=1e-6)])

    assert found.delta == 1e-6


def test_a_lineage_without_privacy_has_no_epsilon():
    plain = {"privacy": None, "updates": [leaf("1") | {"spends": []}]}

    assert by_population([plain]) == []


def test_public_data_are_said_to_be_public():
    [found] = by_population([recipe(leaf("1", public=True))])

    assert found.public


def test_clients_of_one_population_share_its_budget_in_one_round(workspace, round_of):
    one = epsilon([spend()], 1e-5)
    record = ClientRecord("b", "jsonl:/b", "shared", epsilon=one * 1.01, delta=1e-5)
    workspace.ledger.add_client(record)
    plan, assignments = round_of()
    known = {name: replace(p, population="shared") for name, p in people(plan).items()}
    logged = []

    kept = reserve(assignments, known, workspace.ledger, lambda k, d: logged.append((k, d)))

    assert [a.client for a in kept] == ["a"]  # the first that fits, and no more
    assert [d["client"] for k, d in logged if k == "refused"] == ["b", "c"]
    assert len(workspace.ledger.spends("shared")) == 1


@pytest.fixture
def low(workspace, round_of):
    """Return a function that reserves rounds in which ``b`` has a budget; what was low."""

    def reserved(budget, *numbers):
        one = epsilon([spend()], 1e-5)
        two, three = (epsilon([spend()] * n, 1e-5) for n in (2, 3))
        limit = {"low at once": one / 0.9, "low at two": two / 0.9, "spent at three": three * 0.99}
        workspace.ledger.add_client(
            ClientRecord("b", "jsonl:/b", "people-b", epsilon=limit[budget], delta=1e-5)
        )
        events = []
        for number in numbers:
            plan, assignments = round_of(number)
            reserve(assignments, people(plan), workspace.ledger, lambda k, d: events.append((k, d)))
        return [data for kind, data in events if kind == "budget low"]

    return reserved


@pytest.mark.parametrize(("budget", "rounds"), [("low at once", 1), ("low at two", 2)])
def test_a_budget_that_gets_low_is_said_in_the_round_that_brings_it_there(low, budget, rounds):
    [facts] = low(budget, *range(1, rounds + 1))

    assert facts["population"] == "people-b"
    assert facts["epsilon"] == epsilon([spend()] * rounds, 1e-5)
    assert facts["epsilon"] == pytest.approx(0.9 * facts["limit"])
    assert facts["delta"] == 1e-5


def test_a_round_that_is_run_again_does_not_say_it_again(low):
    assert len(low("low at once", 1, 1)) == 1


def test_a_budget_that_forbids_a_round_is_low(low):
    found = low("spent at three", 1, 2, 3)

    assert found
    assert found[-1]["epsilon"] == epsilon([spend()] * 2, 1e-5) < found[-1]["limit"]


def test_the_bytes_of_a_broadcast_count_for_every_client_it_goes_to(workspace, round_of):
    plan, assignments = round_of(noise=None)
    seen = []

    reserve(assignments, people(plan), workspace.ledger, lambda kind, data: seen.append(data))

    one = sum(t.numel() * t.element_size() for t in assignments[0].broadcast.tensors.values())
    assert one > 0
    assert [data["bytes"] for data in seen] == [3 * one]


def test_what_lies_beneath_and_memory_are_sent_too(workspace, round_of):
    plan, assignments = round_of(noise=None)
    bare, more = [], []
    loaded = [
        replace(a, underlay={"w": torch.zeros(5)}, memory={"m": torch.zeros(2, dtype=torch.int8)})
        for a in assignments
    ]

    reserve(assignments, people(plan), workspace.ledger, lambda kind, data: bare.append(data))
    reserve(loaded, people(plan), workspace.ledger, lambda kind, data: more.append(data))

    assert more[0]["bytes"] - bare[0]["bytes"] == 3 * (5 * 4 + 2)


def test_what_was_composed_once_is_not_composed_again(monkeypatch):
    recipes, known = [recipe(leaf("1", "north"), leaf("2", "south"))], {}
    first = epsilon_by(recipes, lambda leaf: (leaf["population"],), known)
    monkeypatch.setattr(spending, "epsilon", None)
    again = epsilon_by(recipes, lambda leaf: ("of", leaf["population"]), known)
    assert list(again.values()) == list(first.values())
    assert [key for key, *_ in again] == ["of", "of"]
