"""What an attack on a run's privacy finds, beside what is claimed, and where that is kept."""

import json

import pytest

from clients import gradients
from clients.canaries import NoPlaceForCanaries
from orchestrator import auditing
from orchestrator.auditing import Attack, audit_config, audit_run
from orchestrator.config import BadConfig
from orchestrator.launch import make_plan as plan_of
from orchestrator.privacy_report import privacy_report, written
from orchestrator.service import launch
from storage.ledger import ClientRecord
from strategies.spends import ClientLevel

DP = {"epsilon": 3.0, "delta": 1e-5, "accountant": "rdp", "insecure_seed": 5}
CLIENTS = {
    "level": "client",
    "epsilon": 3.0,
    "clip": 0.5,
    "delta": 1e-5,
    "accountant": "rdp",
    "insecure_seed": 5,
}
WIDE = {"name": "lora", "r": 16, "target_modules": ["query", "value"]}


@pytest.fixture
def quarter(monkeypatch):
    """Break the noise: a quarter of what the accountant is told."""
    right = gradients.gradient_noise
    monkeypatch.setattr(gradients, "gradient_noise", lambda *given: right(*given) / 4)


@pytest.fixture
def plan(home, tiny):
    """Return a function that plans a run on two registered clients, who are sampled whole."""

    def make(**changes):
        base = {"adapter": WIDE, "privacy": DP, "batch_size": 12, "clients": {"select": {}}}
        return plan_of(tiny(**(base | changes)), home.store, home.ledger, home.sites)

    return make


@pytest.fixture
def run_file(tmp_path, document, tiny_encoder, notes):
    """Return a function that writes the file of a run on simulated clients."""

    def write(**changes):
        base = {
            "model": {"id": str(tiny_encoder), "max_length": 16},
            "adapter": WIDE,
            "steps": 2,
            "rounds": 1,
            "batch_size": 12,
            "privacy": DP,
            "clients": {"simulate": {"data": notes(), "by": "iid", "parts": 2, "public": True}},
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(document(**(base | changes))))
        return path

    return write


def test_an_audit_stays_below_the_claim_over_all_rounds(plan, home):
    found = auditing.audit(home, plan(rounds=2), Attack())
    assert found.claim.epsilon == pytest.approx(3.0, rel=0.05)
    assert 0.2 < found.bound < found.claim.epsilon
    assert not found.refuted
    assert (found.guesses.canaries, found.guesses.made) == (1000, 125)


def test_a_quarter_of_the_noise_refutes_a_claim(plan, home, quarter):
    assert auditing.audit(home, plan(), Attack()).refuted


def test_the_client_with_the_largest_claim_is_attacked_unless_one_is_named(plan, home):
    attack = Attack(canaries=40, guesses=8)
    fixed = {"noise_multiplier": 2.0, "delta": 1e-5, "accountant": "rdp", "insecure_seed": 5}
    large = ClientRecord("c", home.ledger.client("b").data, "c", num_examples=24)
    home.ledger.add_client(large)
    planned = plan(privacy=fixed)

    whole = auditing.audit(home, planned, attack)
    half = auditing.audit(home, planned, Attack(canaries=40, guesses=8, client="c"))
    assert (whole.client, whole.sample_rate) == ("a", 1.0)
    assert (half.client, half.sample_rate) == ("c", 0.5)
    assert half.claim.epsilon < whole.claim.epsilon
    with pytest.raises(BadConfig, match="no client of task-1 is called 'd'"):
        auditing.audit(home, planned, Attack(client="d"))


def test_another_delta_is_another_claim(plan, home):
    few = Attack(canaries=40, guesses=8, delta=1e-7)
    claim = auditing.audit(home, plan(), few).claim
    assert claim.delta == 1e-7
    assert claim.epsilon > 3.0


def test_a_run_without_privacy_has_no_claim_to_audit(plan, home):
    with pytest.raises(BadConfig, match="task-1 has no privacy section"):
        auditing.audit(home, plan(privacy=None), Attack())


@pytest.mark.parametrize("more", [{}, {"clip_quantile": 0.5}])
def test_whole_clients_are_attacked_in_the_sums_of_their_rounds(plan, home, monkeypatch, more):
    whole = {**CLIENTS, **more}
    found = auditing.audit(home, plan(privacy=whole, strategy="ffa-lora", rounds=2), Attack())
    assert (found.claim.unit, found.claim.adjacency) == ("client", "zero-out")
    assert 0.1 < found.bound < found.claim.epsilon <= 3.0

    right = ClientLevel.sum_std.fget
    monkeypatch.setattr(ClientLevel, "sum_std", property(lambda terms: right(terms) / 4))
    assert auditing.audit(home, plan(privacy=whole, strategy="ffa-lora"), Attack()).refuted


def test_a_clip_that_canary_clients_drive_away_comes_back(plan, home, monkeypatch):
    monkeypatch.setattr(ClientLevel, "sum_std", property(lambda terms: 1e-6 * terms.clip))
    whole = plan(privacy={**CLIENTS, "clip_quantile": 0.5}, strategy="ffa-lora", rounds=12)
    found = auditing.audit(home, whole, Attack(canaries=400, guesses=40))
    assert found.guesses.right == 40


def test_more_canaries_than_clients_send_numbers_are_refused(plan, home):
    with pytest.raises(NoPlaceForCanaries, match="and there are 2180"):
        auditing.audit(home, plan(privacy=CLIENTS, strategy="ffa-lora"), Attack(canaries=9999))


def test_nothing_is_trained_spent_or_left_by_an_audit_of_a_file(workspace, run_file):
    audit_config(workspace, run_file(), Attack(canaries=40, guesses=8))
    assert workspace.ledger.runs() == []
    assert workspace.ledger.spent_populations() == set()
    assert workspace.store.names() == []
    assert not list(workspace.sites.glob("*/*"))


def test_what_is_found_on_a_run_is_in_its_version_s_report(workspace, run_file, tmp_path):
    from orchestrator.config import load_config

    version = launch(workspace, load_config(run_file(rounds=1)))
    assert "No audit" in written(privacy_report(workspace, version), tmp_path)[0].read_text()

    found = audit_run(workspace, "task-1", Attack(canaries=40, guesses=8))
    assert found.version == version
    kept = workspace.store.version(version).metrics
    assert kept["audit/epsilon_at_least"] == found.bound
    assert kept["audit/right"] == found.guesses.right
    text = written(privacy_report(workspace, version), tmp_path)[0].read_text()
    assert "8 guesses" in text
    assert "No audit" not in text


def test_the_command_says_what_is_claimed_and_proved(weft, ok, read, run_file):
    path = run_file()
    said = ok("privacy", "audit", path, "--canaries", 40, "--guesses", 8)
    assert "of 8 guesses right, of 40 gradient canaries" in said
    assert "an attack that fails proves nothing" in said
    found = read("privacy", "audit", path, "--canaries", 40, "--guesses", 8)
    assert found["guesses"]["canaries"] == 40
    assert found["refuted"] is False


def test_the_command_fails_where_the_claim_is_refuted(weft, run_file, quarter):
    code, said, _ = weft("privacy", "audit", run_file())
    assert code == 1
    assert "the claim is refuted" in said


def test_the_command_refuses_to_change_a_run_that_there_is(refused, run_file):
    assert "cannot be changed by --set" in refused("privacy", "audit", "task-1", "--set", "steps=1")
