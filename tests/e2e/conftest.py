"""Whole runs: small federations of real processes on real text."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the real data sets and models."""
    if not SHARED.is_dir():
        pytest.skip("the real data sets and models of ../shared/data are not here")
    return SHARED


@pytest.fixture(scope="session")
def killed() -> Callable[..., None]:
    """Runs a federation in a process of its own until it is killed at an event."""

    def run(home: Path, document: Mapping[str, Any], kind: str, count: int) -> None:
        script = str(Path(__file__).with_name("die_at.py"))
        arguments = [str(home), json.dumps(document), kind, str(count)]
        done = subprocess.run([sys.executable, script, *arguments], timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL

    return run
