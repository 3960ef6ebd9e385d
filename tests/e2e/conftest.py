"""Whole runs: small federations of real processes on real text."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
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
def killed() -> Iterator[Callable[..., None]]:
    """Runs a federation, or a stream of them, in a process of its own until it is killed."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("die_at.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout

        def run(home: Path, document: Mapping[str, Any], kind: str, count: int) -> None:
            what = "stream" if "tasks" in document else "config"
            job = {"folder": str(Path.cwd()), "home": str(home), what: document}
            process.stdin.write(json.dumps({**job, "kind": kind, "count": count}) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{-signal.SIGKILL}\n"

        yield run
