"""Commands that only look answer at once: they load nothing that learns, nor any model."""

import json
import subprocess
import sys

import pytest

from storage.ledger import ClientRecord

MODELS = ("transformers", "peft", "ray", "opacus", "datasets")
HEAVY = (*MODELS, "torch", "numpy", "scipy")
TENSORS = ("diff bot:v1 bot:v2", "plugins strategy", "plugins adapter")
COMMANDS = (
    "--help",
    "names",
    "versions --json",
    "show bot",
    "lineage bot",
    "lineage bot --descendants --json",
    "lineage bot --format dot",
    "lineage --contains-client a --json",
    "promote bot:v1 --to production",
    "rollback bot@production --to bot:v2",
    "yank bot:v1 --reason leaks",
    "alias log bot@production",
    "runs",
    "runs list --json",
    "runs show task-1",
    "runs log task-1",
    "clients list --label site=north",
    "clients show a",
    "clients add b2 --data {data} --label site=south",
    "data check {data}",
    "clients budget a --epsilon 4 --delta 1e-5",
    "privacy budget a --epsilon 4 --delta 1e-5 --policy ask",
    "deployments --json",
    "keys list",
    "fsck",
    "gc",
)
SCRIPT = """
import json
import sys

import orchestrator.cli

for command, heavy in json.load(sys.stdin):
    sys.argv = ["weft", *command.split()]
    try:
        orchestrator.cli.main()
    except SystemExit as stop:
        if stop.code:
            sys.exit(f"{command} failed")
    if loaded := [name for name in heavy if name in sys.modules]:
        sys.exit(f"{command} loaded {loaded}")
"""


@pytest.fixture
def kept(home, grow, make_plan):
    """Return a home with versions, an alias, clients and a run."""
    grow("bot", private=False)
    grow("bot", {"bot:v1": "round"}, clients=("a",), private=False)
    config = make_plan(quarantine_after=2).config
    home.ledger.create_run("r1", "task-1", config.model_dump(mode="json"), {})
    home.ledger.add_client(ClientRecord("c", "jsonl:/c", "c", labels={"site": "north"}))
    return home.home


def test_a_command_loads_no_library_that_it_does_not_need(kept, notes, monkeypatch):
    monkeypatch.setenv("WEFT_HOME", str(kept))
    commands = [(command.format(data=notes()), HEAVY) for command in COMMANDS]
    commands += [(command, MODELS) for command in TENSORS]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
