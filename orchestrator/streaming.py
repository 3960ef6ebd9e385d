"""A stream's runs: what is done, what comes next, driving it, and going on from any task.

Nothing of a stream is kept but its runs. Each carries the stream's whole file in its first event,
so that whoever drives a task, a coordinator too, knows which one follows; what is to follow and
came later is an event of the newest run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.backends.base import Backend
from orchestrator.config import RunConfig
from orchestrator.coordinator import Driving, claim, drive
from orchestrator.federation import Observe
from orchestrator.launch import anchored
from orchestrator.service import Allow, merge, submit
from orchestrator.signing import admitted
from orchestrator.steering import requeue
from orchestrator.stream import STREAM, TASK, Stage, Stream, parse_stream
from orchestrator.stream_routing import route
from orchestrator.suite import Row, refuse_private_tests, score
from orchestrator.sweep import said, shown
from orchestrator.workspace import Workspace
from storage.canonical import canonical_json
from storage.ledger import Ledger, Queueing, RunExists, RunRecord
from storage.refs import did_you_mean

_NO_RESULT = ("name", "backend", "loggers", "notify", "retention", "deadline_s", "retries")
"""Keys of a run's file that decide no result."""
DETACHED: Mapping[str, Any] = {"detached": True}
"""What the first event of a stream's run says where a coordinator goes on with the stream."""
_MOST_TOLD = 5
_OURS = ("clients", "orchestrator", "storage", "strategies")
_LOG = logging.getLogger(__name__)


class UnknownStream(LookupError):
    """No stream is called this."""


class ChangedTask(ValueError):
    """A task that was run is another in the file by now."""


@dataclass(frozen=True, slots=True)
class Step:
    """A stage of a stream and how it stands.

    Attributes:
        stage: the stage.
        record: its run, or None where there is none (yet).
        version: the version that its training ended with, or None.
        result: the version that is the stream's after it: the same, or a merge of those so far;
            None also where that is to be merged yet.
    """

    stage: Stage
    record: RunRecord | None = None
    version: str | None = None
    result: str | None = None

    @property
    def status(self) -> str:
        """Where it stands in a word."""
        if self.record is None:
            return "missing" if self.version is None else "given"
        return self.record.status

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        record = self.record
        return {
            "task": self.stage.name,
            "status": self.status,
            "run": record and record.id,
            "version": self.version,
            "result": self.result,
            "error": record and record.error,
        }


def streams(ledger: Ledger) -> list[str]:
    """Return the names of the streams that have runs, sorted."""
    return ledger.queue.labels(STREAM)


def recorded(workspace: Workspace, name: str) -> Stream:
    """Return a stream as it was last given.

    Raises:
        UnknownStream: if there is none of this name.
    """
    ledger = workspace.ledger
    runs = ledger.queue.labelled(STREAM, name)
    for run in reversed(runs):
        events = ledger.events(run, kinds={"queued", "stream"})
        for event in reversed(events):
            if "stream" in event.data:
                return parse_stream(event.data["stream"], f"stream {name}")
    hint = did_you_mean(name, streams(ledger)) or "; weft stream run FILE starts one"
    raise UnknownStream(f"no stream is called {name!r}{hint}")


def steps(workspace: Workspace, stream: Stream) -> list[Step]:
    """Return how each stage of a stream stands; those after one that has no result are missing.

    Raises:
        ChangedTask: if a task that was run is another in the stream by now.
        UnknownVersion: if a version that the file names is not there.
    """
    ledger = workspace.ledger
    newest: dict[str, RunRecord] = {}
    for run in ledger.queue.labelled(STREAM, stream.name):
        record = ledger.run(run)
        if record.status != "cancelled":
            newest[record.labels[TASK]] = record
    found: list[Step] = []
    results: list[str] = []
    for number, stage in enumerate(stream.stages):
        if stage.version is not None:
            version = admitted(workspace, stage.version).id
            results.append(version)
            found.append(Step(stage, None, version, _result(workspace, stream, results)))
            continue
        made = newest.get(stage.name)
        if made is None or len(results) < number:
            found.append(Step(stage))
            continue
        _refuse_changed(stream, stage, made, stream.config(number, results))
        done = made.version if made.status == "completed" else None
        results += [done] if done else []
        result = _result(workspace, stream, results) if done else None
        found.append(Step(stage, made, done, result))
    return found


def _result(workspace: Workspace, stream: Stream, trained: Sequence[str]) -> str | None:
    """Return the stream's version after so many trained ones; None if it is to be merged yet."""
    if stream.merge is None or len(trained) == 1:
        return trained[-1]
    wanted, weights = dict.fromkeys(trained, "merge"), _weights(stream, trained)
    for version in workspace.store.descendants(trained[-1], depth=1).nodes.values():
        recipe, parents = version.recipe, {p.id: p.kind for p in version.parents}
        same = recipe.get("merge") == asdict(stream.merge) and recipe.get("weights") == weights
        if parents == wanted and same:
            return version.id
    return None


def _weights(stream: Stream, trained: Sequence[str]) -> dict[str, float]:
    weight = stream.merge_weight
    return dict.fromkeys(trained, 1 / len(trained) if weight is None else weight)


def settle(workspace: Workspace, stream: Stream) -> list[Step]:
    """Merge and name what the tasks that are done ended with, and return how the stream stands."""
    found = steps(workspace, stream)
    named = {v.id for v in workspace.store.versions(name=stream.name, limit=10_000)}
    trained: list[str] = []
    for number, step in enumerate(found):
        if step.version is None:
            break
        trained.append(step.version)
        if step.result is None:
            weights = list(_weights(stream, trained).values())
            assert stream.merge is not None
            merged = merge(
                workspace, trained, stream.merge, stream.name, weights, Allow(union=True)
            )
            found[number] = replace(step, result=merged)
        elif step.result not in named:
            workspace.store.name(stream.name, step.result)
    return found


def _refuse_changed(stream: Stream, stage: Stage, record: RunRecord, config: RunConfig) -> None:
    """Refuse a task that was run otherwise than the file has it.

    Raises:
        ChangedTask: naming the task and what of it changed.
    """
    before, now = _setting(RunConfig.model_validate(record.config)), _setting(anchored(config))
    if before == now:
        return
    told = [
        f"{key}: {before.get(key, '-')} was run, {now.get(key, '-')} is asked for"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    more = f" and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
    raise ChangedTask(
        f"task {stage.name!r} of stream {stream.name!r} was run otherwise "
        f"({'; '.join(told[:_MOST_TOLD])}{more}), and what came after it was trained on that; "
        "put it back, or go on from a task before it: "
        f"weft stream fork {stream.name} FILE --at TASK"
    )


def _setting(config: RunConfig) -> dict[str, str]:
    """Return all of a config that decides its results, by dotted key, as text."""
    unread = set(_NO_RESULT)
    if config.stop is None and config.select == "last":
        unread.add("evaluate")
    document = said(config.model_dump(mode="json", exclude=unread))
    # what was run was kept with its keys sorted, an option's as well
    return _flat(json.loads(canonical_json(document, "a setting")))


def _flat(document: Mapping[str, Any], before: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + key] = shown(value)
    return found


def rows(workspace: Workspace, stream: Stream, found: Sequence[Step]) -> list[Row]:
    """Return a stream's versions as rows of its matrix; the first is that before training."""
    done = [step for step in found if step.result is not None]
    if not done:
        return []
    own: dict[str, str] = {}
    made: list[Row] = []
    first = _start_of(workspace, str(done[0].version))
    if first is not None:
        made.append(Row(0, first, {}))
    for step in done:
        if stream.start in ("fresh", "isolated"):
            own[step.stage.name] = str(step.version)
        made.append(Row(step.stage.trained, str(step.result), dict(own)))
    return made


def _start_of(workspace: Workspace, version: str) -> str | None:
    """Return the version that the run which ended with ``version`` began with."""
    lineage = workspace.store.lineage(version)
    before = {e.child: e.parent for e in lineage.edges if e.kind in ("init", "round")}
    while lineage.nodes[version].recipe["kind"] != "start":
        if version not in before:
            return None
        version = before[version]
    return version


def advance(
    workspace: Workspace, stream: Stream, queueing: Queueing | None = None, retry: bool = False
) -> RunRecord | None:
    """Name the results that there are, queue the next task, and return its run.

    Args:
        workspace: where.
        stream: the stream.
        queueing: how a new run waits; it has the stream's labels besides.
        retry: put a run that failed or was paused back into the queue.

    Returns:
        The run that waits, goes on, or failed; None when all tasks are done.

    Raises:
        BadConfig: if the task cannot be run; nothing was queued.
        PrivateData: if a task is measured on data of a client; nothing was queued.
        ChangedTask: as :func:`steps`.
    """
    found = settle(workspace, stream)
    results = [step.version for step in found if step.version is not None]
    waiting = next((step for step in found if step.version is None), None)
    if waiting is None:
        return None
    if waiting.record is not None:
        if retry and waiting.record.status in ("failed", "paused"):
            return requeue(workspace, waiting.record.id)
        return waiting.record
    refuse_private_tests(workspace, stream)
    config = stream.config(len(results), results)
    run = _run_id(workspace, stream, waiting.stage, config)
    wait = queueing or Queueing()
    labels = {**wait.labels, STREAM: stream.name, TASK: waiting.stage.name}
    facts = {**wait.facts, "stream": dict(stream.document)}
    wait = replace(wait, labels=labels, facts=facts)
    with suppress(RunExists):  # somebody was faster, with the same run
        submit(workspace, config, wait, run)
    return workspace.ledger.run(run)


def _run_id(workspace: Workspace, stream: Stream, stage: Stage, config: RunConfig) -> str:
    """Return the id of a task's run, the same for all who would queue it."""
    ledger = workspace.ledger
    past = [ledger.run(run) for run in ledger.queue.labelled(STREAM, stream.name)]
    cancelled = [record.id for record in past if record.labels[TASK] == stage.name]
    facts = [stream.name, stage.name, config.model_dump(mode="json"), cancelled]
    return hashlib.sha256(canonical_json(facts, "a task").encode()).hexdigest()[:12]


def run_stream(
    workspace: Workspace,
    stream: Stream,
    driving: Driving,
    watch: Callable[[RunRecord], Observe],
    queueing: Queueing | None = None,
) -> list[Step]:
    """Drive what is left of a stream here, task after task, and measure each; return how it stands.

    What was interrupted goes on where it stopped, and ends at the versions it would have.

    Args:
        workspace: where.
        stream: the stream.
        driving: how; its ``stop`` ends the stream after the event at hand.
        watch: returns what is called with each event of a run.
        queueing: how runs wait for the moment between being queued and being driven.

    Raises:
        BadConfig, ChangedTask: as :func:`advance`.
        RunBusy: if another process is driving a task.
        RoundFailed, Paused, Cancelled, Stopped: as :func:`orchestrator.coordinator.drive`.
        EvaluationFailed: if a version could not be scored.
    """
    keep(workspace, stream)
    while not driving.stop.is_set():
        record = advance(workspace, stream, queueing, retry=True)
        measure(workspace, stream, driving.backend)
        if record is None:
            break
        mine = claim(workspace, record, driving.lease_s)
        drive(workspace, mine, watch(mine), driving)
    return steps(workspace, stream)


def measure(workspace: Workspace, stream: Stream, backend: Backend | None = None) -> int:
    """Score what was not of a stream's versions; return how many scores were missing."""
    lines = rows(workspace, stream, steps(workspace, stream))
    return score(workspace, stream, lines, backend) + route(workspace, stream, lines)


def keep(workspace: Workspace, stream: Stream) -> None:
    """Write down what a stream's file says by now, where it has runs and says something new."""
    ledger = workspace.ledger
    runs = ledger.queue.labelled(STREAM, stream.name)
    if runs and recorded(workspace, stream.name).document != stream.document:
        steps(workspace, stream)  # refuses what was changed, before it is written
        ledger.record(runs[-1], "stream", {"stream": dict(stream.document)})


def follow(workspace: Workspace, record: RunRecord) -> None:
    """Queue what follows a task of a stream that was driven to its end; of other runs, nothing.

    It waits as the task did. What goes wrong is told in the log and is no error here: others in the
    queue must not wait.
    """
    name = record.labels.get(STREAM)
    if name is None or workspace.ledger.run(record.id).status != "completed":
        return
    labels = {k: v for k, v in record.labels.items() if k not in (STREAM, TASK)}
    try:
        stream = recorded(workspace, name)
        advance(workspace, stream, Queueing(record.priority, labels, facts=DETACHED))
        measure(workspace, stream)  # what cannot be measured keeps no task waiting
    except Exception as error:  # one stream's error must not keep the others waiting
        ours = type(error).__module__.partition(".")[0] in _OURS
        _LOG.error("stream %s goes no further: %s", name, error, exc_info=not ours)


@dataclass(frozen=True, slots=True)
class Following:
    """A coordinator's part in streams: each task that is done has the next one queued.

    Attributes:
        workspace: where.
    """

    workspace: Workspace
    _known: set[str] = field(default_factory=set, init=False)

    def after(self, record: RunRecord) -> None:
        """Queue what follows a run that was driven; see :func:`follow`."""
        self._known.add(record.id)
        follow(self.workspace, record)

    def idle(self) -> None:
        """Queue what follows tasks whose coordinator ended before it did so.

        Of streams that are left to coordinators: another is its caller's to go on with.
        """
        ledger = self.workspace.ledger
        for name in streams(ledger):
            record = ledger.run(ledger.queue.labelled(STREAM, name)[-1])
            if record.id in self._known or record.status != "completed":
                continue
            [queued] = ledger.events(record.id, kinds={"queued"})[:1]
            if DETACHED.items() <= queued.data.items():
                self.after(record)
