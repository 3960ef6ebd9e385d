"""What a merge's file says: stages, each of which merges versions and earlier stages."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from clients import data
from orchestrator.config import NAME, BadConfig, PluginField, read_document
from orchestrator.merge_search import HIGHEST, LOWEST
from orchestrator.policy import Strict

_STAGE = r"^[a-z0-9][a-z0-9_-]{0,30}$"


class Part(Strict):
    """One of what a stage merges: a version or an earlier stage, and how much it counts."""

    ref: str
    weight: float = 1.0


class Search(Strict):
    """That a stage's weights are looked for; see :mod:`orchestrator.merge_search`.

    ``data`` must be public: the weights are part of the version and tell of it.
    """

    data: str
    fields: dict[str, str] = Field(default_factory=dict)
    public: bool = False
    trials: int = Field(default=30, ge=3)

    @model_validator(mode="after")
    def _open(self) -> Search:
        if not (self.public or data.is_public(self.data)):
            raise ValueError(
                f"{self.data} is not known to be public, and weights that are found on it tell of "
                "it; give data that everyone may see, and say so with public: true (--public)"
            )
        return self


PartField = Annotated[Part, BeforeValidator(lambda v: {"ref": v} if isinstance(v, str) else v)]
SearchField = Annotated[Search, BeforeValidator(lambda v: {"data": v} if isinstance(v, str) else v)]


class Stage(Strict):
    """One merge. ``into`` names its version; without it, it is a version without a name."""

    name: str = Field(pattern=_STAGE)
    of: tuple[PartField, ...] = Field(min_length=2)
    method: PluginField
    into: str | None = Field(default=None, pattern=NAME)
    search: SearchField | None = None
    union: bool = False
    convert: bool = False
    rank: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _begins_within_bounds(self) -> Stage:
        for part in self.of if self.search else ():
            if not LOWEST <= part.weight <= HIGHEST:
                raise ValueError(
                    f"{part.ref!r} has weight {part.weight:g}, and weights are looked for between "
                    f"{LOWEST:g} and {HIGHEST:g}; give one to begin with from there"
                )
        return self


class MergeFile(Strict):
    """Stages in order, and the name of what the last one makes."""

    into: str = Field(pattern=NAME)
    stages: tuple[Stage, ...] = Field(min_length=1)


_OWNERS: Mapping[str, type[Strict]] = {"of": Part, "search": Search}


def read_merge(path: str | Path) -> MergeFile:
    """Return a merge's file, every stage of which is checked but for whether its versions fit.

    Raises:
        BadConfig: with a line for each mistake.
    """
    return parse_merge(read_document(path, "docs/merging.md shows one"), str(path))


def parse_merge(document: Mapping[str, Any], where: str) -> MergeFile:
    """Return what a merge's file says; see :func:`read_merge`.

    Args:
        document: what is in it.
        where: it is, for messages.

    Raises:
        BadConfig: with a line for each mistake.
    """
    try:
        file = MergeFile.model_validate(document)
    except ValidationError as error:
        found = error.errors()  # what is wrong itself counts as not there, too
        found = [one for one in found if one["type"] != "too_short"] or found
        lines = [_sentence(one) for one in found]
        raise BadConfig("\n".join(f"{where}: {line}" for line in lines)) from None
    names = [stage.name for stage in file.stages]
    lines = []
    for number, stage in enumerate(file.stages):
        at = f"{where}: stages.{stage.name}"
        if stage.name in names[:number]:
            lines.append(f"{at}: two stages are called {stage.name!r}; a stage's name is its own")
        lines += [
            f"{at}: of: stage {part.ref!r} is not done yet; a stage merges those before it"
            for part in stage.of
            if part.ref in names[number:]
        ]
        try:
            stage.method.checked("merge")
        except (LookupError, ValueError) as error:
            lines.append(f"{at}: method: {error}")
    if file.stages[-1].into not in (None, file.into):
        lines.append(f"{where}: the last stage's into is {file.into!r}, by the file's into")
    if lines:
        raise BadConfig("\n".join(lines))
    return file


def searched(
    refs: Sequence[str], weights: Sequence[float] | None, into: str, **stage: Any
) -> MergeFile:
    """Return a merge of one stage, of which the weights are looked for.

    Args:
        refs: what is merged.
        weights: that the search begins with; None for 1 each.
        into: the name that it gets.
        stage: the rest of its keys.

    Raises:
        BadConfig: with a line for each mistake.
    """
    begun = weights or [1.0] * len(refs)
    if len(begun) != len(refs):
        raise BadConfig(f"--weights gives {len(begun)} numbers for {len(refs)} versions")
    of = [{"ref": ref, "weight": weight} for ref, weight in zip(refs, begun, strict=True)]
    document = {"into": into, "stages": [{"name": "merge", "of": of, **stage}]}
    return parse_merge(document, "weft merge")


def nearest_name(ref: str, known: tuple[str, ...]) -> str:
    """Return a hint at the known name that is like ``ref``, or nothing."""
    close = difflib.get_close_matches(ref, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _sentence(error: Any) -> str:
    """Return one of pydantic's errors as a line, with the nearest option for an unknown one."""
    path = [str(part) for part in error["loc"]]
    where, kind = ".".join(path), error["type"]
    if kind == "missing":
        return f"{where}: is required"
    if kind == "extra_forbidden":
        inner = next((_OWNERS[p] for p in reversed(path[:-1]) if p in _OWNERS), None)
        owner = inner or (Stage if path[0] == "stages" else MergeFile)
        options = tuple(owner.model_fields)
        return (
            f"{where}: there is no such option{nearest_name(path[-1], options)} "
            f"(options: {', '.join(options)})"
        )
    return f"{where}: {str(error['msg']).removeprefix('Value error, ')}"
