"""The peer: MLflow's tracking store and registry, in an environment and processes of their own.

The environment is made by ``--peer`` and kept in ``~/.cache/weft-bench`` (or
``$WEFT_BENCH_CACHE``): MLflow is none of weft's dependencies. A process waits for its turn
and times each call itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import _peers

VERSION = "3.17.2"
_PEER = Path(__file__).parent / "_mlflow_peer.py"


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let people choose the peer."""
    parser.add_argument(
        "--peer",
        action=argparse.BooleanOptionalAction,
        help="beside MLflow; makes its environment (1 GB) where it is missing (default: where it "
        "is there)",
    )


def wanted(arguments: argparse.Namespace) -> bool:
    """Return whether MLflow is measured too; make its environment if that was asked for."""
    if arguments.peer is False:
        return False
    if not _peers.is_complete(environment()):
        if not arguments.peer:
            print(f"the peer {name()} is left out; --peer measures it too", file=sys.stderr)
            return False
        _peers.make(environment(), [f"mlflow=={VERSION}"])
    return True


def name() -> str:
    """Return the peer's name with its version."""
    return f"MLflow {VERSION}"


def environment() -> Path:
    """Return the folder of the peer's virtual environment, whether it is there or not."""
    return _peers.folder_of(f"mlflow-{VERSION}")


class Registry:
    """MLflow's registry in a process that waits for its turn.

    Args:
        kind: where it keeps its rows: ``sqlite`` or ``file``.
        folder: a new one, for all that it writes.
        artifact: the file that it logs.
    """

    def __init__(self, kind: str, folder: Path, artifact: Path) -> None:
        folder.mkdir(parents=True)
        url = f"sqlite:///{folder}/mlflow.db" if kind == "sqlite" else f"file://{folder}/mlruns"
        self._log = folder / "log.txt"
        command = [environment() / "bin" / "python", _PEER, url, folder / "artifacts", artifact]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*map(str, command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=kept,
            )
        self._hear()

    def call(self, what: str) -> float:
        """Make a call of :mod:`_mlflow_peer` and return its milliseconds."""
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return 1e3 * float(self._hear())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the peer ends where its calls end
        self._process.wait(60)

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-20:])
            raise RuntimeError(f"the peer {name()} has ended; the end of its log:\n{tail}")
        return line
