"""Several tasks as one: their clients together, so that one run trains on all of their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clients import data
from orchestrator.config import BadConfig


def joined(clients: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the clients of several tasks as those of one.

    Args:
        clients: that section of each task's run, at least one; what is None counts as left out.

    Raises:
        BadConfig: if they are of different kinds.
    """
    given = [{k: v for k, v in one.items() if v is not None} for one in clients]
    if all(one == given[0] for one in given):
        return given[0]
    if all(set(one) == {"names"} for one in given):
        return {"names": list(dict.fromkeys(name for one in given for name in one["names"]))}
    simulated = [one["simulate"] for one in given if set(one) == {"simulate"}]
    if len(simulated) == len(given) and all("data" in one for one in simulated):
        rest = [{k: v for k, v in one.items() if k != "data"} for one in simulated]
        if all(one == rest[0] for one in rest):
            uris = [data.absolute(str(one["data"])) for one in simulated]
            parts = dict.fromkeys(part for uri in uris for part in data.parts_of(uri))
            return {"simulate": {**rest[0], "data": data.several(list(parts))}}
    raise BadConfig(
        "training on several tasks at once needs the clients of all tasks as one: all by names, or "
        "all simulated alike, with data alone different"
    )
