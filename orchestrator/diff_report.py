"""The difference of two versions as people and programs read it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from orchestrator.differences import Diff


def as_json(found: Diff) -> dict[str, Any]:
    """Return in what two versions differ as JSON; pairs are (first, second)."""
    return {
        "first": found.first,
        "second": found.second,
        "norms": list(found.norms),
        "change": found.change,
        "layers": [{**asdict(x), "relative": x.relative} for x in found.layers],
        "tensors": [{**asdict(x), "relative": x.relative} for x in found.tensors],
        "metrics": {key: list(pair) for key, pair in found.metrics.items()},
        "recipe": {key: list(pair) for key, pair in found.recipe.items()},
        "clients": [list(names) for names in found.clients],
    }


def tables(found: Diff) -> Iterator[RenderableType]:
    """Yield a line that sums up, then a table each of layers, tensors, metrics and recipe."""
    yield f"{found.first[:12]} → {found.second[:12]}: {_summary(found)}"
    if found.layers:
        yield _layers(found)
    if found.tensors:
        yield _tensors(found)
    if found.metrics:
        yield _metrics(found)
    if found.recipe or any(found.clients):
        yield _recipe(found)


def _summary(found: Diff) -> str:
    if not found.layers:
        return "not both low-rank, compared tensor by tensor"
    before, after = found.norms
    relative = _percent(found.change / before if before else None)
    return f"norm {before:.4g} → {after:.4g}, changed by {found.change:.4g} ({relative})"


def _layers(found: Diff) -> Table:
    table = Table(
        "layer", "norm", "change", "effective rank", "input angles", "output angles", title="layers"
    )
    for x in found.layers:
        table.add_row(
            escape(x.layer),
            f"{x.norms[0]:.4g} → {x.norms[1]:.4g}",
            _percent(x.relative),
            f"{x.effective_ranks[0]:.2f} → {x.effective_ranks[1]:.2f}",
            _angles(x.input_angles),
            _angles(x.output_angles),
        )
    return table


def _tensors(found: Diff) -> Table:
    table = Table("tensor", "norm", "change", title="other tensors")
    for x in found.tensors:
        change = "other shape" if x.change is None else _percent(x.relative)
        table.add_row(escape(x.name), f"{x.norms[0]:.4g} → {x.norms[1]:.4g}", change)
    return table


def _metrics(found: Diff) -> Table:
    table = Table("metric", "first", "second", "delta", title="evaluation")
    for name, (before, after) in found.metrics.items():
        delta = "-" if before is None or after is None else f"{after - before:+.4f}"
        table.add_row(escape(name), _number(before), _number(after), delta)
    return table


def _recipe(found: Diff) -> Table:
    table = Table("recipe", "first", "second", title="recipe")
    for path, pair in found.recipe.items():
        texts = (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in pair)
        table.add_row(escape(path), *(escape(text) for text in texts))
    if any(found.clients):
        table.add_row("clients only there", *(escape(", ".join(c)) or "-" for c in found.clients))
    return table


def _angles(degrees: Sequence[float]) -> str:
    return f"{degrees[0]:.2f}° to {degrees[-1]:.2f}°" if degrees else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
