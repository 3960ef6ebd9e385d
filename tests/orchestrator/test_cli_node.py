"""``weft node``: what a site's owner sees, in this process."""

import json
import subprocess
import sys

import pytest
import yaml

from clients.accounting import epsilon
from clients.charges import Charge
from clients.node.identity import new_key
from clients.node.ledger import Budget, Entry, Ledger
from clients.node.running import alone
from clients.node.settings import load_settings
from clients.weights import ModelSpec, base_hash


@pytest.fixture
def node_yaml(tmp_path, tiny_encoder, notes):
    """Return the node.yaml of a site that has all that it needs."""
    new_key(tmp_path / "node.key")
    document = {
        "name": "clinic-7",
        "superlink": "weft.example.org:443",
        "key": "node.key",
        "models": {base_hash(ModelSpec(str(tiny_encoder), "classification")): str(tiny_encoder)},
        "data": {"notes": {"uri": notes("north"), "epsilon": 8.0}},
    }
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "node.yaml"


@pytest.fixture
def spent(node_yaml):
    """Put one round on the site's ledger, and return what it cost."""
    ledger = Ledger(load_settings(node_yaml).state)
    noise = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10.0}
    facts = ("gaussian", "example", "add-remove", noise)
    one = Charge("event", "clinic-7", "clinic-7", "run-1", 1, "ab" * 32, *facts)
    ledger.enter(Entry("run-1", "clinic-7", "clinic-7", "notes-1", "fedsvd", "examples"))
    ledger.charge(one, Budget(1e-5, 8.0))
    number = ledger.begin("run-1", "clinic-7", 1, "train")
    ledger.end(number, "update", "", 4096, "cd" * 32)
    return epsilon([one.spend], 1e-5)


def test_models_prints_the_line_that_node_yaml_takes(ok, read, tiny_encoder):
    spec = ModelSpec(str(tiny_encoder), "classification", compute_dtype="bf16")

    said = ok("node", "models", tiny_encoder, "--compute-dtype", "bf16")

    assert said.strip() == f'"{base_hash(spec)}": {tiny_encoder}'
    assert read("node", "models", tiny_encoder, "--compute-dtype", "bf16") == {
        base_hash(spec): str(tiny_encoder)
    }


def test_models_asks_nobody_for_a_folder_that_is_not_there(refused):
    assert "there is no folder" in refused("node", "models", "/nowhere/minilm")


def test_check_says_what_is_right_and_what_is_wrong(ok, weft, read, node_yaml):
    assert "data.notes: " in ok("node", "check", node_yaml)
    assert all(one["good"] for one in read("node", "check", node_yaml))

    (node_yaml.parent / "node.key").unlink()
    code, out, _ = weft("node", "check", node_yaml)

    assert code == 2
    assert "WRONG key: there is no file" in out


def test_status_shows_what_ran_and_what_it_cost(ok, read, node_yaml, spent):
    found = read("node", "status", node_yaml)
    said = ok("node", "status", node_yaml, "--exact")

    assert [run["run"] for run in found["runs"]] == ["run-1"]
    assert found["data"][0]["epsilon"] >= spent
    for shown in ("clinic-7", "notes-1 run-1", "fedsvd", f"ε ≤ {spent:.2f}", "4,096", "cdcdcdcd"):
        assert shown in said


def test_start_refuses_what_could_not_answer(refused, node_yaml):
    (node_yaml.parent / "node.key").unlink()

    assert "weft node init makes one" in refused("node", "start", node_yaml)


def test_a_second_start_of_a_node_is_refused(refused, node_yaml):
    with alone(load_settings(node_yaml)):
        assert "clinic-7 runs already" in refused("node", "start", node_yaml)


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        ("status", ("torch", "transformers", "opacus", "ray", "sqlalchemy", "alembic", "flwr")),
        ("check", ("ray", "sqlalchemy", "alembic", "flwr", "opacus")),
        pytest.param("start", ("ray", "sqlalchemy", "alembic"), marks=pytest.mark.slow),
    ],
)
def test_a_site_imports_no_part_of_a_server(node_yaml, spent, command, heavy):
    code = (
        "import json, sys\n"
        "from clients.node import running\n"
        "running.start = lambda settings, serve, stop, answer: None\n"
        "from orchestrator.cli import main\n"
        f"sys.argv = ['weft', 'node', {command!r}, {str(node_yaml)!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    argv = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=200)
    imported = json.loads(done.stdout.splitlines()[-1])

    assert "clients" in imported
    assert not set(heavy) & set(imported)
