"""Client-level DP: each client is hidden in a noised sum, and its spend is written first."""

import hashlib
import json
import math
import stat
from dataclasses import replace
from functools import partial

import pytest
import torch

from clients.accounting import BudgetSpent, epsilon
from clients.assignment import Privacy
from clients.noise import insecure_key
from clients.site import Site
from clients.sources import BadRecord
from clients.wire import pack
from orchestrator import service
from orchestrator.acceptance import refusal
from orchestrator.backends.base import failure
from orchestrator.budgets import Budgets, central_terms, planned_spends, within_budgets
from orchestrator.central import Central, KeyLost
from orchestrator.config import BadConfig, parse_config
from orchestrator.epsilons import spent_by_population
from orchestrator.plan import Plan, RoundInputs, plan_round
from orchestrator.privacy_report import privacy_report
from orchestrator.provenance import lineage
from orchestrator.refusals import refuse_senseless
from orchestrator.retention import COORDINATOR, coordinator_keys
from orchestrator.retraining import NoiseSecret
from orchestrator.service import open_workspace
from orchestrator.spending import calibrated, reserve
from orchestrator.upkeep import _without_keys
from storage.ledger import ClientRecord
from strategies.base import Broadcast, Update
from strategies.spends import ClientLevel, PrivacySpend

FOUR = ("a", "b", "c", "d")
HIDDEN = {"level": "client", "noise_multiplier": 2.0, "clip": 0.5, "delta": 1e-3}
FIXED = {**HIDDEN, "insecure_seed": 7}
CALIBRATED = {
    "level": "client",
    "epsilon": 3.0,
    "delta": 1e-3,
    "clip": 1.0,
    "accountant": "rdp",
}
NOISELESS = {**FIXED, "noise_multiplier": 1e-12}


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def backend(imagined):
    """Clients that send tensors and nothing else."""

    class Honest(type(imagined())):
        def answer(self, asked):
            update = super().answer(asked)
            if asked.action == "train" and isinstance(update, Update):
                update = replace(update, num_examples=1, fingerprint="")
            return update

    return lambda tensors, **options: Honest(tensors, **options)


@pytest.fixture
def planned(make_plan):
    """Return a function that plans a run with client-level DP in a workspace."""

    def make(workspace, privacy=FIXED, clients=FOUR, **changes):
        plan = make_plan(clients, privacy=privacy, **{"strategy": "ffa-lora", **changes})
        return replace(plan, central=central_terms(plan, Budgets(workspace.ledger)))

    return make


@pytest.fixture
def federation(tmp_path, planned, backend, tensors, run_in):
    """Return a function that makes a run in a home of its own, or one to go on with it."""

    def make(home="home", first=None, observe=lambda kind, data: None, **changes):
        used = backend(first or tensors(), **changes.pop("backend_", {}))
        plan = partial(planned, **changes)
        return run_in(open_workspace(tmp_path / home), plan, used, observe)

    return make


def leaves(run, version):
    return run.store.version(version).recipe["updates"]


def start_of(run, version):
    [parent] = [p.id for p in run.store.version(version).parents]
    return run.store.tensors(parent)


def moved(run, version, name="q.lora_B.weight"):
    return run.store.tensors(version)[name].double() - start_of(run, version)[name].double()


def clipped_sum(run, version, clients, name="q.lora_B.weight", clip=0.5):
    """What the clients' changes sum up to, by hand: each asked again, shortened by its norm."""
    start, total = start_of(run, version), 0.0
    people = [p for p in run.plan.participants if p.name in clients]
    inputs = RoundInputs(1, "base", {}, {}, "/site")
    sent = Broadcast(start, trainable=r".*\.lora_B\..*|head\..*")
    for asked in plan_round(run.plan, inputs, lambda c: sent, people):
        trained = run.backend.answer(asked).tensors
        changes = {n: t.double() - start[n].double() for n, t in trained.items()}
        norm = math.sqrt(sum(float(t.square().sum()) for t in changes.values()))
        total += changes[name] * min(1.0, clip / norm)
    return total


# --- the mechanism in a run -------------------------------------------------------------------


def test_a_round_moves_by_the_clipped_sum_over_the_expected_number_and_noise(federation, tensors):
    big = tensors(layers=()) | {
        "q.lora_A.weight": torch.randn(2, 4, generator=torch.Generator().manual_seed(1)),
        "q.lora_B.weight": torch.zeros(5000, 2),
        "q.scaling": torch.tensor(1.0),
    }
    run = federation(first=big, rounds=1)
    version = run.run()

    noise = moved(run, version) - clipped_sum(run, version, FOUR) / 4
    # 10,000 draws: their variance is within 6 % of its expectation, at 4 standard deviations
    assert float(noise.square().mean()) == pytest.approx((2.0 * 0.5 / 4) ** 2, rel=0.06)
    assert run.store.version(version).metrics["noise_std"] == 0.25


@pytest.mark.parametrize(
    ("rounds", "clients", "who"),
    [
        ({"quorum": 2}, {"fails": {"b": 9}}, "acd"),  # dropped out
        ({"cohort": {"size": 3, "over_provision": 0.34}}, {"delays": {("c", 1): 9}}, "abd"),
    ],
)
def test_the_sum_is_divided_by_the_expected_number_whoever_answers(
    federation, rounds, clients, who
):
    expected = 3 if "cohort" in rounds else 4
    run = federation(privacy=NOISELESS, rounds=1, retries=0, backend_=clients, **rounds)
    version = run.run()

    assert [leaf["client"] for leaf in leaves(run, version)] == list(who)
    torch.testing.assert_close(
        moved(run, version), clipped_sum(run, version, who) / expected, atol=1e-6, rtol=0
    )


def test_what_the_inner_strategy_does_with_a_mean_it_does_with_the_noised_one(federation):
    """FedAvgM without momentum and with a learning rate of 2 moves twice as far."""
    inner = {"name": "fedavgm", "inner": "ffa-lora", "learning_rate": 2.0, "momentum": 0.0}
    run = federation(privacy=NOISELESS, rounds=1, strategy=inner)
    version = run.run()

    for name in ("q.lora_B.weight", "head.weight"):
        twice = 2 * clipped_sum(run, version, FOUR, name) / 4
        torch.testing.assert_close(moved(run, version, name), twice, atol=1e-6, rtol=0)


# --- what it cost -----------------------------------------------------------------------------


def test_the_epsilon_of_a_version_is_the_accountant_s_of_what_each_client_spent(federation):
    run = federation(rounds=3)
    version = run.run()

    rows = run.ledger.spends_of_run("run-1")
    spend = PrivacySpend(
        "gaussian", "client", "zero-out", {"noise_multiplier": 2.0, "sample_rate": 1.0, "steps": 1}
    )
    found = lineage(open_workspace(run.home), version).epsilons
    assert len(rows) == 12
    assert {(r.unit, r.adjacency) for r in rows} == {("client", "zero-out")}
    assert [e.epsilon for e in found] == [epsilon([spend] * 3, 1e-3)] * 4
    assert str(found[0]).endswith("(δ = 0.001, unit client, zero-out)")
    # and three Gaussian sums are one with noise 2 / sqrt(3), of which the exact curve is known
    assert delta_of(found[0].epsilon, math.sqrt(3) / 2) <= 1e-3
    assert delta_of(found[0].epsilon * 0.97, math.sqrt(3) / 2) > 1e-3


def delta_of(eps, mu):
    """The exact δ of a Gaussian mechanism with sensitivity over noise ``mu`` (1805.06530)."""

    def phi(x):
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)


def test_what_a_round_costs_is_on_the_ledger_before_its_version_is_there(federation):
    seen = []
    run = federation(rounds=2)
    commit = run.store.commit

    def watched(*args, recipe, **kwargs):
        if recipe["kind"] == "round":
            spent = {(r.client, r.round) for r in run.ledger.spends_of_run("run-1")}
            seen.append(spent >= {(leaf["client"], recipe["round"]) for leaf in recipe["updates"]})
        return commit(*args, recipe=recipe, **kwargs)

    run.store.commit = watched
    run.run()

    assert seen == [True, True]


@pytest.mark.parametrize("privacy", [FIXED, HIDDEN])
@pytest.mark.parametrize("after", [True, False])
def test_a_crash_between_noise_and_commit_releases_the_same_noise_and_spends_once(
    federation, privacy, after
):
    run = federation(privacy=privacy, rounds=2)
    commit, made = run.store.commit, []

    def dies(tensors, **kwargs):
        if kwargs["recipe"].get("round") == 2:
            facts = {k: v for k, v in kwargs.items() if k != "metrics"}
            made.append(run.store.identify(tensors, **facts))
            if after:
                commit(tensors, **kwargs)
            raise Killed
        return commit(tensors, **kwargs)

    run.store.commit = dies
    with pytest.raises(Killed):
        run.run()
    again = federation()

    assert again.run() == made[0]
    assert len(again.ledger.spends_of_run("run-1")) == 8


def test_a_run_that_was_interrupted_ends_at_the_same_version(federation):
    whole = federation("whole", rounds=2).run()
    kinds = []

    def dying(kind, data):
        kinds.append(kind)
        if len(kinds) == number:
            raise Killed

    for number in (8, 11, 13):  # while updates come in, when the round is closed, and aggregated
        home = f"home-{number}"
        kinds.clear()
        with pytest.raises(Killed):
            federation(home, observe=dying, rounds=2).run()
        assert federation(home).run() == whole


def test_other_updates_get_other_noise(planned, workspace, tensors):
    plan = planned(workspace)
    sent = Broadcast(tensors())
    inputs = RoundInputs(1, "base", {}, {}, "/site")
    [asked, *_] = plan_round(plan, inputs, lambda c: sent, plan.participants)
    central = Central(plan.central, "run-1", workspace.home, 7)

    class Leaf:
        round = 1

        def __init__(self, digest):
            self.leaf = {"client": "a", "digest": digest}

    one, same, other, later = (
        central.mean([], [Leaf(digest)], replace(asked, round=round_)).update.tensors["head.bias"]
        for digest, round_ in (("11", 1), ("11", 1), ("22", 1), ("11", 2))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, later)


def test_a_clip_that_moves_is_in_the_state_so_that_a_resumed_run_has_it_and_costs_the_same(
    federation,
):
    moving = {**FIXED, "clip": 4.0, "clip_quantile": 0.5}
    clips = []
    whole = federation("whole", privacy=moving, rounds=3)
    answer = whole.backend.answer

    def noted(asked):
        if asked.client == "a":
            clips.append(asked.central.clip)
        return answer(asked)

    whole.backend.answer = noted
    version = whole.run()

    kinds = []

    def dies(kind, data):
        kinds.append(kind)
        if kinds.count("closed") == 2:
            raise Killed

    with pytest.raises(Killed):
        federation("again", privacy=moving, rounds=3, observe=dies).run()
    assert federation("again").run() == version
    assert clips[0] == 4.0
    assert len(set(clips)) == 3
    told = whole.store.version(version).metrics
    last = whole.store.auxiliary(version)["central/clip"]
    assert told["clip"] == clips[2]
    assert float(last) == pytest.approx(
        clips[2] * math.exp(-0.2 * (told["share_within_clip"] - 0.5))
    )
    fixed = {r.parameters["noise_multiplier"] for r in whole.ledger.spends_of_run("run-1")}
    assert fixed == {2.0}


# --- what nobody else learns ------------------------------------------------------------------


def test_neither_log_nor_lineage_tells_counts_losses_or_digests_of_updates(federation):
    digests = []
    run = federation(rounds=1)
    answer = run.backend.answer

    def noted(asked):
        update = answer(asked)
        if asked.action == "train":
            digests.append(hashlib.sha256(pack(update)).hexdigest())
        return update

    run.backend.answer = noted
    version = run.run()

    told = json.dumps(
        [
            run.store.version(version).recipe,
            [e.data for e in run.ledger.events("run-1")],
            run.store.version(version).metrics,
        ]
    )
    assert len(digests) == 4
    assert not [digest for digest in digests if digest in told]
    assert {(leaf["num_examples"], leaf["fingerprint"]) for leaf in leaves(run, version)} == {
        (1, "")
    }
    assert set(run.store.version(version).metrics) == {"noise_std"}
    kept = [p for p in run.home.rglob("*") if p.is_file() and "round-" in str(p)]
    assert kept == []


def test_an_update_that_says_more_than_its_tensors_is_refused(planned, workspace, tensors):
    plan = planned(workspace)
    inputs = RoundInputs(1, "base", {}, {}, "/site")
    sent = Broadcast(tensors(), trainable=r".*\.lora_B\..*")
    [asked, *_] = plan_round(plan, inputs, lambda c: sent, plan.participants)
    trained = {"q.lora_B.weight": sent.tensors["q.lora_B.weight"]}
    update = Update("a", 1, "base", trained, 1)

    assert refusal(update, asked) is None
    for more in ({"num_examples": 7}, {"metrics": {"loss": 1.0}}, {"fingerprint": "ab"}):
        assert "says nothing but its tensors" in str(refusal(replace(update, **more), asked))


def test_what_is_wrong_with_a_record_stays_at_the_client(planned, workspace, tensors):
    plan = planned(workspace)
    inputs = RoundInputs(1, "base", {}, {}, "/site")
    [asked, *_] = plan_round(plan, inputs, lambda c: Broadcast(tensors()), plan.participants)

    assert "aspirin" not in failure(asked, BadRecord("row 3: 'aspirin' is no label")).reason
    assert "aspirin" in failure(replace(asked, central=None), BadRecord("'aspirin'")).reason


def test_the_key_is_its_owner_s_alone_and_gone_when_the_run_is_closed(federation):
    keys = []

    def look(kind, data):
        if kind == "closed":
            keys.extend(coordinator_keys(run.home).rglob("key"))
            assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600
            assert stat.S_IMODE(coordinator_keys(run.home).stat().st_mode) == 0o700
            keys.append(keys[0].read_bytes())

    run = federation(privacy=HIDDEN, rounds=1, observe=look)
    version = run.run()

    path, key = keys
    assert len(key) == 32
    assert not path.exists()
    told = json.dumps([run.store.version(version).recipe, run.plan.to_json()])
    assert key.hex() not in told
    assert run.store.version(version).recipe["private"]


def test_a_version_made_with_an_insecure_seed_is_not_private(federation):
    run = federation(privacy=FIXED, rounds=1)

    assert run.store.version(run.run()).recipe["private"] is False
    assert not list(coordinator_keys(run.home).rglob("key"))


def test_a_key_that_is_lost_in_a_round_stops_the_run(federation):
    def dies(kind, data):
        if kind == "closed":
            raise Killed

    with pytest.raises(Killed):
        federation(privacy=HIDDEN, rounds=1, observe=dies).run()
    again = federation()
    workspace = open_workspace(again.home)
    assert list(_without_keys(workspace)) == []
    [key] = coordinator_keys(again.home).rglob("key")
    key.unlink()

    assert list(_without_keys(workspace)) == ["run-1"]
    with pytest.raises(KeyLost, match="could be released twice"):
        again.run()
    assert list(coordinator_keys(again.home).rglob("key")) == []


def test_the_coordinator_s_key_is_no_client_s(tmp_path):
    assert insecure_key(7, COORDINATOR) not in {insecure_key(7, name) for name in FOUR}
    site = Site(tmp_path)
    assert site.run_key("run-1", COORDINATOR) != site.run_key("run-2", COORDINATOR)


def test_the_report_says_that_the_coordinator_is_trusted_with_single_updates(federation):
    run = federation(rounds=1)
    version = run.run()

    found = privacy_report(open_workspace(run.home), version)
    said = {one.title: one for one in found.sections}
    threats = " ".join(said["Threat model"].text)
    assert "is trusted with both" in threats
    assert "stands the noise alone" not in threats
    assert "zero-out" in " ".join(said["Assumptions"].items)


# --- planning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_noise_keeps_every_client_within_the_run_s_epsilon(planned, workspace, accountant):
    plan = planned(workspace, {**CALIBRATED, "accountant": accountant}, rounds=9)

    spends = planned_spends(plan)
    used = epsilon(spends["a"], 1e-3, accountant)
    assert spends.keys() == set(FOUR)
    assert 2.9 < used <= 3.0


def test_fewer_participations_need_less_noise(planned, workspace):
    often = planned(workspace, CALIBRATED, rounds=16)
    seldom = planned(workspace, {**CALIBRATED, "max_participations": 4}, rounds=16)

    ratio = often.central.noise_multiplier / seldom.central.noise_multiplier
    assert ratio == pytest.approx(2.0, rel=0.01)  # the square root of 16 / 4


def test_a_budget_asks_for_more_noise_and_two_clients_of_one_population_for_more_still(
    planned, workspace
):
    free = planned(workspace, CALIBRATED).central.noise_multiplier
    workspace.ledger.add_client(ClientRecord("a", "jsonl:/a", "people-a", epsilon=1.0, delta=1e-3))
    bound = planned(workspace, CALIBRATED).central.noise_multiplier
    plan = planned(workspace, CALIBRATED)
    shared = replace(
        plan, participants=tuple(replace(p, population="people-a") for p in plan.participants)
    )
    twice = central_terms(shared, Budgets(workspace.ledger))

    assert free < bound
    assert twice.noise_multiplier == pytest.approx(2 * bound, rel=0.01)  # four clients


def test_budgets_of_other_units_are_never_mixed(planned, workspace, spend, make_plan, tensors):
    workspace.ledger.add_client(ClientRecord("a", "jsonl:/a", "people-a", epsilon=9.0, delta=1e-3))
    workspace.ledger.record_spend(spend("before", population="people-a", client="a"))

    with pytest.raises(BudgetSpent, match=r"unit example .* unit client"):
        planned(workspace, CALIBRATED)

    plan = planned(workspace, HIDDEN)  # with its own noise it is found when it would be asked
    inputs = RoundInputs(1, "base", {}, {}, "/site")
    asked = plan_round(plan, inputs, lambda c: Broadcast(tensors()), plan.participants)
    refused = []
    kept = reserve(
        asked,
        {p.name: p for p in plan.participants},
        workspace.ledger,
        lambda kind, data: refused.append(data) if kind == "refused" else None,
    )
    assert [a.client for a in kept] == ["b", "c", "d"]
    assert "cannot be added" in refused[0]["reason"]

    text = spent_by_population(workspace, "people-b")["text"]
    assert "unit client, zero-out" in text
    workspace.ledger.record_spend(spend("later", population="people-b", client="b"))
    both = spent_by_population(workspace, "people-b")
    assert both["text"].count("ε = ") == 2
    assert [one["unit"] for one in (both, *both["others"])] == ["client", "example"]


def test_a_run_of_examples_is_refused_where_a_budget_was_spent_on_clients(workspace, make_plan):
    config = make_plan(privacy={"epsilon": 2.0}, steps=1).config.privacy
    history = [ClientLevel(1.0, 2.0, 4).spend]
    with pytest.raises(ValueError, match=r"unit client .* unit example"):
        calibrated(config, sample_rate=0.1, steps=5, history=history, budget=(9.0, 1e-5))


def test_an_exhausted_budget_is_refused_before_the_run(planned, workspace):
    workspace.ledger.add_client(ClientRecord("a", "jsonl:/a", "people-a", epsilon=0.01, delta=1e-9))

    with pytest.raises(BudgetSpent, match="'people-a'"):
        planned(workspace, CALIBRATED, rounds=5000)


def test_a_budget_that_a_given_noise_would_pass_is_refused_or_shortens_the_run(planned, workspace):
    one = epsilon([ClientLevel(1.0, 2.0, 1).spend], 1e-3)
    record = ClientRecord("a", "jsonl:/a", "people-a", epsilon=one * 1.01, delta=1e-3)
    workspace.ledger.add_client(record)
    plan = planned(workspace, HIDDEN, clients=("a",), rounds=3)

    with pytest.raises(BudgetSpent, match="There is room for 1 rounds"):
        within_budgets(plan, Budgets(workspace.ledger))
    workspace.ledger.set_budget("people-a", one * 1.01, 1e-3, "shorten")
    assert within_budgets(plan, Budgets(workspace.ledger)).config.rounds == 1


def test_a_delta_as_large_as_one_client_is_refused(planned, workspace):
    with pytest.raises(BadConfig, match=r"0\.25 is not below 1/4, the number of clients"):
        planned(workspace, {**HIDDEN, "delta": 0.25})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"late": "keep"}, "two of one client can be in it"),
        ({"asynchronous": {"buffer": 2, "concurrency": 3}}, "two of one client can be in it"),
        ({"max_update_norm": 3.0}, "privacy.clip bounds every change already"),
        ({"retention": "all"}, "no update is kept"),
        ({"retention": "until-closed"}, "no update is kept"),
        ({"privacy": {**HIDDEN, "clip": None}}, "needs it"),
        ({"privacy": {"epsilon": 1, "clip": 1.0}}, "at level: example it is max_grad_norm"),
        ({"privacy": {**HIDDEN, "max_grad_norm": 0.5}}, "the unit is the client"),
        ({"privacy": {**HIDDEN, "clipping": "automatic"}}, "the unit is the client"),
        ({"privacy": {"epsilon": 1, "unit": "client"}}, "would read as level: client"),
        ({"privacy": {"epsilon": 1, "clip_quantile": 0.5}}, "moves the clip of level: client"),
    ],
)
def test_what_does_not_go_with_a_noised_sum_is_refused_with_the_reason(document, changes, reason):
    with pytest.raises(BadConfig, match=reason):
        parse_config(document(**{"privacy": HIDDEN, **changes}))


def test_no_update_is_kept_by_default_and_a_clone_of_the_config_says_so(document):
    config = parse_config(document(privacy=HIDDEN))
    assert config.retention.keep == "none"
    assert config.local_steps is None  # as without DP: steps or epochs
    assert parse_config(document(privacy={"epsilon": 1})).retention.keep == "until-closed"


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("flora", "more of the updates than their mean"),
        ("flexlora", "more of the updates than their mean"),
        ({"name": "krum", "inner": "ffa-lora"}, "more of the updates than their mean"),
        ({"name": "scaffold", "inner": "ffa-lora"}, "more of the updates than their mean"),
        ({"name": "ffa-lora", "weighting": "label:beds"}, "clients count alike"),
        ({"name": "fedadam", "inner": "ffa-lora"}, None),
        ("fedsvd", None),
        ("lori", None),
        ("fedavg", None),
    ],
)
def test_a_strategy_is_taken_or_refused_by_what_it_makes_of_updates(
    planned, workspace, tensors, strategy, reason
):
    plan = planned(workspace, HIDDEN, strategy=strategy, steps=1)
    shapes = {n: tuple(t.shape) for n, t in tensors().items()}
    if reason is None:
        refuse_senseless(plan, lambda model, adapter: shapes)
        return
    with pytest.raises(BadConfig, match=reason):
        refuse_senseless(plan, lambda model, adapter: shapes)


def test_dp_sgd_is_not_client_level_and_plans_round_trip(planned, workspace, make_plan):
    plan = planned(workspace, HIDDEN)
    assert plan.central == ClientLevel(0.5, 2.0, 4)
    assert Plan.from_json(plan.to_json()) == plan
    assert central_terms(make_plan(privacy={"epsilon": 1}), Budgets(workspace.ledger)) is None
    noise = Privacy(1.0, 1.0, 0.1)
    assert not make_plan(noise=noise).config.client_level


# --- with real clients ------------------------------------------------------------------------


def test_real_clients_send_bounded_changes_and_one_without_examples_sends_none(
    home, tiny, notes, monkeypatch
):
    home.ledger.add_client(ClientRecord("empty", notes("none", size=0), "nobody"))
    sent = []
    mean = Central.mean

    def spied(self, updates, accepted, asked):
        held = list(updates)
        sent.append((held, asked.broadcast.tensors))
        return mean(self, held, accepted, asked)

    monkeypatch.setattr(Central, "mean", spied)
    privacy = {**FIXED, "clip": 0.01}
    version = service.launch(home, tiny(strategy="fedsvd", privacy=privacy))

    [(updates, start)] = sent
    norms = {
        u.client: math.sqrt(
            sum(float((t - start[n]).double().square().sum()) for n, t in u.tensors.items())
        )
        for u in updates
    }
    assert norms["empty"] == 0
    assert norms["a"] == pytest.approx(0.01, rel=1e-3)
    assert norms["b"] == pytest.approx(0.01, rel=1e-3)
    assert [one.outcome for one in service.replay(home, "task-1")] == ["gone"]
    with pytest.raises(NoiseSecret, match="client-level DP"):
        service.retrain(home, home.ledger.runs()[0].id)
    assert all((u.num_examples, u.fingerprint, u.metrics) == (1, "", {}) for u in updates)
    recipe = home.store.version(version).recipe
    assert recipe["privacy"] == {
        "clip": 0.01,
        "noise_multiplier": 2.0,
        "cohort": 3,
        "quantile": None,
        "unit": "client",
        "delta": 1e-3,
        "accountant": "prv",
        "insecure_seed": 7,
    }
