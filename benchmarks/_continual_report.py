"""How ``continual.py`` shows what there is: a table a sequence, goals, and what is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from _continual_plan import CONTROLS, Cell, Choice, Plan
from _continual_results import AWARE, FREE, ROUTED, Found, Tuned, over_seeds
from _figures import Figure, show
from _quality_plot import Panel, draw_panels
from _quality_results import Summary
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

KEPT, FORGOTTEN = 0.95, 0.25
"""The goals: the best method's share of joint training's accuracy, with the task told, at least;
and of what sequential LoRA forgets, at most."""
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("task told: accuracy", AWARE, "average"),
    ("backward transfer", AWARE, "backward_transfer"),
    ("forgetting", AWARE, "forgetting"),
    ("not told: accuracy", FREE, "average"),
    ("backward transfer", FREE, "backward_transfer"),
    ("forgetting", FREE, "forgetting"),
    ("routed: accuracy", ROUTED, "average"),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What there is of a plan.

    Attributes:
        plan: what is compared.
        tuned: how each method's learning rate was chosen.
        found: by cell, seed and method, of streams that were begun.
        cpu_s: processor time of all of it.
    """

    plan: Plan
    tuned: tuple[Tuned, ...]
    found: Mapping[tuple[str, int, str], Found]
    cpu_s: float

    @property
    def setting(self) -> str:
        """Return how a stream is made, in a line."""
        p = self.plan
        return (
            f"{p.model} in {p.compute_dtype}, batches of {p.batch_size}; a task is so many steps: "
            + ", ".join(
                f"{c.title}: {c.rounds} rounds of {c.steps}"
                + (f" on {c.clients} clients" if c.clients > 1 else "")
                for c in p.cells
            )
        )

    def seeds(self, cell: Cell, method: str) -> list[Found]:
        """Return what came of a cell's streams of one method."""
        return [one for (c, _, m), one in self.found.items() if (c, m) == (cell.name, method)]

    def score(self, cell: Cell, method: str, told: str, measure: str) -> Summary | None:
        """Return a measure over the seeds that there are."""
        return over_seeds(
            self.seeds(cell, method), lambda one: one.scores.get(told, {}).get(measure)
        )

    def missing(self) -> Iterator[str]:
        """Yield a sentence for each method without a rate, and for the cells' streams."""
        for tuned in self.tuned:
            if tuned.missing:
                tries = "; ".join(map(_choice, tuned.missing))
                yield f"{tuned.method.name}: not tuned yet, without {tries}"
        due: dict[tuple[str, str], list[str]] = {}
        for cell, seed, method in self.plan.streams():
            one = self.found.get((cell.name, seed, method.name))
            if one is None or not one.done:
                why = f" ({one.failed})" if one is not None and one.failed else ""
                due.setdefault((cell.title, f"{seed}{why}"), []).append(method.name)
        for (title, seed), names in due.items():
            yield f"{title}: without seed {seed}: {', '.join(names)}"

    def left_s(self) -> float | None:
        """Return about how much processor time the rest will take; None before there is any."""
        done = [(cell, one.cpu_s) for (cell, _, _), one in self.found.items() if one.done]
        if not done:
            return None
        sizes = {c.name: _size(c) for c in (*self.plan.cells, self.plan.tuning)}
        rate = sum(spent for _, spent in done) / sum(sizes[cell] for cell, _ in done)
        rest = sum(
            sizes[cell.name]
            for cell, seed, method in self.plan.streams()
            if (one := self.found.get((cell.name, seed, method.name))) is None or not one.done
        )
        tries = sum(len(tuned.missing) for tuned in self.tuned)
        return rate * (rest + tries * sizes[self.plan.tuning.name])

    def goals(self) -> list[Figure]:
        """Return how far each cell's best method keeps to what is expected of it."""
        found = []
        for cell in self.plan.cells:
            joint = self.score(cell, "joint", AWARE, "average")
            kept = self._best(cell, AWARE, "average")
            if joint is not None and kept is not None:
                name = f"{cell.title}: best with the task told, of joint training"
                value = kept[1] / joint.mean
                found.append(Figure(name, value, "share", KEPT, "higher", "joint", kept[0]))
            for how, asked in ((AWARE, "told"), (FREE, "not told")):
                alone = self.score(cell, "sequential", how, "forgetting")
                lost = self._best(cell, how, "forgetting")
                if alone is not None and lost is not None and alone.mean > 0:
                    name = f"{cell.title}: least forgetting, task {asked}, of sequential"
                    value = lost[1] / alone.mean
                    found.append(
                        Figure(name, value, "share", FORGOTTEN, "lower", "sequential", lost[0])
                    )
        return found

    def _best(self, cell: Cell, told: str, measure: str) -> tuple[str, float] | None:
        """Return the best method that is no control, and its score."""
        controls = {method.name for method in CONTROLS}
        sign = -1 if measure == "forgetting" else 1
        scored = [
            (sign * one.mean, method.name)
            for method in self.plan.methods
            if method.name not in controls
            and (one := self.score(cell, method.name, told, measure)) is not None
        ]
        if not scored:
            return None
        best, name = max(scored)
        return name, sign * best


def _size(cell: Cell) -> float:
    """Return about how much work a stream of a cell is, in no unit."""
    steps = len(cell.tasks) * cell.rounds * cell.steps * cell.clients
    return steps * cell.max_length + len(cell.tasks) ** 2 * 10 * cell.max_length


def show_report(found: Measured, markdown: bool = False) -> None:
    """Print a table a sequence, how rates were chosen, goals, and what is missing."""
    console = Console(width=None if sys.stdout.isatty() else 250 if markdown else 200)
    console.print(found.setting, highlight=False)
    tables = [_scores(found, cell) for cell in found.plan.cells]
    for table in (*(table for table in tables if table.rows), _tuning(found)):
        if markdown:
            table.box = MARKDOWN
        console.print(table)
    for goal in found.goals():
        sign = ">=" if goal.better == "higher" else "<="
        text = f"{goal.name}: {goal.value:.2f} ({goal.setting}); {sign} {goal.goal}: {goal.verdict}"
        console.print(text, highlight=False)
    lines = list(found.missing())
    left = found.left_s()
    spent = f"{found.cpu_s / 3600:.2f} hours of processor time"
    about = f"; what is missing is about {left / 3600:.1f} more" if lines and left else ""
    console.print(f"{spent}{about}", highlight=False)
    console.print("missing:" if lines else "missing: nothing", highlight=False)
    for line in lines:
        console.print(f"  {line}", highlight=False)


def show_json(found: Measured) -> None:
    """Print a JSON object a score, a line each."""
    figures = []
    for cell in found.plan.cells:
        for method in found.plan.methods:
            for _, told, measure in _COLUMNS:
                made = found.score(cell, method.name, told, measure)
                if made is not None:
                    spread = "" if made.spread is None else f", spread {made.spread:.4f}"
                    name = f"{method.name} on {cell.title}: {measure}, {told}"
                    better = "lower" if measure == "forgetting" else "higher"
                    setting = f"{method.about}; {made.n} seeds{spread}"
                    figures.append(Figure(name, made.mean, "share", None, better, "", setting))
    show("Continual learning", [*figures, *found.goals()], as_json=True)


def draw(found: Measured, path: Path) -> None:
    """Write an SVG of the methods' accuracies, a panel a sequence.

    Raises:
        SystemExit: if there is nothing to draw, or nothing to draw it with.
    """
    panels = []
    for cell in found.plan.cells:
        made = {
            f"task {told}": {
                method.name: one
                for method in found.plan.methods
                if (one := found.score(cell, method.name, key, "average")) is not None
            }
            for told, key in (("told", AWARE), ("not told", FREE))
        }
        if any(made.values()):
            panels.append(Panel(cell.title, made))
    draw_panels(panels, [method.name for method in found.plan.methods], path)


def _scores(found: Measured, cell: Cell) -> Table:
    title = f"{cell.title}: % after the last task, mean ± standard deviation over seeds"
    names = [name for name, _, _ in _COLUMNS]
    table = Table("method", *names, "kB sent a round", "kept a task", title=title)
    for method in found.plan.methods:
        streams = found.seeds(cell, method.name)
        if not any(one.done for one in streams):
            continue
        row = [found.score(cell, method.name, told, measure) for _, told, measure in _COLUMNS]
        sent = over_seeds(streams, lambda one: one.sent / 1000)
        texts = ["-" if one is None else str(one) for one in row]
        assert sent is not None
        table.add_row(method.name, *texts, f"{sent.mean:.0f}", _stored(streams, len(cell.tasks)))
    return table


def _stored(streams: list[Found], tasks: int) -> str:
    """Return how many thousand numbers are kept a task: adapters, and what else goes on."""
    adapter = over_seeds(streams, lambda one: one.adapter / tasks / 1000)
    memory = over_seeds(streams, lambda one: one.memory / tasks / 1000)
    assert adapter is not None
    assert memory is not None
    more = f" + {memory.mean:.1f}" if memory.mean else ""
    return f"{adapter.mean:.1f}{more}"


def _tuning(found: Measured) -> Table:
    title = "what was tried: mean of the accuracies with and without the task told, held-back rows"
    table = Table("method", "as set", "chosen", "by rate, and weight", title=title)
    for tuned in found.tuned:
        chosen = "-" if tuned.choice is None else _choice(tuned.choice)
        if tuned.at_an_edge:
            chosen += " (the last tried)"
        tried = ", ".join(
            f"{_choice(choice)}: {'failed' if score is None else f'{100 * score:.1f}'}"
            for choice, score in tuned.scores.items()
        )
        table.add_row(tuned.method.name, tuned.method.about, chosen, tried)
    return table


def _choice(choice: Choice) -> str:
    rate, weight = choice
    return f"{rate:g}" if weight is None else f"{rate:g} and {weight:g}"
