"""Clients' scores of a version as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.markup import escape
from rich.table import Table as Grid

from orchestrator.asking_clients import Noised
from orchestrator.client_scores import Table
from strategies.pooled import Estimate


def scores_table(found: Table) -> Grid:
    """Return a line a client, then the mean of all and the worst of each score."""
    names = list(found.mean) or sorted({name for row in found.rows for name in row.scores})
    size = "units (noised)" if found.private else "examples"
    grid = Grid("client", size, *(escape(name) for name in names))
    for row in found.rows:
        told = [f"not told: {row.reason}"] if row.reason else _cells(row.scores, names)
        grid.add_row(*(escape(text) for text in (row.client, _size(row.num_examples), *told)))
    grid.add_section()
    mean = _cells(found.mean, names)
    grid.add_row("all, by size", _size(found.num_examples), *mean, style="bold")
    worst = [found.worst(name) for name in names]
    grid.add_row("worst", "", *(escape(row.client) if row else "-" for row in worst))
    return grid


def notes(found: Table, noised: Noised | None) -> Iterator[str]:
    """Yield what must be known to read the table."""
    if noised is None:
        return
    yield (
        f"each client spent ε = {noised.epsilon:g} (δ = {noised.delta:g}, unit {noised.unit}, "
        "add-remove), which is on the ledger"
    )
    yield (
        "± is the standard error that noise gives a score, at any number of units; scores are cut "
        "to what they can be, and '-' is one that the noise hides"
    )


def _cells(scores: Mapping[str, Estimate], names: list[str]) -> list[str]:
    found = [scores.get(name) for name in names]
    return ["-" if one is None else _shown(one) for one in found]


def _shown(score: Estimate) -> str:
    return f"{score.value:.4f}" + (f" ± {score.error:.4f}" if score.error else "")


def _size(number: float) -> str:
    return f"{number:.0f}"
