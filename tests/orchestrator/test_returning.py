"""Clients that see different tasks at different times, and return: with every method.

What a method keeps at a client, or remembers of a task, must go on from what there is: a client may
come with a task that others began, miss one, and come back.
"""

from __future__ import annotations

import json

import pytest

from clients.site import Site
from orchestrator.backends.inline import InlineBackend
from orchestrator.coordinator import Driving
from orchestrator.stream import parse_stream
from orchestrator.streaming import run_stream
from storage.ledger import ClientRecord

pytestmark = pytest.mark.slow

TASKS = (("pets", ["north", "south"]), ("parts", ["west"]), ("again", ["north", "west"]))
METHODS = {
    "der-plus-plus": {"regularizers": ["der-plus-plus"]},
    "ewc": {"regularizers": ["ewc"]},
    "gpm": {"regularizers": ["gpm"], "optimizer": {"name": "sgd", "lr": 0.1}},
    "inflora": {"regularizers": ["inflora"], "strategy": "ffa-lora"},
    "l2-sp": {"regularizers": ["l2-sp"]},
    "lwf": {"regularizers": ["lwf"]},
    "mas": {"regularizers": ["mas"]},
    "n-lora": {"regularizers": ["n-lora"]},
    "o-lora": {"regularizers": ["o-lora"]},
    "replay": {"regularizers": ["replay"]},
    "scaffold": {"strategy": "scaffold", "optimizer": {"name": "sgd", "lr": 0.1}},
    "sd-lora": {"adapter": {"name": "sd-lora", "r": 2, "layers": [0]}, "strategy": "sd-lora"},
    "si": {"regularizers": ["si"]},
    "several": {"regularizers": ["ewc", "si", "replay"]},
}

REHEARSED = ("der-plus-plus", "replay")
REMEMBERED = ("ewc", "gpm", "inflora", "mas", "o-lora", "several", "si")


@pytest.fixture
def stream(tiny_encoder, notes):
    """Return a function that registers three clients in a home, and makes a stream by a method."""

    def make(home, method):
        for shift, name in enumerate(("north", "south", "west")):
            record = ClientRecord(name, notes(name, shift=shift), name, num_examples=12)
            home.ledger.add_client(record)
        base = {
            "model": {"id": str(tiny_encoder), "max_length": 16},
            "labels": ["cat", "dog", "model", "rank"],
            "strategy": "fedavg",
            "adapter": {"name": "lora", "r": 2, "layers": [0]},
            "rounds": 2,
            "steps": 2,
            "batch_size": 4,
            "backend": "inline",
        }
        tasks = [
            {"name": name, "labels": labels, "clients": {"names": clients}}
            for (name, clients), labels in zip(
                TASKS, (["cat", "dog"], ["model", "rank"], ["cat", "dog"]), strict=True
            )
        ]
        document = {"name": "notes", "base": base, "method": method, "tasks": tasks}
        return parse_stream(document)

    return make


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_client_comes_with_a_later_task_misses_one_and_returns(name, stream, workspace):
    made = stream(workspace, METHODS[name])
    driving = Driving(InlineBackend())
    found = run_stream(workspace, made, driving, lambda run: lambda kind, data: None)

    assert len({step.version for step in found}) == 3
    site, offered = Site(workspace.sites), []
    for step, (_, clients) in zip(found, TASKS, strict=True):
        updates = workspace.store.version(step.version).recipe["updates"]
        assert sorted(leaf["client"] for leaf in updates) == clients
        for leaf in updates if name in REHEARSED else ():
            kept = json.loads(site.kept_examples(leaf["client"], leaf["digest"])["examples.json"])
            offered.append(kept["offered"])
    # of 12 examples 6 have a task's labels: who returns was offered those of both
    assert offered in ([], [6, 6, 6, 12, 12])
    assert bool(offered) is (name in REHEARSED)
    assert bool(workspace.store.memory(found[2].version)) is (name in REMEMBERED)
