"""Client-level DP whose noise the clients make by shares: in runs, refused, and accounted for."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from clients.keys import has_key
from clients.shares import bounded
from clients.site import Site, UpdateGone
from clients.trainer import train
from clients.uplink import encoded
from orchestrator import auditing, service
from orchestrator.acceptance import refusal
from orchestrator.auditing import Attack
from orchestrator.budgets import Budgets, central_terms
from orchestrator.central import Central
from orchestrator.collecting import RoundFailed
from orchestrator.config import BadConfig, parse_config
from orchestrator.forecasting import forecast
from orchestrator.launch import make_plan as plan_of
from orchestrator.plan import RoundInputs, plan_round
from orchestrator.privacy_report import privacy_report
from orchestrator.refusals import refuse_impossible_rounds
from orchestrator.retention import COORDINATOR, coordinator_keys
from orchestrator.service import open_workspace
from strategies.base import Broadcast, Update
from strategies.bounded import clipped_change

FOUR = ("a", "b", "c", "d")
SHARED = {
    "level": "client",
    "noise_multiplier": 2.0,
    "clip": 0.5,
    "delta": 1e-3,
    "noise_shares": 2,
    "insecure_seed": 7,
}
SECRET = {key: value for key, value in SHARED.items() if key != "insecure_seed"}
B = "q.lora_B.weight"


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def sharing(imagined):
    """A backend of imagined clients that clip what they train and add a share of the noise."""

    class Sharing(type(imagined())):
        def answer(self, asked):
            update = super().answer(asked)
            if asked.action != "train" or not isinstance(update, Update):
                return update
            made = bounded(update.tensors, asked, Site(asked.site))
            made, _ = encoded(made, asked.broadcast, (), 0, {})
            return replace(update, tensors=made, num_examples=1, fingerprint="")

    return Sharing


@pytest.fixture
def federation(tmp_path, make_plan, sharing, tensors, run_in):
    """Return a function that makes a run in a home of its own, or one to go on with it."""

    def make(home="home", first=None, backend=None, observe=lambda kind, data: None, **changes):
        def planned(workspace):
            base = {"strategy": "ffa-lora", "privacy": SHARED, "quorum": 3, "retries": 0}
            plan = make_plan(FOUR, **(base | changes))
            return replace(plan, central=central_terms(plan, Budgets(workspace.ledger)))

        used = sharing(first or tensors(), **(backend or {}))
        return run_in(open_workspace(tmp_path / home), planned, used, observe)

    return make


@pytest.fixture
def wide(tensors):
    """First tensors with 10,000 numbers in B."""
    return tensors(layers=()) | {
        "q.lora_A.weight": torch.randn(2, 4, generator=torch.Generator().manual_seed(1)),
        B: torch.zeros(5000, 2),
        "q.scaling": torch.tensor(1.0),
    }


def clipped_sum(run, start, clients):
    """What the clients' changes sum up to, without anybody's noise."""
    inputs = RoundInputs(1, "base", {}, {}, "/site")
    sent = Broadcast(start, trainable=r".*\.lora_B\..*|head\..*")
    people = [p for p in run.plan.participants if p.name in clients]
    plain = super(type(run.backend), run.backend)
    return sum(
        clipped_change(plain.answer(asked).tensors, start, {}, 0.5)[B]
        for asked in plan_round(run.plan, inputs, lambda c: sent, people)
    )


@pytest.mark.parametrize(
    ("who", "backend", "rounds"),
    [
        ("abcd", {}, {}),
        ("acd", {"fails": {"b": 9}}, {}),  # dropped out
        ("abd", {"delays": {("c", 1): 9}}, {"cohort": {"size": 3, "over_provision": 0.34}}),
    ],
)
def test_whoever_answers_a_round_has_the_noise_of_as_many_shares_and_never_less_than_promised(
    federation, wide, who, backend, rounds
):
    run = federation(first=wide, backend=backend, rounds=1, **rounds)
    version = run.run()

    recipe = run.store.version(version).recipe
    assert [leaf["client"] for leaf in recipe["updates"]] == list(who)
    assert recipe["privacy"]["noise_shares"] == 2
    expected = 3 if rounds else 4
    [start] = [run.store.tensors(p.id) for p in run.store.version(version).parents]
    moved = run.store.tensors(version)[B].double() - start[B].double()
    noise = moved - clipped_sum(run, start, who) / expected
    deviation = 2.0 * 0.5 * math.sqrt(len(who) / 2) / expected
    # 10,000 draws: their variance is within 6 % of its expectation, at 4 standard deviations
    assert float(noise.square().mean()) == pytest.approx(deviation**2, rel=0.06)
    assert run.store.version(version).metrics == {"noise_std": pytest.approx(deviation)}


def test_fewer_shares_than_make_the_noise_whole_are_told_to_nobody(federation, tensors, tmp_path):
    run = federation()
    inputs = RoundInputs(1, "base", {}, {}, str(tmp_path / "site"))
    sent = Broadcast(tensors(), trainable=r".*\.lora_B\..*")
    asked = plan_round(run.plan, inputs, lambda c: sent, run.plan.participants)
    answers = [run.backend.answer(one) for one in asked]
    central = Central(run.plan.central, "run-1", run.home, 7)

    assert central.mean(answers[:2], [], asked[0]).update.tensors.keys() == {B}
    with pytest.raises(RoundFailed, match="1 clients' shares are not the whole noise, which 2"):
        central.mean(answers[:1], [], asked[0])


def test_an_update_without_a_share_is_refused_as_it_comes(federation, tensors, tmp_path):
    run = federation()
    inputs = RoundInputs(1, "base", {}, {}, str(tmp_path / "site"))
    sent = Broadcast(tensors(), trainable=r".*\.lora_B\..*")
    [asked, *_] = plan_round(run.plan, inputs, lambda c: sent, run.plan.participants)
    update = run.backend.answer(asked)

    assert refusal(update, asked) is None
    bare = replace(update, tensors={B: sent.tensors[B]})
    assert "travels as torch.int32" in str(refusal(bare, asked))
    far = replace(update, tensors={B: update.tensors[B] * 1000})
    assert "none that is clipped to 0.5 is longer" in str(refusal(far, asked))
    assert "lora_B.weight is missing" in str(refusal(replace(update, tensors={}), asked))


@pytest.mark.parametrize("privacy", [SHARED, SECRET])
def test_a_run_that_was_interrupted_releases_the_same_sum_and_spends_once(federation, privacy):
    run = federation(privacy=privacy, rounds=2)
    commit, made = run.store.commit, []

    def dies(tensors, **kwargs):
        if kwargs["recipe"].get("round") == 2:
            facts = {k: v for k, v in kwargs.items() if k != "metrics"}
            made.append(run.store.identify(tensors, **facts))
            raise Killed
        return commit(tensors, **kwargs)

    run.store.commit = dies
    with pytest.raises(Killed):
        run.run()
    again = federation()

    assert again.run() == made[0]
    rows = again.ledger.spends_of_run("run-1")
    assert len(rows) == 8
    assert {row.parameters["noise_multiplier"] for row in rows} == {2.0}
    keys = [has_key(run.home / "sites", "run-1", client) for client in FOUR]
    keys.append(has_key(coordinator_keys(run.home), "run-1", COORDINATOR))
    assert keys == [False] * 5  # of a run that is closed


def test_two_rounds_of_a_client_have_independent_noise(federation, wide):
    seen = []
    run = federation(first=wide, rounds=2, quorum=4)
    answer = run.backend.answer

    def noted(asked):
        update = answer(asked)
        if asked.action == "train" and asked.client == "a":
            seen.append(update.tensors[B].double().flatten())
        return update

    run.backend.answer = noted
    run.run()
    for one, two in pairwise(seen):
        assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.04


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "shares", "reason"),
    [
        ({}, 1, r"a round makes do with 1 updates \(quorum\)"),
        ({"quorum": 3}, 3, "set quorum to 4 or more, or lower noise_shares"),
        ({"quorum": 0.5}, 2, "a round makes do with 2 updates"),
        ({"quorum": 3}, 2, None),
        ({"quorum": 1.0}, 3, None),
    ],
)
def test_a_round_may_not_close_with_less_than_the_noise_that_its_own_clients_do_not_know(
    make_plan, rounds, shares, reason
):
    privacy = {**SHARED, "noise_shares": shares}
    plan = make_plan(FOUR, strategy="ffa-lora", privacy=privacy, **rounds)
    if reason is None:
        refuse_impossible_rounds(plan)
        return
    with pytest.raises(BadConfig, match=reason):
        refuse_impossible_rounds(plan)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"uplink": ["fp16"]}, "an encoding is of each update by itself"),
        ({"privacy": {**SHARED, "clip_quantile": 0.5}}, "needs a noised count of the changes"),
        ({"privacy": {"epsilon": 1.0, "noise_shares": 3}}, "makes all of its noise already"),
    ],
)
def test_what_shares_do_not_go_with_is_refused_with_the_reason(document, changes, reason):
    with pytest.raises(BadConfig, match=reason):
        parse_config(document(**{"privacy": SHARED, **changes}))


# --- what is claimed against whom ---------------------------------------------------------------


def test_the_plan_says_what_holds_against_the_coordinator_who_sees_one_share_at_a_time(home, tiny):
    privacy = {**SHARED, "noise_shares": 1, "delta": 1e-5, "noise_multiplier": 3.0}
    shared = forecast(home, tiny(strategy="ffa-lora", privacy=privacy, quorum=2))
    [one, _] = shared.clients
    assert one.against_coordinator.epsilon == pytest.approx(one.by_accountant["rdp"])


def test_real_clients_send_shares_once_and_the_report_says_what_holds_against_whom(
    home, tiny, monkeypatch
):
    asked, mean = [], Central.mean

    def spied(self, updates, accepted, one):
        asked.append(one)
        return mean(self, updates, accepted, one)

    monkeypatch.setattr(Central, "mean", spied)
    privacy = {**SHARED, "noise_shares": 1}
    config = tiny(strategy="fedsvd", privacy=privacy, quorum=2, rounds=2)
    version = service.launch(home, config)

    report = privacy_report(home, version)
    [section] = [one for one in report.sections if one.title == "ε against the coordinator"]
    assert [row[0] for row in section.table] == ["population", "a", "b"]
    threats = " ".join(text for one in report.sections for text in one.text)
    assert "larger ε of that share alone" in threats
    assert "sees each single update without noise" not in threats
    with pytest.raises(UpdateGone, match="a second one with the same noise would not be private"):
        train(replace(asked[0], client="a"))


def test_an_attack_on_the_sums_of_shares_stays_below_the_claim_and_finds_missing_noise(
    home, tiny, monkeypatch
):
    privacy = {**SHARED, "epsilon": 3.0, "delta": 1e-5, "accountant": "rdp", "noise_shares": 1}
    del privacy["noise_multiplier"]
    wide = {"name": "lora", "r": 16, "target_modules": ["query", "value"]}
    config = tiny(strategy="ffa-lora", privacy=privacy, quorum=2, adapter=wide)
    plan = plan_of(config, home.store, home.ledger, home.sites)
    found = auditing.audit(home, plan, Attack())
    assert 0.1 < found.bound < found.claim.epsilon <= 3.0

    right = type(plan.central).sum_std.fget
    monkeypatch.setattr(type(plan.central), "sum_std", property(lambda terms: right(terms) / 4))
    assert auditing.audit(home, plan, Attack()).refuted
