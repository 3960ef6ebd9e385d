"""A coordinator that dies by SIGKILL at the N-th event of a kind: HOME KIND N LEASE_S.

It says which run it drives before it goes on. The kill comes from inside, at the exact event.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from orchestrator import service

seen = 0


def observe(kind: str, data: Mapping[str, Any]) -> None:
    """Say what is driven, count, and die."""
    global seen
    if kind == "run":
        print(data["run"], flush=True)
    seen += kind == sys.argv[2]
    if seen == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def watch() -> Iterator[Any]:
    """Watch one run."""
    yield observe


if __name__ == "__main__":
    service.serve(
        service.open_workspace(sys.argv[1]),
        service.Serving(until_idle=True),
        service.Driving(lease_s=float(sys.argv[4])),
        watch,
    )
