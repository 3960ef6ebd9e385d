"""How ``federated_quality.py`` shows what there is: tables, JSON, and what is missing by name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import mean

from _figures import Figure, show
from _quality_plan import Plan
from _quality_results import CLAIMS, KINDS, Kind, Result, Tuned, Verdict, judged, summaries
from rich.console import Console
from rich.table import Table

_EQUAL = {"steps": "equal steps", "bytes": "equal bytes"}


@dataclass(frozen=True, slots=True)
class Measured:
    """What there is of a plan.

    Attributes:
        plan: what is compared.
        tuned: how each method's learning rate was chosen.
        results: of every run that has got to the plan's rounds.
    """

    plan: Plan
    tuned: tuple[Tuned, ...]
    results: tuple[Result, ...]

    @property
    def setting(self) -> str:
        """Return how a run is made, in a line."""
        p = self.plan
        return (
            f"{p.clients} clients, all in every round; {p.rounds} rounds of {p.steps} steps of "
            f"{p.batch_size} texts of at most {p.max_length} tokens; seeds "
            f"{', '.join(map(str, p.seeds))}"
        )

    def missing(self) -> Iterator[str]:
        """Yield a sentence for each method and cell of which runs are missing."""
        for tuned in self.tuned:
            if tuned.missing:
                rates = ", ".join(f"{rate:g}" for rate in tuned.missing)
                yield f"{tuned.method}: not tuned yet, without learning rates {rates}"
        there = {(r.cell, r.method, r.seed): r for r in self.results}
        for cell in self.plan.cells:
            for method in self.plan.methods:
                runs = [there.get((cell, method.name, seed)) for seed in self.plan.seeds]
                none = [s for s, run in zip(self.plan.seeds, runs, strict=True) if run is None]
                if none:
                    seeds = ", ".join(map(str, none))
                    yield f"{cell.title}: {method.name} without seeds {seeds}"

    def verdicts(self, kind: Kind) -> list[Verdict]:
        """Return what the runs say of each published ordering of the plan's methods."""
        names = {method.name for method in self.plan.methods}
        return [judged(c, self.results, kind) for c in CLAIMS if {c.better, c.worse} <= names]


def show_report(found: Measured) -> None:
    """Print tables: scores, learning rates, what is sent, orderings; and what is missing."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(found.setting)
    for kind in KINDS:
        console.print(_scores(found, kind))
    console.print(_costs(found))
    console.print(_orderings(found))
    lines = list(found.missing())
    console.print(f"missing: {len(lines) or 'nothing'}", highlight=False)
    for line in _folded(lines):
        console.print(f"  {line}", highlight=False)


def show_json(found: Measured) -> None:
    """Print a JSON object a score, a line each."""
    figures = []
    for kind in KINDS:
        for (cell, method), made in summaries(found.results, kind).items():
            spread = "" if made.spread is None else f", spread {made.spread:.4f}"
            name = f"{method} on {cell.name} at {_EQUAL[kind]}"
            setting = f"{found.setting}; {made.n} of {len(found.plan.seeds)} seeds{spread}"
            peer = "" if method == found.plan.reference.name else found.plan.reference.name
            figures.append(Figure(name, made.mean, "accuracy", None, "higher", peer, setting))
    show("Federated quality", figures, as_json=True)


def _folded(lines: list[str], most: int = 24) -> Iterable[str]:
    more = len(lines) - most
    return lines if more <= 0 else [*lines[:most], f"… and {more} more"]


def _scores(found: Measured, kind: Kind) -> Table:
    made = summaries(found.results, kind)
    cells = [cell for cell in found.plan.cells if any(key[0] == cell for key in made)]
    title = f"accuracy in % at {_EQUAL[kind]}: mean ± standard deviation over seeds"
    table = Table("method", *(cell.title for cell in cells), title=title)
    for method in found.plan.methods:
        row = [made.get((cell, method.name)) for cell in cells]
        if any(row):
            table.add_row(method.name, *("-" if one is None else str(one) for one in row))
    return table


def _costs(found: Measured) -> Table:
    """Return rates, and bytes and rounds in the first cell that has them."""
    table = Table(
        "method",
        "learning rate",
        "MB up",
        "MB down",
        "rounds in equal bytes",
        title=f"a client in {found.plan.rounds} rounds, in {found.plan.cells[0].title}",
    )
    methods = {method.name: method for method in found.plan.methods}
    for tuned in found.tuned:
        own = [
            r for r in found.results if (r.method, r.cell) == (tuned.method, found.plan.cells[0])
        ]
        rate = "-" if tuned.rate is None else f"{tuned.rate:g}"
        if tuned.at_an_edge(methods[tuned.method]):
            rate += " (the last tried)"
        table.add_row(tuned.method, rate, *_sent(own, found.plan))
    return table


def _sent(own: list[Result], plan: Plan) -> Iterator[str]:
    scale = 1e6 * plan.clients
    for values in ([r.steps.up for r in own], [r.steps.down for r in own]):
        yield f"{mean(values) / scale:.2f}" if values else "-"
    rounds = [r.bytes.round for r in own if r.bytes is not None]
    yield f"{mean(rounds):.0f}" if rounds else "-"


def _orderings(found: Measured) -> Table:
    title = "published orderings: difference in points over pairs of the same cell and seed"
    table = Table("published", "where", *(f"at {_EQUAL[kind]}" for kind in KINDS), title=title)
    columns = zip(*(found.verdicts(kind) for kind in KINDS), strict=True)
    for verdicts in columns:
        claim = verdicts[0].claim
        cells = (f"{verdict.word}: {verdict}" for verdict in verdicts)
        where = f"{claim.source}: {claim.about}"
        table.add_row(f"{claim.better} > {claim.worse}", where, *cells)
    return table
