"""How a quality benchmark shows what there is: tables, JSON, and what is missing by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

from _figures import Figure, show
from _quality_plan import Plan
from _quality_results import (
    CLAIMS,
    KINDS,
    Claim,
    Kind,
    Result,
    Tuned,
    Verdict,
    judged,
    summaries,
)
from rich.box import MARKDOWN
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
        claims: published orderings to compare with.
    """

    plan: Plan
    tuned: tuple[Tuned, ...]
    results: tuple[Result, ...]
    claims: tuple[Claim, ...] = CLAIMS

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Return what is held equal, one after the other."""
        return KINDS if self.plan.equal_bytes else KINDS[:1]

    @property
    def setting(self) -> str:
        """Return how a run is made, in a line."""
        p = self.plan
        return (
            f"{p.compute_dtype}; {p.clients} clients, {p.cohort or 'all'} in every round; "
            f"{p.rounds} rounds of {p.steps} steps of "
            f"{p.batch_size} texts of at most {p.max_length} tokens; seeds "
            f"{', '.join(map(str, p.seeds))}"
        )

    def missing(self) -> Iterator[str]:
        """Yield a sentence for each method that has no rate, and for the cells' runs."""
        for tuned in self.tuned:
            if tuned.missing:
                rates = ", ".join(f"{rate:g}" for rate in tuned.missing)
                yield f"{tuned.method}: not tuned yet, without learning rates {rates}"
        there = {(r.cell, r.method, r.seed) for r in self.results}
        for cell in self.plan.cells:
            lacking: dict[str, list[str]] = {}
            due = [method.name for method in self.plan.methods_in(cell)]
            for name in due:
                seeds = [str(s) for s in self.plan.seeds if (cell, name, s) not in there]
                if seeds:
                    lacking.setdefault(", ".join(seeds), []).append(name)
            for text, names in lacking.items():
                who = "all its methods" if len(names) == len(due) else "; ".join(names)
                yield f"{cell.title}: without seeds {text}: {who}"

    def verdicts(self, kind: Kind) -> list[Verdict]:
        """Return what the runs say of each published ordering of the plan's methods."""
        names = {method.name for method in self.plan.methods}
        return [judged(c, self.results, kind) for c in self.claims if {c.better, c.worse} <= names]

    def sentence(self, kind: Kind) -> str:
        """Return which published orderings hold here and which do not."""
        words: dict[str, list[str]] = {
            word: [] for word in ("holds", "reversed", "undecided", "not measured")
        }
        for verdict in self.verdicts(kind):
            words[verdict.word].append(f"{verdict.claim.better} > {verdict.claim.worse}")
        parts = (f"{word}: {'; '.join(who) or 'none'}" for word, who in words.items())
        return f"published orderings at {_EQUAL[kind]}: {'. '.join(parts)}"


def show_report(found: Measured, markdown: bool = False, more: Sequence[Table] = ()) -> None:
    """Print tables: scores, ``more``, learning rates, what is sent, orderings; what is missing."""
    console = Console(width=None if sys.stdout.isatty() else 250 if markdown else 180)
    console.print(found.setting, highlight=False)
    scores = (_scores(found, kind) for kind in found.kinds)
    for table in (*scores, *more, _costs(found), _orderings(found)):
        if markdown:
            table.box = MARKDOWN
        console.print(table)
    for kind in found.kinds:
        console.print(found.sentence(kind), highlight=False)
    lines = list(found.missing())
    console.print("missing:" if lines else "missing: nothing", highlight=False)
    for line in lines:
        console.print(f"  {line}", highlight=False)


def show_json(found: Measured, title: str = "Federated quality") -> None:
    """Print a JSON object a score, a line each."""
    figures = []
    for kind in found.kinds:
        for (cell, method), made in summaries(found.results, kind).items():
            spread = "" if made.spread is None else f", spread {made.spread:.4f}"
            name = f"{method} on {cell.name} at {_EQUAL[kind]}"
            setting = f"{found.setting}; {made.n} of {len(found.plan.seeds)} seeds{spread}"
            peer = "" if method == found.plan.reference.name else found.plan.reference.name
            figures.append(Figure(name, made.mean, "accuracy", None, "higher", peer, setting))
    show(title, figures, as_json=True)


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
        "accuracy by rate on held-back rows",
        "MB up",
        "MB down",
        *(["rounds in equal bytes"] if found.plan.equal_bytes else []),
        title=f"a client in {found.plan.rounds} rounds, in {found.plan.cells[0].title}",
    )
    methods = {method.name: method for method in found.plan.methods}
    for tuned in found.tuned:
        own = [
            r for r in found.results if (r.method, r.cell) == (tuned.method, found.plan.cells[0])
        ]
        chosen = "-" if tuned.rate is None else f"{tuned.rate:g}"
        if tuned.at_an_edge(methods[tuned.method]):
            chosen += " (the last tried)"
        tried = (
            f"{rate:g}: {'failed' if score is None else f'{100 * score:.1f}'}"
            for rate, score in tuned.accuracy.items()
        )
        table.add_row(tuned.method, chosen, ", ".join(tried), *_sent(own, found.plan))
    return table


def _sent(own: list[Result], plan: Plan) -> Iterator[str]:
    scale = 1e6 * (plan.cohort or plan.clients)
    for values in ([r.steps.up for r in own], [r.steps.down for r in own]):
        yield f"{mean(values) / scale:.2f}" if values else "-"
    if not plan.equal_bytes:
        return
    rounds = [r.bytes.round for r in own if r.bytes is not None]
    yield f"{mean(rounds):.0f}" if rounds else "-"


def _orderings(found: Measured) -> Table:
    title = "published orderings: difference in points over pairs of the same cell and seed"
    table = Table(
        "published", "where", *(f"at {_EQUAL[kind]}" for kind in found.kinds), title=title
    )
    columns = zip(*(found.verdicts(kind) for kind in found.kinds), strict=True)
    for verdicts in columns:
        claim = verdicts[0].claim
        cells = (f"{verdict.word}: {verdict}" for verdict in verdicts)
        where = f"{claim.source}: {claim.about}"
        table.add_row(f"{claim.better} > {claim.worse}", where, *cells)
    return table
