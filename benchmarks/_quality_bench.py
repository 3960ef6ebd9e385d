"""Driving a quality benchmark: the runs of its plan's sweeps, one after the other, as they lack.

The same command again does what is missing. Ctrl-C or SIGTERM puts the run it was at back.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from _quality_kept import Kept, load, save
from _quality_plan import (
    Cell,
    DataSet,
    Method,
    Plan,
    built_in,
    cell_sweep,
    find_data,
    held_back,
    only,
    sweep_document,
    tuning_sweep,
    write_sweep,
)
from _quality_report import Measured
from _quality_results import Result, Score, Tuned, affordable_rounds, curve, within

from orchestrator.coordinator import Driving
from orchestrator.federation import Observe
from orchestrator.steering import extend
from orchestrator.sweep import Point, Sweep, load_sweep
from orchestrator.sweep import points as points_of
from orchestrator.sweeping import drive_all, forecast, queue, standing
from orchestrator.workspace import Workspace, open_workspace
from storage.ledger import Queueing, RunRecord

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside the checkout
ENDED = ("completed", "failed", "cancelled")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Bench:
    """A plan, the home of its runs, where its data are, and what was measured before."""

    plan: Plan
    workspace: Workspace
    data: Mapping[str, DataSet]
    stop: threading.Event
    retry: bool = False
    kept: Kept = field(default_factory=Kept)

    def run(self) -> None:
        """Run what is missing of the plan, in its order, until all is done or ``stop`` is set."""
        for cell, seed, methods in self.plan.stages():
            if lacking := [m for m in methods if m.name not in self.kept.tuned]:
                self._drive(self._tuning(lacking))
            tuned = [self._tuned(method) for method in methods]
            if (document := self._cell(cell, seed, tuned)) is not None:
                self._drive(document)
                if self.plan.equal_bytes:
                    self._extend(cell, seed, document)
                    self._drive(document)
            if self.stop.is_set():
                return

    def measured(self) -> Measured:
        """Return what there is of the plan's runs, and what is missing."""
        tuned = tuple(self._tuned(method) for method in self.plan.methods)
        found: list[Result] = []
        for cell in self.plan.cells:
            for seed in self.plan.seeds:
                found += self._results(cell, seed, tuned)
        return Measured(self.plan, tuned, tuple(found))

    def _tuned(self, method: Method) -> Tuned:
        """Return how a method's learning rate was chosen, as far as its runs have ended."""
        if (before := self.kept.tuned.get(method.name)) is not None:
            return before
        name, points = _points(self._tuning((method,)))
        records = standing(self.workspace, name, points).records
        scores: dict[float, float | None] = {}
        missing = []
        for rate, point in zip(method.rates, points, strict=True):
            record = records.get(point.name)
            if record is None or record.status not in ENDED:
                missing.append(rate)
            else:
                last = self._curve(record)[-1:] if record.status == "completed" else []
                scores[rate] = last[0].accuracy if last else None
        return Tuned(method.name, scores, tuple(missing))

    def _results(self, cell: Cell, seed: int, tuned: Sequence[Tuned]) -> list[Result]:
        """Return what the runs of a cell and a seed reached, those that have got so far."""
        due = [method.name for method in self.plan.methods_in(cell)]
        before = (self.kept.results.get((cell.name, seed, name)) for name in due)
        found = [one for one in before if one is not None]
        document = self._cell(cell, seed, [one for one in tuned if one.method in due])
        if document is None:
            return found
        records = self._records(document)
        budget = self._budget(cell, seed, records) if self.plan.equal_bytes else None
        for method, record in records.items():
            scores = self._curve(record)
            steps = next((p for p in scores if p.round == self.plan.rounds), None)
            if steps is not None:
                done = budget is not None and record.round >= self._goal(record, budget)
                at = within(scores, budget) if done and budget is not None else None
                found.append(Result(cell, seed, method, steps, at))
        return found

    def _extend(self, cell: Cell, seed: int, document: Mapping[str, Any]) -> None:
        """Give runs that have moved less than the reference as many rounds as that is worth."""
        records = self._records(document)
        budget = self._budget(cell, seed, records)
        for record in records.values():
            if budget is None or record.status != "completed":
                continue
            if (goal := self._goal(record, budget)) > record.rounds:
                extend(self.workspace, record.id, str(goal))

    def _goal(self, record: RunRecord, budget: int) -> int:
        """Return how many rounds a run that has done the plan's is to have in the end."""
        rounds = self.plan.rounds
        first = [score for score in self._curve(record) if score.round == rounds]
        return max(rounds, affordable_rounds(first[0], budget)) if first else rounds

    def _budget(self, cell: Cell, seed: int, records: Mapping[str, RunRecord]) -> int | None:
        """Return how many bytes the reference moved; None before its run has come so far."""
        before = self.kept.results.get((cell.name, seed, self.plan.reference.name))
        if before is not None:
            return before.steps.up + before.steps.down
        reference = records.get(self.plan.reference.name)
        if reference is None:
            return None
        first = [score for score in self._curve(reference) if score.round == self.plan.rounds]
        return first[0].up + first[0].down if first else None

    def _records(self, document: Mapping[str, Any]) -> dict[str, RunRecord]:
        """Return the runs that there are of a cell's sweep, by their methods' names."""
        name, points = _points(document)
        records = standing(self.workspace, name, points).records
        by_values = {repr(point.values): records.get(point.name) for point in points}
        found = {}
        for method in self.plan.methods:
            for rate in method.rates:
                record = by_values.get(repr(method.values(rate)))
                if record is not None:
                    found[method.name] = record
        return found

    def _curve(self, record: RunRecord) -> list[Score]:
        return curve(self.workspace.ledger.events(record.id))

    def _tuning(self, methods: Sequence[Method]) -> dict[str, Any]:
        """Return the sweep of methods' learning rates."""
        data = self.data[self.plan.cells[0].data]
        held = held_back(data, self.workspace.home / "data")
        return tuning_sweep(self.plan, methods, held)

    def _cell(self, cell: Cell, seed: int, tuned: Sequence[Tuned]) -> dict[str, Any] | None:
        """Return the sweep of the methods that have a rate and no result; None of none."""
        methods = {method.name: method for method in self.plan.methods}
        tuned = [one for one in tuned if (cell.name, seed, one.method) not in self.kept.results]
        rates = [(methods[one.method], one.rate) for one in tuned]
        chosen = [method.values(rate) for method, rate in rates if rate is not None]
        if not chosen:
            return None
        base = self.plan.base(cell, seed, self.data[cell.data])
        return sweep_document(cell_sweep(cell, seed), seed, base, chosen)

    def _drive(self, document: Mapping[str, Any]) -> None:
        """Queue what is missing of a sweep and drive all that waits, in the plan's order."""
        if self.stop.is_set():
            return
        name, points = load_sweep(write_sweep(self.workspace.home / "sweeps", document))
        queue(self.workspace, forecast(self.workspace, name, points), Queueing(), self.retry)
        found = standing(self.workspace, name, points)
        records = {p.name: found.records[p.name] for p in points if p.name in found.records}
        driving = Driving(stop=self.stop, accept_drift=True)
        drive_all(self.workspace, replace(found, records=records), driving, told)


def _points(document: Mapping[str, Any]) -> tuple[str, list[Point]]:
    """Return a sweep's name and runs without a file."""
    return document["name"], points_of(Sweep.model_validate(document), document["base"])


def told(record: RunRecord) -> Observe:
    """Say on standard error how a run ends and what it took of the processor."""
    began = time.process_time()

    def seen(kind: str, data: Mapping[str, Any]) -> None:
        if kind in ("completed", "failed"):
            used = time.process_time() - began
            how = f"{kind}: {data['reason']}" if kind == "failed" else kind
            print(f"{record.name}: {used:.0f} s of processor time, {how}", file=sys.stderr)

    return seen


def stopping(stop: threading.Event) -> None:
    """Stop in order at SIGTERM or Ctrl-C; the run that is driven goes back into the queue."""

    def heard(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)


def measure(given: argparse.Namespace, plan: Plan, home: Path) -> Measured:
    """Run what is asked for and return what there is."""
    torch.set_num_threads(1)
    if given.quick:
        data = {plan.cells[0].data: built_in(home / "data", 200, 64)}
    else:
        data = find_data(given.data.resolve(), dict.fromkeys(cell.data for cell in plan.cells))
    kept = load(given.kept, plan, Measured(plan, (), ()).setting)
    workspace = open_workspace(home)
    bench = Bench(plan, workspace, data, threading.Event(), given.retry, kept)
    try:
        if not given.report:
            stopping(bench.stop)
            bench.run()
        found = bench.measured()
    finally:
        workspace.close()
    if given.kept and not given.report:
        save(given.kept[0], found)
    return found


def arguments(about: str, quick: str, full: str) -> argparse.ArgumentParser:
    """Return the parser of a quality benchmark's arguments.

    Args:
        about: what it measures.
        quick: what ``--quick`` is.
        full: what ``--full`` is.
    """
    parser = argparse.ArgumentParser(description=about)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=quick)
    size.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--home", type=Path, help="of the runs (default: ~/.cache/weft-bench)")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the data sets")
    parser.add_argument("--report", action="store_true", help="run nothing, print what there is")
    parser.add_argument("--retry", action="store_true", help="also runs that have failed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw it (needs weft[plots])")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true", help="tables as in docs/")
    return parser


def comparing(about: str, quick: str, full: str) -> argparse.ArgumentParser:
    """Return the parser of a benchmark that compares methods, with :func:`arguments`' ones."""
    parser = arguments(about, quick, full)
    parser.add_argument(
        "--only", metavar="METHOD", nargs="+", help="of the plan's methods, and what they need"
    )
    parser.add_argument(
        "--kept",
        type=Path,
        action="append",
        default=[],
        metavar="JSON",
        help="what is in it is not run again, and what is new is added; of more, the first is",
    )
    return parser


def in_home(given: argparse.Namespace, name: str, use: Callable[[Path], Found]) -> Found:
    """Return what ``use`` makes of the home that is asked for.

    Args:
        given: of :func:`arguments`.
        name: of the default home's folder; ``--quick`` has one that is dropped.
        use: is called with the home.
    """
    if given.quick:
        with tempfile.TemporaryDirectory() as folder:
            return use(given.home or Path(folder))
    cache = Path(os.environ.get("WEFT_BENCH_CACHE") or Path.home() / ".cache" / "weft-bench")
    return use((given.home or cache / name).resolve())


def measured_as_asked(
    given: argparse.Namespace, name: str, plan: Plan, show: Callable[[Measured], None]
) -> None:
    """Measure a plan in its home, and show what there is.

    Args:
        given: of :func:`arguments`.
        name: of the default home's folder.
        plan: what to measure.
        show: prints.
    """
    if given.only:
        plan = only(plan, given.only)
    found = in_home(given, name, lambda home: measure(given, plan, home))
    show(found)
    if given.plot is not None:
        from _quality_plot import draw

        draw(found, given.plot)
