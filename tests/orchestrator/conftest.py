"""Fixtures of the shell's tests: a workspace, plans without a model, and small data sets."""

import json

import pytest
import torch

from clients.assignment import DataSpec
from orchestrator.config import parse_config
from orchestrator.plan import Participant, Plan, Start
from orchestrator.service import open_workspace

LABELS = ("cat", "dog", "model", "rank")
WORDS = ("the", "a", "learns", "weaves", "thread", "adapter", "private", "data", "round")


@pytest.fixture
def workspace(tmp_path):
    """Return an empty workspace under the test's folder."""
    return open_workspace(tmp_path / "home")


@pytest.fixture
def document():
    """Return a function that makes a whole config's YAML document, with changes on top."""

    def make(**changes):
        base = {
            "name": "task-1",
            "model": "some-model",
            "labels": list(LABELS),
            "strategy": "fedavg",
            "rounds": 2,
            "batch_size": 4,
            "clients": {"select": {}},
            "backend": "inline",
        }
        return {k: v for k, v in (base | changes).items() if v is not None}

    return make


@pytest.fixture
def make_plan(document):
    """Return a function that makes a plan of imagined clients: nothing is loaded or read."""

    def make(clients=("a", "b", "c"), noise=None, start=None, **changes):
        config = parse_config(document(**changes))
        chosen = config.checked_plugins()
        people = tuple(
            Participant(c, DataSpec(f"jsonl:/{c}.jsonl"), f"people-{c}", 100, privacy=noise)
            for c in clients
        )
        model = config.model_spec("0" * 64)
        return Plan("run-1", config, model, participants=people, start=start or Start(), **chosen)

    return make


@pytest.fixture
def tensors():
    """Return a function that makes a small adapter with a head, drawn from ``seed``."""

    def make(seed=0, rank=2, layers=("q",), labels=4, scaling=1.0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        made = {}
        for layer in layers:
            made[f"{layer}.lora_A.weight"] = draw(rank, 5)
            made[f"{layer}.lora_B.weight"] = draw(6, rank)
            made[f"{layer}.scaling"] = torch.tensor(scaling)
        if labels:
            made |= {"head.weight": draw(labels, 5), "head.bias": draw(labels)}
        return made

    return make


@pytest.fixture
def notes(tmp_path):
    """Return a function that writes a labelled jsonl file and returns its URI."""

    def write(name="notes", size=12, labels=LABELS, shift=0):
        rows = []
        for i in range(size):
            label = labels[i % len(labels)]
            rest = [WORDS[(i + shift + j) % len(WORDS)] for j in range(3)]
            rows.append({"text": " ".join([label, *rest]), "label": label, "ward": f"w{i % 2}"})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return f"jsonl:{path}"

    return write


@pytest.fixture
def tiny(tiny_encoder, document):
    """Return a function that makes a config on the tiny encoder: rank 2, one short round."""

    def make(**changes):
        base = {
            "model": {"id": str(tiny_encoder), "max_length": 16},
            "adapter": {"name": "lora", "r": 2, "layers": [0]},
            "optimizer": {"name": "adamw", "lr": 0.05},
            "steps": 2,
            "rounds": 1,
        }
        return parse_config(document(**(base | changes)))

    return make
