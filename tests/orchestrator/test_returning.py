"""Clients that see different tasks at different times, and return: with every method.

What a method keeps at a client, or remembers of a task, must go on from what there is: a client may
come with a task that others began, miss one, and come back.
"""

from __future__ import annotations

import json

import pytest
import torch

from clients.site import Site
from orchestrator.backends.inline import InlineBackend
from orchestrator.coordinator import Driving
from orchestrator.stream import parse_stream
from orchestrator.streaming import run_stream
from orchestrator.workspace import open_workspace
from storage.ledger import ClientRecord

pytestmark = pytest.mark.slow

TASKS = (("pets", ["north", "south"]), ("parts", ["west"]), ("again", ["north", "west"]))
SGD = {"name": "sgd", "lr": 0.1}
METHODS = {
    "gpm": {"regularizers": ["gpm", "lwf"], "optimizer": SGD},
    "inflora": {"regularizers": ["inflora"], "strategy": "ffa-lora"},
    "o-lora": {"regularizers": ["o-lora", "n-lora"]},
    "rehearsed": {"regularizers": ["der-plus-plus", "l2-sp"]},
    "scaffold": {"strategy": "scaffold", "optimizer": SGD},
    "sd-lora": {"adapter": {"name": "sd-lora", "r": 2, "layers": [0]}, "strategy": "sd-lora"},
    "several": {"regularizers": ["ewc", "mas", "si", "replay"]},
}
"""Together all that keep something at a client or remember a task, each in one stream."""
REHEARSED = "rehearsed"
REMEMBERED = ("gpm", "inflora", "o-lora", "several")


@pytest.fixture
def stream(tiny_encoder, notes):
    """Return a function that registers three clients in a home, and makes a stream by a method."""

    def make(home, method, public=False):
        for shift, name in enumerate(("north", "south", "west")):
            data = notes(name, shift=shift)
            record = ClientRecord(name, data, name, num_examples=12, public=public)
            home.ledger.add_client(record)
        base = {
            "model": {"id": str(tiny_encoder), "max_length": 16},
            "labels": ["cat", "dog", "model", "rank"],
            "strategy": "fedavg",
            "adapter": {"name": "lora", "r": 2, "layers": [0]},
            "rounds": 1,
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
    versions = _driven(workspace, stream(workspace, METHODS[name]))

    assert len(set(versions)) == 3
    site, offered = Site(workspace.sites), []
    for version, (_, clients) in zip(versions, TASKS, strict=True):
        updates = workspace.store.version(version).recipe["updates"]
        assert sorted(leaf["client"] for leaf in updates) == clients
        for leaf in updates if name == REHEARSED else ():
            kept = json.loads(site.kept_examples(leaf["client"], leaf["digest"])["examples.json"])
            offered.append(kept["offered"])
    # of 12 examples 6 have a task's labels: who returns was offered those of both
    assert offered in ([], [6, 6, 6, 12, 12])
    assert bool(offered) is (name == REHEARSED)
    assert bool(workspace.store.memory(versions[2])) is (name in REMEMBERED)


@pytest.mark.parametrize("public", [True, False])
def test_two_homes_end_at_one_version_unless_a_site_s_key_is_in_its_fingerprints(
    public, stream, tmp_path
):
    tensors, leaves, ids = [], [], []
    for place in ("here", "there"):
        home = open_workspace(tmp_path / place)
        [*_, last] = _driven(home, stream(home, METHODS["several"], public))
        tensors.append(home.store.tensors(last))
        leaves.append([leaf["fingerprint"] for leaf in home.store.version(last).recipe["updates"]])
        ids.append(last)
        home.close()

    assert all(torch.equal(tensors[0][name], there) for name, there in tensors[1].items())
    assert (leaves[0] == leaves[1]) is public
    assert (ids[0] == ids[1]) is public


def _driven(home, made):
    """Return the versions that a stream's tasks end with."""
    found = run_stream(home, made, Driving(InlineBackend()), lambda run: lambda kind, data: None)
    return [step.version for step in found]
