"""Runs beside each other: what they cost and reached, a line a setting, over its seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from clients import models
from clients.adapters import ADAPTERS
from clients.assignment import PluginChoice
from orchestrator.config import BadConfig, RunConfig, find_plugin
from orchestrator.coordinator import planned
from orchestrator.history import History
from orchestrator.plan import Plan
from orchestrator.spending import spent_by_run
from orchestrator.stopping import best
from orchestrator.strategy_refusals import trained_names
from orchestrator.sweep import LABEL, shown
from orchestrator.workspace import Workspace
from storage.ledger import Ledger, RunRecord

COSTS = ("epsilon", "bytes up", "bytes down", "trained parameters", "rounds", "seconds")
"""What is compared besides the metrics of an evaluation, in this order."""
_SECTIONS = ("adapter", "strategy", "optimizer")
_NOT_SETTINGS = ("name", "seed")


@dataclass(frozen=True, slots=True)
class Measured:
    """One run's setting and figures.

    Attributes:
        run: its id.
        name: the run's.
        status: where it stands.
        setting: all of its config but its name and seed, by dotted key, as text.
        figures: of the final version's evaluation, and of ``COSTS``; without those it has not.
        guarantee: what its ε is, in words; empty without DP.
    """

    run: str
    name: str
    status: str
    setting: Mapping[str, str]
    figures: Mapping[str, float]
    guarantee: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure over the runs of a setting.

    Attributes:
        n: of how many runs.
        mean: their mean.
        spread: their sample standard deviation; None for one run.
    """

    n: int
    mean: float
    spread: float | None

    def __str__(self) -> str:
        """Return it as people read it, such as ``0.912 ± 0.013``."""
        own = _number(self.mean)
        return own if self.spread is None else f"{own} ± {_number(self.spread)}"


@dataclass(frozen=True, slots=True)
class Line:
    """A setting: what of it differs from the others, its runs, and its figures by name."""

    setting: Mapping[str, str]
    runs: tuple[str, ...]
    figures: Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Settings beside each other.

    Attributes:
        keys: what differs between them, by dotted key.
        columns: the figures, by name.
        lines: a setting each, in the order of their first runs.
        notes: which ε it is, and what is missing of which run.
    """

    keys: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def header(self) -> list[str]:
        """Return the names of all columns."""
        return [*self.keys, "n", *self.columns]

    def rows(self) -> Iterator[list[str]]:
        """Yield each line as texts; a figure of fewer than all runs says of how many."""
        for line in self.lines:
            settings = [line.setting.get(key, "-") for key in self.keys]
            texts = [_cell(line, column) for column in self.columns]
            yield [*settings, str(len(line.runs)), *texts]

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON; a figure that no run of a setting has is null."""
        lines = []
        for line in self.lines:
            figures = {
                column: None
                if (found := line.figures.get(column)) is None
                else {"n": found.n, "mean": found.mean, "spread": found.spread}
                for column in self.columns
            }
            setting = {key: line.setting.get(key) for key in self.keys}
            lines.append({"setting": setting, "runs": list(line.runs), "figures": figures})
        return {"columns": list(self.columns), "lines": lines, "notes": list(self.notes)}

    def to_csv(self) -> str:
        """Return it as CSV: of each figure its mean, spread and number, unrounded."""
        parts = [f"{c} {part}" for c in self.columns for part in ("mean", "spread", "n")]
        text = io.StringIO()
        written = csv.writer(text, lineterminator="\n")
        written.writerow([*self.keys, "runs", *parts])
        for line in self.lines:
            cells: list[object] = [line.setting.get(key, "") for key in self.keys]
            cells.append(len(line.runs))
            for column in self.columns:
                found = line.figures.get(column)
                spread = "" if found is None or found.spread is None else found.spread
                cells += ["", "", 0] if found is None else [found.mean, spread, found.n]
            written.writerow(cells)
        return text.getvalue()

    def to_latex(self) -> str:
        """Return it as a LaTeX table for the package ``booktabs``; the notes are comments."""
        columns = "l" * len(self.keys) + "r" * (1 + len(self.columns))
        lines = [f"% {note}" for note in self.notes]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines += [" & ".join(map(_escaped, self.header())) + r" \\", r"\midrule"]
        lines += [" & ".join(map(_escaped, row)) + r" \\" for row in self.rows()]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def compare(
    workspace: Workspace,
    refs: Sequence[str] = (),
    sweep: str | None = None,
    metrics: Sequence[str] = (),
) -> Comparison:
    """Return runs beside each other, those that differ in their seeds alone on one line.

    Args:
        workspace: where.
        refs: runs, by id, prefix or name.
        sweep: a sweep, all of whose runs are compared besides; of one name, the newest.
        metrics: which metrics; by default all that an evaluation found.

    Raises:
        UnknownRun: if there is no such run.
        BadConfig: if there is nothing to compare, or no run has such a metric.
    """
    ledger = workspace.ledger
    records = [ledger.run(ref) for ref in refs]
    if sweep is not None:
        of_sweep = [ledger.run(run) for run in ledger.queue.labelled(LABEL, sweep)]
        if not of_sweep:
            raise BadConfig(f"no run is of a sweep called {sweep!r}; weft sweep FILE queues one")
        records += {record.name: record for record in of_sweep}.values()
    if not records:
        raise BadConfig("give runs, or --sweep NAME")
    unique = {record.id: record for record in records}.values()
    known: dict[str, int | None] = {}
    return compared([measured(ledger, record, known) for record in unique], metrics)


def measured(ledger: Ledger, record: RunRecord, known: dict[str, int | None]) -> Measured:
    """Return a run's setting and figures, from the ledger alone but for the trained parameters.

    Args:
        ledger: where the run is.
        record: the run.
        known: trained parameters of runs before it, to which this adds.
    """
    plan = planned(ledger, record)
    events = ledger.events(record.id)
    figures: dict[str, float] = dict(_scores(plan, record, History().after_all(events)))
    guarantee = ""
    if spent := list(spent_by_run(plan, ledger).values()):
        most = max(spent, key=lambda one: one.epsilon)
        figures["epsilon"] = most.epsilon
        guarantee = f"δ = {most.delta:g}, unit {most.unit}, {most.adjacency}"
    for kind, column in (("accepted", "bytes up"), ("assigned", "bytes down")):
        figures[column] = float(sum(e.data.get("bytes", 0) for e in events if e.kind == kind))
    figures["rounds"] = float(record.round)
    if record.started_at is not None and record.finished_at is not None:
        figures["seconds"] = (record.finished_at - record.started_at).total_seconds()
    if (trained := _trained(plan, known)) is not None:
        figures["trained parameters"] = float(trained)
    setting = flat(plan.config)
    return Measured(record.id, record.name, record.status, setting, figures, guarantee)


def compared(runs: Sequence[Measured], metrics: Sequence[str] = ()) -> Comparison:
    """Return runs beside each other; see :func:`compare`.

    Raises:
        BadConfig: if no run has one of the ``metrics``.
    """
    found = dict.fromkeys(c for run in runs for c in run.figures if c not in COSTS)
    for wanted in metrics:
        if wanted not in found:
            raise BadConfig(
                f"no run has the metric {wanted!r} ({', '.join(found) or 'none was evaluated'})"
            )
    private = any("epsilon" in run.figures for run in runs)
    costs = [c for c in COSTS if c != "epsilon" or private]
    columns = (*(metrics or found), *costs)
    by_setting: dict[str, list[Measured]] = {}
    for run in runs:
        by_setting.setdefault(json.dumps(dict(run.setting), sort_keys=True), []).append(run)
    everything = dict.fromkeys(key for run in runs for key in run.setting)
    keys = tuple(k for k in everything if len({run.setting.get(k) for run in runs}) > 1)
    lines = []
    for own in by_setting.values():
        figures = {
            column: _figure([run.figures[column] for run in own if column in run.figures])
            for column in columns
            if any(column in run.figures for run in own)
        }
        lines.append(Line(own[0].setting, tuple(run.run for run in own), figures))
    return Comparison(keys, columns, tuple(lines), tuple(_notes(runs, columns)))


def flat(config: RunConfig) -> dict[str, str]:
    """Return a config by dotted keys, but for its name and seed; what is not set has no key.

    A plug-in's options have keys of their own where they are not the default.
    """
    document = config.model_dump(mode="json", exclude=set(_NOT_SETTINGS))
    for kind in _SECTIONS:
        document[kind] = _unlike_default(kind, getattr(config, kind).checked(kind))
    return dict(_flattened(document, ""))


def _unlike_default(kind: str, choice: PluginChoice) -> dict[str, Any]:
    known = find_plugin(kind, choice.name).options
    options = {
        name: value
        for name, value in choice.options.items()
        if known[name].required or value != known[name].default
    }
    return {"": choice.name, **options}


def _flattened(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        path = f"{prefix}.{key}" if prefix and key else prefix or key
        if isinstance(inner, Mapping) and inner:
            yield from _flattened(inner, path)
        elif inner is not None and inner != {} and inner != []:
            yield path, shown(inner)


def _scores(plan: Plan, record: RunRecord, history: History) -> Mapping[str, float]:
    """Return what the evaluation of a run's final version found; nothing while there is none."""
    if record.status != "completed":
        return {}
    round_, judge = record.round, plan.config.judge
    if plan.config.select == "best" and (top := best(history.scored(judge.metric), judge)):
        round_ = top.round
    final = next((s for s in history.scores if s.round == round_), None)
    return {} if final is None else final.metrics


def _trained(plan: Plan, known: dict[str, int | None]) -> int | None:
    """Return how many parameters a client trains, or None if the base model is not here.

    Args:
        plan: of a run.
        known: what was found before, to which this adds.
    """
    key = repr((plan.model, plan.adapter, plan.strategy))
    if key not in known:
        adapter = ADAPTERS.get(plan.adapter.name).build(**plan.adapter.options)
        try:
            shapes = models.shapes(plan.model, adapter)
            known[key] = sum(math.prod(shapes[name]) for name in trained_names(plan, shapes))
        except models.ModelNotFound:
            known[key] = None
    return known[key]


def _figure(values: Sequence[float]) -> Figure:
    spread = stdev(values) if len(values) > 1 else None
    return Figure(len(values), mean(values), spread)


def _notes(runs: Sequence[Measured], columns: Iterable[str]) -> Iterator[str]:
    for guarantee in sorted({run.guarantee for run in runs if run.guarantee}):
        yield f"epsilon: the largest of a run's populations, {guarantee}"
    for column in columns:
        lacking = [run for run in runs if column not in run.figures]
        if lacking and len(lacking) < len(runs):
            which = ", ".join(f"{run.name} ({run.status})" for run in lacking[:5])
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            yield f"no {column}: {which}{more}"
    ended = [run for run in runs if run.status != "completed"]
    if ended:
        yield f"{len(ended)} of {len(runs)} runs are not completed"


def _cell(line: Line, column: str) -> str:
    found = line.figures.get(column)
    if found is None:
        return "-"
    few = "" if found.n == len(line.runs) else f" (n = {found.n})"
    return f"{found}{few}"


def _number(value: float) -> str:
    """Return four digits, or a whole number as it is.

    >>> _number(0.91234), _number(12_345_678.0), _number(0.0), _number(1.5e-7)
    ('0.9123', '12345678', '0', '1.5e-07')
    """
    return f"{value:.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.4g}"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "ε": r"$\varepsilon$",
    "δ": r"$\delta$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def _escaped(text: str) -> str:
    r"""Return a text as LaTeX prints it.

    >>> _escaped("50% ± 1")
    '50\\% $\\pm$ 1'
    """
    return re.sub(r"[\\~^±εδ&%$#_{}]", lambda found: _LATEX[found[0]], text)
