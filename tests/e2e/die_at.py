"""Runs federations and streams that die by SIGKILL at the N-th event of a kind, or call.

The kill comes from inside, at the exact place: there is no race, and no clean-up either. Each run
is in a forked process of its own, which spares it the seconds in which all that weft needs is
imported.

Reads jobs from standard input and answers each with an exit status, one a line::

    {"folder": ..., "home": ..., "config": {...}, "kind": "accepted", "count": 2}
    -9
    {"folder": ..., "home": ..., "stream": {...}, "kind": "AdapterStore.name", "count": 2}
    -9

A call is killed before it does anything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

# what weft imports late is imported before the forks
import alembic.command
import alembic.script  # noqa: F401
import opacus.accountants
import opacus.grad_sample  # noqa: F401
import peft  # noqa: F401
import torch

from orchestrator import service
from orchestrator.config import parse_config
from orchestrator.coordinator import Driving
from orchestrator.stream import parse_stream
from orchestrator.streaming import run_stream
from storage.ledger import Ledger
from storage.store import AdapterStore

CLASSES = {"AdapterStore": AdapterStore, "Ledger": Ledger}


def die(job: Mapping[str, Any]) -> None:
    """Launch the run of a job in this process, or its stream, and die where it says."""
    seen = 0

    def reach() -> None:
        nonlocal seen
        seen += 1
        if seen == job["count"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def observe(kind: str, data: Mapping[str, Any]) -> None:
        if kind == job["kind"]:
            reach()

    kind, _, method = job["kind"].partition(".")
    if method:
        setattr(CLASSES[kind], method, _after(reach, getattr(CLASSES[kind], method)))
    os.chdir(job["folder"])
    workspace = service.open_workspace(job["home"])
    if "stream" in job:
        run_stream(workspace, parse_stream(job["stream"]), Driving(), lambda run: observe)
    else:
        service.launch(workspace, parse_config(job["config"]), observe)


def _after(reach: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def reached(*args: Any, **kwargs: Any) -> Any:
        reach()
        return call(*args, **kwargs)

    return reached


def main() -> None:
    """Serve jobs until standard input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                die(json.loads(line))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
