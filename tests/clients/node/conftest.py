"""Fixtures of the tests of a site's own side."""

import time
from dataclasses import replace
from importlib.metadata import version

import pytest
import yaml

from clients.assignment import DataSpec, Privacy
from clients.node.policy import Versions
from clients.node.settings import load_settings
from clients.orders import Terms, pack_order
from clients.weights import base_hash

PRIVATE = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1)


@pytest.fixture
def versions():
    """Return what is installed here."""
    return Versions(version("weft"), version("flwr"))


@pytest.fixture
def terms(versions):
    """Return a function that makes the terms of an order, with changes."""

    def make(**changes):
        facts = {
            "strategy": "fedavg",
            "run_name": "notes-1",
            "weft": versions.weft,
            "flwr": ".".join(versions.flwr.split(".")[:2]),
            "deadline": time.time() + 600,
        }
        return Terms(**(facts | changes))

    return make


@pytest.fixture
def node(tmp_path, tiny_encoder, assign):
    """Return a function that writes a node.yaml over ten records and loads it."""

    def make(policy=None, **changes):
        hash_ = base_hash(assign().model)  # which wrote the records, too
        notes = {"uri": "jsonl:rows-10.jsonl", "epsilon": 100.0} | changes
        document = {
            "name": "clinic-7",
            "superlink": "weft.example.org:443",
            "key": "node.key",
            "models": {hash_: str(tiny_encoder)},
            "data": {"notes": {k: v for k, v in notes.items() if v is not None}},
            "policy": policy or {},
        }
        (tmp_path / "node.yaml").write_text(yaml.safe_dump(document))
        return load_settings(tmp_path / "node.yaml")

    return make


@pytest.fixture
def asked(assign):
    """Return a function that makes what a coordinator asks of the node's data set."""

    def make(**changes):
        made = assign()
        model = replace(made.model, id="", hash=base_hash(made.model))
        named = {"model": model, "data": DataSpec("site:notes"), "site": "", "privacy": PRIVATE}
        return replace(made, **(named | changes))

    return make


@pytest.fixture
def order(asked, terms):
    """Return a function that makes it an order."""

    def make(said=None, **changes):
        return pack_order(asked(**changes), said or terms())

    return make
