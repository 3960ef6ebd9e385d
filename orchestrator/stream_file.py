"""What a stream's file may say, and its content with paths that mean the same from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from clients import data
from orchestrator.config import PluginField, read_document
from orchestrator.policy import Strict
from orchestrator.sections import Held

_PRESETS = {
    "sequential": "continue",
    "stacked": "stack",
    "isolated": "isolated",
    "joint": "joint",
    "fresh": "fresh",
}


_OF_STREAMS = ("start", "library", "merge", "merge_weight")
"""What of a method is no key of a run's file."""


def _held(value: Any) -> Any:
    """Accept a data URI for the data set of that URI."""
    return {"data": value} if isinstance(value, str) else value


class TestSet(Held):
    """What a task is measured on; ``generate``: tokens at most of a causal model's answers."""

    generate: int | None = Field(default=None, ge=1)


class RouterData(Held):
    """Data of a task by which a router knows its inputs: public, since what is made of them is."""

    public: bool = False

    @model_validator(mode="after")
    def _open(self) -> RouterData:
        if not (self.public or data.is_public(self.data)):
            raise ValueError(
                f"{self.data} is not known to be public, and what a router is made of tells of it; "
                "give data that everyone may see, and say so with public: true"
            )
        return self


TestField = Annotated[TestSet, BeforeValidator(_held)]


def _method(value: Any) -> Any:
    """Accept ``sequential`` and its like for what they stand for."""
    if not isinstance(value, str):
        return value
    if value not in _PRESETS:
        raise ValueError(f"there is no method {value!r} ({', '.join(_PRESETS)}); or give a mapping")
    return {"start": _PRESETS[value]}


class Method(Strict):
    """How a task follows from those before; what is None is as the plug-ins and the base say.

    ``start``: ``continue`` goes on with the adapter of the task before, ``stack`` freezes it under
    a new one, ``fresh`` starts anew with the memory of the tasks before, ``isolated`` without,
    ``joint`` trains all tasks at once. ``library``: whether the versions of the tasks before are
    what the strategy starts from. ``merge``: what makes one version of those of all tasks so far,
    after each task; each counts ``merge_weight``, or one part of as many (``mean``).
    """

    start: Literal["continue", "stack", "fresh", "isolated", "joint"] | None = None
    adapter: str | dict[str, Any] | None = None
    strategy: str | dict[str, Any] | None = None
    regularizers: tuple[str | dict[str, Any], ...] | None = None
    optimizer: str | dict[str, Any] | None = None
    library: bool | None = None
    merge: PluginField | None = None
    merge_weight: float | Literal["mean"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Method:
        if self.merge is not None and self.start == "joint":
            raise ValueError(
                "joint training has one version, and nothing to merge; leave merge out"
            )
        if self.merge is None and self.merge_weight is not None:
            raise ValueError("merge_weight is of a merge; give merge, or leave it out")
        return self

    def overrides(self) -> dict[str, Any]:
        """Return what of a run's file the method says."""
        found = self.model_dump(exclude=set(_OF_STREAMS), exclude_none=True)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


class TaskFile(Strict):
    """One task of a stream's file.

    ``data`` and ``fields`` are for the base's simulated clients, ``clients`` replaces them whole.
    ``version`` is for a task that was learned elsewhere: it is the result, and nothing is run.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")
    data: str | None = None
    fields: dict[str, str] | None = None
    clients: dict[str, Any] | None = None
    labels: tuple[str, ...] = ()
    rounds: int | None = Field(default=None, ge=1)
    evaluate: TestField | None = None
    router: Annotated[RouterData, BeforeValidator(_held)] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    version: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TaskFile:
        if self.data is not None and self.clients is not None:
            raise ValueError("give data, of the base's simulated clients, or clients, not both")
        return self


class StreamFile(Strict):
    """A stream's file. ``base`` is a run's file, by its path from this one, or what is in one.

    ``general`` is text of no task, on which a causal model's perplexity is to stay what it was.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,30}$")
    base: str | dict[str, Any]
    method: Annotated[Method, BeforeValidator(_method)] = Method()
    tasks: tuple[TaskFile, ...] = Field(min_length=1)
    metric: str | None = None
    general: Annotated[Held, BeforeValidator(_held)] | None = None


def read_stream(path: str | Path) -> dict[str, Any]:
    """Return what is in a stream's file, unchecked, with the base in place of its path.

    Raises:
        BadConfig: if there is no such file, or it is no mapping.
    """
    file = Path(path)
    document = dict(read_document(file, "weft stream init writes one"))
    base = document.get("base")
    return (
        {**document, "base": read_document(file.parent / base)}
        if isinstance(base, str)
        else document
    )


def anchored_stream(file: StreamFile, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file's content with absolute paths, the method's part of the base in the base."""
    document = file.model_dump(mode="json", exclude_defaults=True)
    document["base"] = dict(base)
    if "general" in document:
        document["general"]["data"] = data.absolute(document["general"]["data"])
    document["method"] = file.method.model_dump(mode="json", include=set(_OF_STREAMS))
    for task in document["tasks"]:
        if "data" in task:
            task["data"] = data.absolute(task["data"])
        if "evaluate" in task:
            task["evaluate"]["data"] = data.absolute(task["evaluate"]["data"])
        if "router" in task:
            task["router"]["data"] = data.absolute(task["router"]["data"])
        if "clients" in task:
            task["clients"] = anchored_run({"clients": task["clients"]})["clients"]
    return document


def anchored_run(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's file with absolute paths; what is not checked yet is left as it is."""
    found = dict(document)
    model = found.get("model")
    place = model.get("id") if isinstance(model, Mapping) else model
    if isinstance(place, str) and Path(place).is_dir():
        there = {"id": str(Path(place).absolute())}
        found["model"] = {**(model if isinstance(model, Mapping) else {}), **there}
    clients = found.get("clients")
    simulate = clients.get("simulate") if isinstance(clients, Mapping) else None
    if isinstance(simulate, Mapping) and isinstance(simulate.get("data"), str):
        split = {**simulate, "data": data.absolute(simulate["data"])}
        found["clients"] = {**found["clients"], "simulate": split}
    for key in ("evaluate", "init_data"):
        section = found.get(key)
        if isinstance(section, Mapping) and isinstance(section.get("data"), str):
            found[key] = {**section, "data": data.absolute(section["data"])}
    return found
