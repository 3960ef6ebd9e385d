"""One figure a line: what every benchmark prints."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured value, its goal if it has one, the peer it was measured beside, and how."""

    name: str
    value: float
    unit: str
    goal: float | None
    better: str
    peer: str
    setting: str

    @property
    def verdict(self) -> str:
        """Whether the goal is met; empty without one."""
        if self.goal is None:
            return ""
        met = self.value >= self.goal if self.better == "higher" else self.value <= self.goal
        return "met" if met else "MISSED"


def show(title: str, figures: Sequence[Figure], as_json: bool) -> None:
    """Print figures as a table, or as one JSON object a line."""
    if as_json:
        for figure in figures:
            print(json.dumps(asdict(figure)))
        return
    table = Table("figure", "value", "unit", "goal", "", "setting", title=title)
    for f in figures:
        goal = "" if f.goal is None else f"{'>=' if f.better == 'higher' else '<='} {f.goal:g}"
        table.add_row(f.name, f"{f.value:.4g}", f.unit, goal, f.verdict, f.setting)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def drift(values: Sequence[float]) -> float:
    """Return what ``values`` gain from the first to the last, as a share of their median."""
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2)]
    return statistics.median(slopes) * (len(values) - 1) / statistics.median(values)
