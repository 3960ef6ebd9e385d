"""Driving a continual benchmark: the streams of its plan, one after the other, as they lack."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from _continual_data import Part, TaskData, built_in_parts, clinc_parts, task_data, whole_part
from _continual_plan import DOMAINS, TUNING_SEED, Cell, Choice, Method, Plan
from _continual_report import Measured
from _continual_results import Found, Tuned, found_in, keep, keep_all, load, load_all, tuning_score
from _quality_bench import stopping, told
from _quality_plan import find_data

from orchestrator.config import BadConfig
from orchestrator.coordinator import Driving, Stopped
from orchestrator.federation import RoundFailed
from orchestrator.stream import parse_stream
from orchestrator.stream_report import report
from orchestrator.streaming import run_stream
from orchestrator.versions import EvaluationFailed
from orchestrator.workspace import Workspace, open_workspace

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Streams:
    """A home of streams, each driven to its end and measured once.

    Attributes:
        workspace: where they are.
        stop: set it to stop at the next event; the run at hand goes back into the queue.
        retry: whether streams that have failed are driven again.
        kept: what came of streams of other homes, by name.
    """

    workspace: Workspace
    stop: threading.Event = field(default_factory=threading.Event)
    retry: bool = False
    kept: Mapping[str, Found] = field(default_factory=dict)

    def known(self, document: Mapping[str, Any]) -> Found | None:
        """Return what is known of a stream, by its name; None of nothing."""
        return load(self._path(document)) or self.kept.get(document["name"])

    def all_known(self) -> dict[str, Found]:
        """Return what is known of all streams that are done or have failed."""
        here = {p.stem: load(p) for p in (self.workspace.home / "found").glob("*.json")}
        found = {name: one for name, one in here.items() if one and (one.done or one.failed)}
        return {**self.kept, **found}

    def drive(self, document: Mapping[str, Any]) -> None:
        """Run what a stream lacks, and write down what came of it."""
        before = self.known(document) or Found()
        if self.stop.is_set() or before.done or (before.failed and not self.retry):
            return
        began = time.process_time()
        failed = ""
        try:
            stream = parse_stream(document)
            driving = Driving(stop=self.stop, accept_drift=True)
            run_stream(self.workspace, stream, driving, told)
        except Stopped:
            pass
        except (BadConfig, RoundFailed, EvaluationFailed) as error:
            failed = str(error)
            print(f"{document['name']}: {failed}", file=sys.stderr)
        spent = before.cpu_s + time.process_time() - began
        found = replace(before, cpu_s=spent, failed=failed)
        if not failed and not self.stop.is_set():
            found = found_in(self.workspace, report(self.workspace, stream.name), spent)
            print(f"{stream.name}: {spent:.0f} s of processor time", file=sys.stderr)
        keep(self._path(document), found)

    def _path(self, document: Mapping[str, Any]) -> Path:
        return self.workspace.home / "found" / f"{document['name']}.json"


@dataclass(frozen=True, slots=True)
class Bench:
    """A plan, its streams, and the parts that its tasks are made of."""

    plan: Plan
    streams: Streams
    parts: Mapping[str, Part]
    _made: dict[tuple[tuple[str, ...], bool], TaskData] = field(default_factory=dict, init=False)

    def run(self) -> None:
        """Run what is missing of the plan, in its order, until all is done or stopped."""
        for cell, seed, method in self.plan.streams():
            for choice in method.choices:
                self.streams.drive(self._tuning(method, choice))
            choice = self.tuned(method).choice
            if choice is not None:
                self.streams.drive(self._document(cell, seed, method, choice))
            if self.streams.stop.is_set():
                return

    def measured(self) -> Measured:
        """Return what there is of the plan's streams."""
        tuned = {method.name: self.tuned(method) for method in self.plan.methods}
        found: dict[tuple[str, int, str], Found] = {}
        for cell, seed, method in self.plan.streams():
            choice = tuned[method.name].choice
            if choice is not None:
                one = self.streams.known(self._document(cell, seed, method, choice))
                found |= {} if one is None else {(cell.name, seed, method.name): one}
        tried = [
            one
            for method in self.plan.methods
            for choice in method.choices
            if (one := self.streams.known(self._tuning(method, choice))) is not None
        ]
        spent = sum(one.cpu_s for one in (*found.values(), *tried))
        return Measured(self.plan, tuple(tuned.values()), found, spent)

    def tuned(self, method: Method) -> Tuned:
        """Return how a method's rate was chosen, as far as its streams have ended."""
        scores: dict[Choice, float | None] = {}
        missing = []
        for choice in method.choices:
            one = self.streams.known(self._tuning(method, choice))
            if one is None or not (one.done or one.failed):
                missing.append(choice)
            else:
                scores[choice] = tuning_score(one)
        return Tuned(method, scores, tuple(missing))

    def _tuning(self, method: Method, choice: Choice) -> dict[str, Any]:
        return self._document(self.plan.tuning, TUNING_SEED, method, choice, tuning=True)

    def _document(
        self, cell: Cell, seed: int, method: Method, choice: Choice, tuning: bool = False
    ) -> dict[str, Any]:
        tasks = [self._task(names, tuning) for names in cell.order(seed)]
        return self.plan.document(cell, seed, method, choice, tasks)

    def _task(self, names: tuple[str, ...], tuning: bool) -> TaskData:
        """Return a task, its files written once."""
        if (names, tuning) not in self._made:
            folder = self.streams.workspace.home / "data"
            parts = [self.parts[name] for name in names]
            self._made[names, tuning] = task_data(parts, folder, tuning)
        return self._made[names, tuning]


def parts_of(plan: Plan, folder: Path) -> dict[str, Part]:
    """Return the parts that a plan's tasks are made of, from a folder of data sets."""
    wanted = {name for cell in (*plan.cells, plan.tuning) for task in cell.tasks for name in task}
    if not wanted - {f"types-{n}" for n in range(10)}:
        return built_in_parts(len(wanted), plan.train, plan.test)
    sets = sorted(wanted - set(DOMAINS))
    data = find_data(folder, [*sets, "clinc150"])
    most = {"train": plan.train, "test": plan.test}
    found = clinc_parts(folder, data["clinc150"])
    return found | {name: whole_part(name, data[name], most) for name in sets}


def measure(given: argparse.Namespace, plan: Plan, home: Path) -> Measured:
    """Run what is asked for and return what there is."""
    parts = parts_of(plan, given.data.resolve())
    return with_streams(given, home, lambda s: _measured(given, Bench(plan, s, parts)))


def _measured(given: argparse.Namespace, bench: Bench) -> Measured:
    if not given.report:
        bench.run()
    return bench.measured()


def with_streams(given: argparse.Namespace, home: Path, use: Callable[[Streams], Result]) -> Result:
    """Return what ``use`` makes of the streams of a home, one thread at work on them."""
    torch.set_num_threads(1)
    workspace = open_workspace(home)
    streams = Streams(workspace, retry=given.retry, kept=load_all(given.kept))
    try:
        if not given.report:
            stopping(streams.stop)
        found = use(streams)
        if given.kept and not given.report:
            keep_all(given.kept, streams.all_known())
        return found
    finally:
        workspace.close()
