"""Runs federations that die by SIGKILL at the N-th event of a kind.

The kill comes from inside, at the exact event: there is no race, and no clean-up either. Each run
is in a forked process of its own, which spares it the seconds in which all that weft needs is
imported.

Reads jobs from standard input and answers each with an exit status, one a line::

    {"folder": ..., "home": ..., "config": {...}, "kind": "accepted", "count": 2}
    -9
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
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


def die(job: Mapping[str, Any]) -> None:
    """Launch the run of a job in this process, and die where it says."""
    seen = 0

    def observe(kind: str, data: Mapping[str, Any]) -> None:
        nonlocal seen
        seen += kind == job["kind"]
        if seen == job["count"]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(job["folder"])
    service.launch(service.open_workspace(job["home"]), parse_config(job["config"]), observe)


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
