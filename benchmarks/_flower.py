"""The peer: Flower's simulation engine, in an environment and a process of its own.

The environment is made by ``--peer`` and kept in ``~/.cache/weft-bench`` (or ``$WEFT_BENCH_CACHE``)
with the versions of constraints.txt. The process is ``flower/engine.py``; it is told over a pipe
when to run a round, and stopped by a signal between its turns, because its threads would go on
asking every node for messages and take processor time from the others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import _peers

_HERE = Path(__file__).parent
_CONSTRAINTS = _HERE.parent / "constraints.txt"
_PACKAGES = ("transformers", "peft", "safetensors")


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let people choose the peer."""
    parser.add_argument(
        "--peer",
        action=argparse.BooleanOptionalAction,
        help="beside Flower; makes its environment (1.5 GB) where it is missing (default: where it "
        "is there, and not with --quick)",
    )


def wanted(arguments: argparse.Namespace) -> bool:
    """Return whether Flower is measured too; make its environment if that was asked for."""
    if arguments.peer is False:
        return False
    made = _peers.is_complete(environment())
    if arguments.peer and not made:
        make()
        return True
    if made and (arguments.peer or not arguments.quick):
        return True
    print(f"the peer {name()} is left out; --peer measures it too", file=sys.stderr)
    return False


def name() -> str:
    """Return the peer's name with its version."""
    return f"flwr[simulation] {_version()}"


def environment() -> Path:
    """Return the folder of the peer's virtual environment, whether it is there or not."""
    return _peers.folder_of(f"flower-{_version()}")


def make() -> None:
    """Make the peer's environment: the same versions as ours, with Flower's own Ray.

    ``TORCH_INDEX`` says where else to look for torch, as for make.
    """
    index, pinned = os.environ.get("TORCH_INDEX"), ["-c", str(_CONSTRAINTS)]
    extra = ["--extra-index-url", index] if index else []
    flower = [*pinned, f"flwr[simulation]=={_version()}", *_PACKAGES]
    _peers.make(environment(), [*pinned, *extra, "torch"], flower)


class Engine:
    """A running Flower simulation that waits for its turn.

    Args:
        app: what its clients do: ``echo`` or ``training``.
        nodes: how many clients there are.
        workers: how many client processes, each with one processor.
        job: the file that says what is trained (``training``).
    """

    def __init__(self, app: str, nodes: int, workers: int, job: Path | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="weft-bench-flower-"))
        self._log = self._folder / "log.txt"
        command = [environment() / "bin" / "python", _HERE / "flower" / "engine.py", app]
        numbers = [str(nodes), str(workers), *([str(job)] if job else [])]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*map(str, command), *numbers],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self._folder,
                env=self._environ(job),
            )
        self._hear()
        self._pause()

    @property
    def pid(self) -> int:
        """Its driver's process."""
        return self._process.pid

    def round(self, **asked: Any) -> dict[str, Any]:
        """Run one round and return what the engine says about it; ``seconds`` at least."""
        os.kill(self.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._hear()
        self._pause()
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.kill(self.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()  # the engine ends where its orders end
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text("utf-8", "replace").splitlines()[-20:])
            raise RuntimeError(f"the peer {name()} has ended; the end of its log:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def _environ(self, job: Path | None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
        return kept | {
            "PYTHONPATH": f"{_HERE / 'flower'}:{_HERE}",  # which Flower hands on to its actors
            "FLWR_HOME": str(self._folder),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "BENCHMARK_JOB": str(job or ""),
        }


def _version() -> str:
    found = re.search(r"^flwr==(\S+)$", _CONSTRAINTS.read_text(), re.MULTILINE)
    assert found is not None, "constraints.txt pins flwr"
    return found[1]
