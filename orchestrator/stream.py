"""A stream: one YAML file that stands for tasks which arrive one after the other.

Each task is a run of its own, and what it starts from is the result of the task before. What a run
is follows from the file and the ids of those results alone, so that a task that was run is found
again, and one that was changed since is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from clients.assignment import DataSpec, PluginChoice
from clients.regularizers import REGULARIZERS
from orchestrator.config import BadConfig, Choice, RunConfig, parse_config, with_values
from orchestrator.joint import joined
from orchestrator.policy import ANSWERS, LOWER_IS_BETTER
from orchestrator.stream_file import (
    Method,
    StreamFile,
    TaskFile,
    anchored_run,
    anchored_stream,
    read_stream,
)
from orchestrator.stream_refusals import strategy_of, stream_problem
from strategies.base import starts_of
from strategies.plugins import BadOptions, UnknownPlugin

STREAM, TASK = "stream", "task"
"""The labels of a stream's runs: the stream's name, and the task's."""
GENERAL = "general"
"""What the column of general text is called."""


@dataclass(frozen=True, slots=True)
class Task:
    """A task of a stream.

    Attributes:
        name: unique in the stream.
        labels: those that it brings, in the order of the label set; empty for all there are.
        test: what its column of the matrix is measured on; None for no column.
        version: the version that is its result already, or None.
        answer_tokens: of a causal model's answers at most; 0 where none are asked for.
        router: public data by which a router knows the task's inputs; None for no router.
    """

    name: str
    labels: tuple[str, ...]
    test: DataSpec | None
    version: str | None = None
    answer_tokens: int = 0
    router: DataSpec | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of a stream.

    Attributes:
        name: of the task, or ``joint-N`` of all N of them.
        trained: how many of the tasks its result was trained on.
        version: its result, where nothing is to be run; else None.
        document: the run's file, but for what follows from the stages before.
    """

    name: str
    trained: int
    version: str | None
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream, checked.

    Attributes:
        name: the stream's; its versions are ``NAME:v1``, ``NAME:v2``, …
        document: the whole file, with absolute paths: what makes this stream again.
        tasks: in order.
        stages: the runs, in order; one a task, but for joint training.
        labels: the label set after all tasks; empty for causal-lm.
        start: how a task starts from the one before.
        library: whether a task's library is the versions before it.
        metric: what the matrix is of.
        general: text of no task, as a column beside the matrix; None for none.
        merge: what makes one version of those of all tasks so far; None for nothing.
        merge_weight: what each of them counts; None for one part of as many.
    """

    name: str
    document: Mapping[str, Any]
    tasks: tuple[Task, ...]
    stages: tuple[Stage, ...]
    labels: tuple[str, ...]
    start: str
    library: bool
    metric: str
    general: Task | None = None
    merge: PluginChoice | None = None
    merge_weight: float | None = None

    @property
    def routed(self) -> bool:
        """Whether a router may choose the adapter that answers."""
        return self.tasks[0].router is not None

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is a loss or its like."""
        return self.metric in LOWER_IS_BETTER

    def config(self, number: int, results: Sequence[str]) -> RunConfig:
        """Return the config of a stage's run.

        Args:
            number: of the stage, from 0.
            results: ids of the versions that the stages before ended with, as many as they are.

        Raises:
            BadConfig: with a line for each mistake.
        """
        document, values = self.stages[number].document, dict[str, Any]()
        if results and self.start in ("continue", "stack", "fresh"):
            values |= {"start": self.start, "start_from": results[-1]}
        if results and self.library:
            values["library"] = [*document.get("library", ()), *results]
        return parse_config({**document, **values})


def load_stream(path: str | Path) -> Stream:
    """Return the stream in a YAML file, every run of it checked.

    Raises:
        BadConfig: with a line for each mistake.
    """
    return parse_stream(read_stream(path), str(path))


def parse_stream(document: Mapping[str, Any], where: str = "the stream") -> Stream:
    """Return the stream that a file's content stands for; paths in it become absolute.

    Args:
        document: the file's content, ``base`` included.
        where: the file, for messages.

    Raises:
        BadConfig: with a line for each mistake.
    """
    try:
        file = StreamFile.model_validate(document)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise BadConfig("\n".join(f"{where}: {line}" for line in lines)) from None
    if isinstance(file.base, str):
        raise BadConfig(f"{where}: base: give what is in {file.base}, or read it from a file")
    names = [task.name for task in file.tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadConfig(f"{where}: tasks: two are called {twice!r}; a task's name is its own")
    base = anchored_run({**file.base, **file.method.overrides()})
    anchored = anchored_stream(file, base)
    file = StreamFile.model_validate(anchored)
    sets = _label_sets(_declared(base, where), file.tasks)
    stages = _stages(file, base, sets)
    configs = [_checked(stage, where) for stage in stages]
    start = file.method.start or _natural_start(configs[-1])
    merge = _merge(file.method.merge, where)
    problem = stream_problem(file, start, configs, merge)
    if problem:
        raise BadConfig(f"{where}: {problem}")
    return Stream(
        name=file.name,
        document=anchored,
        tasks=tuple(_task(task, sets[-1]) for task in file.tasks),
        stages=tuple(stages),
        labels=sets[-1],
        start=start,
        library=_recycles(configs[-1]) if file.method.library is None else file.method.library,
        metric=_metric(file, configs[-1], where),
        general=_general(file, configs[-1].task, where),
        merge=merge,
        merge_weight=_merge_weight(file.method, start),
    )


def _merge(chosen: Choice | None, where: str) -> PluginChoice | None:
    """Return a merge, checked; None for none.

    Raises:
        BadConfig: if there is none of this name, or it is wrongly set.
    """
    try:
        return None if chosen is None else chosen.checked("merge")
    except (UnknownPlugin, BadOptions) as error:
        raise BadConfig(f"{where}: method.merge: {error}") from None


def _merge_weight(method: Method, start: str) -> float | None:
    """Return what each version counts in a merge: adapters that go on are whole, others parts."""
    if method.merge_weight is None:
        return None if start == "continue" else 1.0
    return None if method.merge_weight == "mean" else method.merge_weight


def _metric(file: StreamFile, config: RunConfig, where: str) -> str:
    """Return what the matrix is of.

    Raises:
        BadConfig: if the tasks are not scored by it.
    """
    kind = config.task
    tested = [task.evaluate for task in file.tasks if task.evaluate is not None]
    answered = [test for test in tested if test.generate is not None]
    if answered and kind != "causal-lm":
        raise BadConfig(f"{where}: evaluate.generate: {kind} has no answers; leave generate out")
    allowed = config.metrics + (ANSWERS if answered and len(answered) == len(tested) else ())
    metric = file.metric or config.metrics[0]
    if metric not in allowed:
        listed = ", ".join(allowed)
        more = "; give every evaluate generate: N" if metric in ANSWERS else ""
        raise BadConfig(f"{where}: metric: {kind} is not scored by {metric!r} ({listed}){more}")
    return metric


def _general(file: StreamFile, kind: str, where: str) -> Task | None:
    """Return the text of no task, as a column.

    Raises:
        BadConfig: if the model is none that has a perplexity, or a task is called as the column is.
    """
    if file.general is None:
        return None
    if kind != "causal-lm":
        raise BadConfig(f"{where}: general: {kind} has no perplexity; it is for causal-lm")
    if GENERAL in [task.name for task in file.tasks]:
        raise BadConfig(f"{where}: general: a task is called {GENERAL!r}; give it another name")
    return Task(GENERAL, (), DataSpec(file.general.data, dict(file.general.fields)))


def _natural_start(config: RunConfig) -> str:
    """Return how tasks follow by what the regularizers, or else the strategy, say of themselves."""
    plugins = config.checked_plugins()
    wanted = [
        *(
            REGULARIZERS.get(one.name).build(**one.options).starts
            for one in plugins["regularizers"]
        ),
        starts_of(strategy_of(config)),
    ]
    return next((one for one in wanted if one != "continue"), "continue")


def _recycles(config: RunConfig) -> bool:
    """Return whether the strategy makes something of the versions before."""
    return "recycles" in strategy_of(config).capabilities


def _declared(base: Mapping[str, Any], where: str) -> Sequence[str]:
    """Return the labels that the base declares, before any task brings some.

    Raises:
        BadConfig: if they are no list of names.
    """
    found = base.get("labels") or ()
    if isinstance(found, list | tuple) and all(isinstance(one, str) for one in found):
        return found
    raise BadConfig(f"{where}: base: labels must be a list of names, got {found!r}")


def _label_sets(declared: Sequence[str], tasks: Sequence[TaskFile]) -> list[tuple[str, ...]]:
    """Return the label set of each task: the base's, and what has come by then, in order."""
    found: list[tuple[str, ...]] = []
    known = tuple(declared)
    for task in tasks:
        known += tuple(label for label in task.labels if label not in known)
        found.append(known)
    return found


def _stages(
    file: StreamFile, base: Mapping[str, Any], sets: Sequence[tuple[str, ...]]
) -> list[Stage]:
    if file.method.start == "joint":
        return [_joint(file, base, sets[-1])]
    stages = []
    for number, (task, labels) in enumerate(zip(file.tasks, sets, strict=True), 1):
        document = _document(file.name, base, task)
        if labels:
            document["labels"] = list(labels)
        if task.labels:
            document["task_labels"] = list(task.labels)
        stages.append(Stage(task.name, number, task.version, document))
    return stages


def _document(stream: str, base: Mapping[str, Any], task: TaskFile) -> dict[str, Any]:
    """Return a task's run's file, without its labels and where it starts."""
    document = {**base, "name": f"{stream}.{task.name}"}
    if task.clients is not None:
        document["clients"] = task.clients
    simulate = {"data": task.data, "fields": task.fields}
    values: dict[str, Any] = {
        f"clients.simulate.{k}": v for k, v in simulate.items() if v is not None
    }
    if task.rounds is not None:
        values["rounds"] = task.rounds
    own = base.get("evaluate")
    if task.evaluate is not None and isinstance(own, Mapping) and "clients" not in own:
        values |= {"evaluate.data": task.evaluate.data, "evaluate.fields": task.evaluate.fields}
    return with_values(document, values | task.set)


def _joint(file: StreamFile, base: Mapping[str, Any], labels: tuple[str, ...]) -> Stage:
    """Return the one run that trains on the data of all tasks, for as many rounds as they have."""
    parts = [_document(file.name, base, task) for task in file.tasks]
    if len({str(task.set) for task in file.tasks}) > 1:
        raise BadConfig("method: joint training is one run, and tasks differ in what they set")
    clients = [part["clients"] for part in parts]
    rounds = sum(part.get("rounds", RunConfig.model_fields["rounds"].default) for part in parts)
    name = f"joint-{len(parts)}"
    document = {
        **parts[0],
        "name": f"{file.name}.{name}",
        "clients": joined(clients),
        "rounds": rounds,
    }
    if labels:
        document["labels"] = list(labels)
    own = {label for task in file.tasks for label in task.labels}
    if all(task.labels for task in file.tasks) and own < set(labels):
        document["task_labels"] = [label for label in labels if label in own]
    return Stage(name, len(file.tasks), None, document)


def _checked(stage: Stage, where: str) -> RunConfig:
    try:
        return parse_config(stage.document)
    except BadConfig as error:
        lines = [f"{where}: task {stage.name}: {line}" for line in str(error).splitlines()]
        raise BadConfig("\n".join(lines)) from None


def _task(task: TaskFile, labels: Sequence[str]) -> Task:
    own = tuple(label for label in labels if label in task.labels)
    test = task.evaluate
    spec = None
    if test is not None:
        spec = DataSpec(test.data, dict(test.fields), labels=own)
    tokens = 0 if test is None else test.generate or 0
    knows = None
    if task.router is not None:
        knows = DataSpec(task.router.data, dict(task.router.fields), labels=own)
    return Task(task.name, own, spec, task.version, tokens, knows)
