"""Sweeps and comparisons as people read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from clients.records import listed
from orchestrator.sweep import shown

if TYPE_CHECKING:
    from orchestrator.comparing import Comparison
    from orchestrator.sweeping import Standing


def sweep_table(found: Standing) -> Table:
    """Return a sweep's runs, a line each: what the grid chose, the seed, and how each stands."""
    keys = list(dict.fromkeys(key for point in found.points for key in point.values))
    table = Table("run", *(escape(key) for key in keys), "seed", "status", "error")
    for point in found.points:
        record = found.records.get(point.name)
        values = [shown(point.values[key]) if key in point.values else "" for key in keys]
        error = (record and record.error) or ""
        facts = (point.name, *values, str(point.seed), found.status_of(point), error)
        table.add_row(*(escape(text) for text in facts))
    return table


def cost_lines(found: Standing) -> Iterator[str]:
    """Yield what a sweep spends of whose privacy, a line a population."""
    for cost in found.costs:
        limit = "" if cost.budget is None else f" of {cost.budget:g}"
        kind = "public" if cost.after.public else "tuning is charged to it"
        yield (
            f"population {cost.after.population}: ε = {cost.before:.2f} so far; with the "
            f"{cost.runs} runs that have not ended, {cost.after}{limit} ({kind})"
        )
    if found.unprotected:
        yield (
            "without privacy, on data that are not public: no ε bounds what tuning and its "
            f"results say of {listed(found.unprotected)}"
        )


def comparison_table(found: Comparison) -> Table:
    """Return runs beside each other, a line a setting."""
    table = Table(*(escape(name) for name in found.header()))
    for row in found.rows():
        table.add_row(*(escape(text) for text in row))
    return table
