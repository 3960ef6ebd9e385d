"""Runs a federation and dies by SIGKILL at the N-th event of a kind: HOME CONFIG KIND N.

The kill comes from inside, at the exact event: there is no race, and no clean-up either.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from orchestrator import service
from orchestrator.config import parse_config

seen = 0


def observe(kind: str, data: Mapping[str, Any]) -> None:
    """Count, and die."""
    global seen
    seen += kind == sys.argv[3]
    if seen == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    service.launch(
        service.open_workspace(sys.argv[1]), parse_config(json.loads(sys.argv[2])), observe
    )
