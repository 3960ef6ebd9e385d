"""Fixtures of the tests of what a client does."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
    """Write rows (or raw lines) to notes.jsonl in the current folder, and return its URI."""
    monkeypatch.chdir(tmp_path)

    def write(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path("notes.jsonl").write_text("\n".join(lines) + "\n")
        return "jsonl:notes.jsonl"

    return write
