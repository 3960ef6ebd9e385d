"""Going on from any task of a stream with other tasks, or another method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config import BadConfig
from orchestrator.stream import Stream, parse_stream
from orchestrator.streaming import recorded, steps
from orchestrator.workspace import Workspace


def forked(workspace: Workspace, origin: str, document: Mapping[str, Any], at: str) -> Stream:
    """Return the stream in a file that goes on from a task of another stream.

    The tasks up to it are the other's, by their versions; what the file says of them is not read.

    Args:
        workspace: where.
        origin: name of the other stream.
        document: of a stream's file, with a name of its own and the tasks that follow.
        at: the last task that both have in common.

    Raises:
        UnknownStream: if there is no such stream.
        BadConfig: if the task is not done, or the file cannot be run.
    """
    old = recorded(workspace, origin)
    done = {step.stage.name: step.version for step in steps(workspace, old)}
    names = [task.name for task in old.tasks]
    if at not in names or done.get(at) is None:
        reached = ", ".join(n for n in names if done.get(n)) or "none"
        raise BadConfig(
            f"stream {origin!r} has no result of a task {at!r} to go on from (done: {reached})"
        )
    if document.get("name") == origin:
        raise BadConfig(f"a fork needs a name of its own, and {origin!r} is taken; give --name NEW")
    common = names[: names.index(at) + 1]
    past = {task["name"]: task for task in old.document["tasks"]}
    known = [{**past[name], "version": done[name]} for name in common]
    listed = document.get("tasks") or ()
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise BadConfig(f"the file's tasks must be a list, got {listed!r}")
    new = [t for t in listed if not (isinstance(t, Mapping) and t.get("name") in common)]
    if not new:
        raise BadConfig(f"the file has no task after {at!r}; a fork goes on with another")
    base = document.get("base")
    ours = {"labels": _labels(old, len(common), base)} if isinstance(base, Mapping) else {}
    merged = {**base, **ours} if isinstance(base, Mapping) else base
    return parse_stream({**document, "base": merged, "tasks": [*known, *new]})


def _labels(old: Stream, common: int, base: Mapping[str, Any]) -> list[str]:
    """Return the label set that a fork begins with: the common tasks' result's, and the file's."""
    theirs = list(old.stages[common - 1].document.get("labels", ()))
    return [*theirs, *(label for label in base.get("labels", ()) if label not in theirs)]
