"""A site's status as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.table import Table


def status_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of :func:`clients.node.status.status`."""
    data = Table("data set", "client", "population", "spent", "of", title=_title(found))
    for one in found["data"]:
        spent = "public" if one["public"] else _epsilon(one)
        if one["unprotected_runs"]:
            spent += f"; {one['unprotected_runs']} runs without privacy"
        budget = "no limit" if one["budget"] is None else f"{one['budget']:g}"
        data.add_row(one["data_set"], one["client"], one["population"], spent, budget)
    yield data
    runs = Table("run", "client", "strategy", "hides", "updates", "bytes sent", "ε", title="runs")
    for one in found["runs"]:
        counts = f"{one['updates']}"
        counts += f" (+{one['evaluations']} evaluations)" if one["evaluations"] else ""
        counts += f" ({one['refusals']} refused)" if one["refusals"] else ""
        named = f"{one['name']} {one['run'][:12]}".strip()
        runs.add_row(
            named,
            one["client"],
            one["strategy"],
            one["protection"],
            counts,
            f"{one['bytes']:,}",
            _epsilon(one) if one["delta"] is not None else "",
        )
    yield runs
    sent = Table("when (UTC)", "client", "round", "asked", "answered", "sha256", title="answers")
    for one in found["answers"]:
        answered = "at work, or cut off"
        if one["outcome"] is not None:
            answered = one["reason"] or f"{one['outcome']}, {one['bytes']:,} bytes"
        when = f"{datetime.fromtimestamp(one['began'], UTC):%Y-%m-%d %H:%M:%S}"
        digest = (one["sha256"] or "")[:12]
        sent.add_row(when, one["client"], str(one["round"]), one["action"], answered, digest)
    yield sent


def _title(found: Mapping[str, Any]) -> str:
    return f"{found['name']}, which dials {found['superlink']}"


def _epsilon(one: Mapping[str, Any]) -> str:
    if one["epsilon"] is None:
        return "what cannot be added up"
    text = f"ε ≤ {one['epsilon']:.2f} (δ = {one['delta']:g})"
    against = one.get("epsilon_against_coordinator")
    return text if against is None else f"{text}; {against:.2f} against the coordinator"
