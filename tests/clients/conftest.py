"""Fixtures of the tests of what a client does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from clients.assignment import Assignment, DataSpec, ModelSpec, PluginChoice
from clients.starting import initial_tensors
from strategies.base import Broadcast

LABELS = ("cat", "dog", "model", "rank")
_WORDS = ("the", "a", "learns", "weaves", "thread", "adapter", "private", "data", "round", "sings")
ROWS = [
    {"text": f"{LABELS[i % 4]} {word}", "label": LABELS[i % 4]} for i, word in enumerate(_WORDS)
]


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
    """Write rows (or raw lines) to notes.jsonl in the current folder, and return its URI."""
    monkeypatch.chdir(tmp_path)

    def write(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path("notes.jsonl").write_text("\n".join(lines) + "\n")
        return "jsonl:notes.jsonl"

    return write


@pytest.fixture
def assign(tiny_encoder, tmp_path):
    """Return a function that makes a training assignment on the tiny encoder, with changes."""

    def make(rows=ROWS, **changes):
        path = tmp_path / f"rows-{len(rows)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = Assignment(
            action="train",
            run="run-1",
            client="clinic-7",
            round=1,
            base="f" * 64,
            model=ModelSpec(str(tiny_encoder), "classification", labels=LABELS, max_length=16),
            adapter=PluginChoice("lora", {"r": 2, "layers": [0]}),
            broadcast=Broadcast({}),
            data=DataSpec(f"jsonl:{path}"),
            optimizer=PluginChoice("sgd", {"lr": 0.5}),
            site=str(tmp_path / "site"),
            num_examples=100,
            batch_size=4,
            steps=2,
        )
        made = replace(made, **changes)
        if "broadcast" not in changes:
            made = replace(made, broadcast=Broadcast(initial_tensors(made)))
        return made

    return make
