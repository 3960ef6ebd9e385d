"""A whole run with mislabelled canaries: it tells them apart where there is no noise, alone."""

import json

import pytest

from clients import gradients
from orchestrator.auditing import Attack
from orchestrator.config import BadConfig
from orchestrator.planting import audit_by_training

DP = {"epsilon": 0.25, "delta": 1e-5, "accountant": "rdp", "insecure_seed": 5}
CLIENTS = {"level": "client", "noise_multiplier": 9.0, "clip": 1.0, "delta": 1e-5}
TWENTY = Attack(canaries=20, guesses=10)
SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "pa", "ri", "su", "ta")


@pytest.fixture
def rows(tmp_path):
    """Forty short texts, no two alike, of two labels."""
    path = tmp_path / "rows.jsonl"
    texts = [f"{SYLLABLES[n % 10]}{SYLLABLES[n // 10]} {SYLLABLES[n * 7 % 10]}" for n in range(40)]
    told = [{"text": text, "label": ("cat", "dog")[n % 2]} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return f"jsonl:{path}"


@pytest.fixture
def config(tiny, rows):
    """Return a function that makes the config of a private run on a simulated client."""

    def make(public=True, **changes):
        simulate = {"data": rows, "by": "iid", "parts": 1, "public": public}
        base = {
            "labels": ["cat", "dog"],
            "adapter": {"name": "lora", "r": 8, "target_modules": ["query", "value"]},
            "clients": {"simulate": simulate},
            "privacy": DP,
            "batch_size": 40,
            "steps": 25,
            "rounds": 2,
        }
        return tiny(**(base | changes))

    return make


def test_a_whole_run_tells_nothing_of_its_canaries_with_noise_and_much_without(
    workspace, config, monkeypatch
):
    found = audit_by_training(workspace, config(), TWENTY)
    assert found.bound < found.claim.epsilon <= 0.25
    assert not found.refuted

    monkeypatch.setattr(gradients, "gradient_noise", lambda *given: 0.0)
    broken = audit_by_training(workspace, config(), TWENTY)
    assert broken.guesses.right >= 9
    assert broken.refuted


def test_nothing_of_it_is_left_where_it_was_asked_for(workspace, config):
    audit_by_training(workspace, config(steps=1, rounds=1), TWENTY)
    assert workspace.ledger.runs() == []
    assert workspace.ledger.clients() == []
    assert workspace.ledger.spent_populations() == set()
    assert workspace.store.names() == []


@pytest.mark.parametrize(
    ("changes", "attack", "said"),
    [
        ({"public": False}, TWENTY, "part-0: .* these are not public"),
        ({"privacy": None}, TWENTY, "no privacy section"),
        ({"privacy": CLIENTS, "strategy": "ffa-lora"}, TWENTY, "hides whole clients"),
        ({"start_from": "bot:v1", "start": "continue"}, TWENTY, "from the base model alone"),
        ({"privacy": {**DP, "unit": "ward"}}, TWENTY, "are each a unit"),
        ({"task_labels": ["cat"]}, TWENTY, "beside cat there is no other label"),
        ({}, Attack(canaries=21, guesses=8), "21 canaries are more than half of the 40 examples"),
        ({}, Attack(canaries=20, guesses=8, client="part-0"), "trains all clients"),
    ],
)
def test_what_cannot_be_audited_so_is_refused(workspace, config, changes, attack, said):
    with pytest.raises(BadConfig, match=said):
        audit_by_training(workspace, config(**changes), attack)


def test_registered_clients_whose_data_are_private_are_refused(home, tiny):
    asked = tiny(clients={"select": {}}, privacy=DP, batch_size=12)
    with pytest.raises(BadConfig, match="a: a black-box audit trains on data"):
        audit_by_training(home, asked, Attack(canaries=4, guesses=2))
