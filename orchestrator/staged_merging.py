"""Merges in stages, by a merge's file: each is a version, whose parents are what it merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clients.assignment import DataSpec
from orchestrator.config import BadConfig
from orchestrator.merge_draft import Draft, draft
from orchestrator.merge_file import MergeFile, Stage, nearest_name
from orchestrator.merge_parts import Allow, parts_of
from orchestrator.merge_search import Looking, searched_merge
from orchestrator.workspace import Workspace
from storage.store import UnknownVersion


class StageFailed(ValueError):
    """A stage cannot be merged; what it raised is its cause."""


@dataclass(frozen=True, slots=True)
class Staged:
    """What a stage made.

    Attributes:
        stage: its name.
        version: its id.
        made: its merge.
    """

    stage: str
    version: str
    made: Draft


def merge_in_stages(workspace: Workspace, file: MergeFile) -> list[Staged]:
    """Merge stage by stage and return what each made; the last gets the file's name.

    A stage is committed as soon as it is made: a version like any other, without a name where the
    file gives none. So its lineage tells every step, and running the file again commits nothing
    new: equal merges have equal ids.

    Args:
        workspace: where.
        file: as :func:`orchestrator.merge_file.read_merge` returns it.

    Raises:
        BadConfig: if a stage merges what is neither a version nor a stage; nothing is merged.
        StageFailed: if a stage cannot be merged, naming it; those before stay.
    """
    _check_refs(workspace, file)
    done: list[Staged] = []
    for stage in file.stages:
        last = stage is file.stages[-1]
        known = {one.stage: one.version for one in done}
        try:
            made = _made(workspace, stage, known)
        except ValueError as error:
            raise StageFailed(f"stage {stage.name!r}: {error}") from error
        version = made.commit(workspace)
        name = file.into if last else stage.into
        if name is not None:
            workspace.store.name(name, version)
        done.append(Staged(stage.name, version, made))
    return done


def _made(workspace: Workspace, stage: Stage, known: Mapping[str, str]) -> Draft:
    refs = [known.get(part.ref, part.ref) for part in stage.of]
    weights = [part.weight for part in stage.of]
    allow = Allow(stage.union, stage.convert, stage.rank)
    method = stage.method.checked("merge")
    if stage.search is None:
        return draft(workspace, refs, method, weights, allow)
    data = DataSpec(stage.search.data, fields=stage.search.fields)
    looking = Looking(data, stage.search.trials, allow.rank)
    return searched_merge(workspace, parts_of(workspace, refs, allow), method, weights, looking)


def _check_refs(workspace: Workspace, file: MergeFile) -> None:
    """Refuse what names nothing, before anything is merged.

    Raises:
        BadConfig: with a line for each.
    """
    stages: list[str] = []
    lines = []
    for stage in file.stages:
        for part in stage.of:
            if part.ref not in stages:
                try:
                    workspace.store.version(part.ref)
                except UnknownVersion as error:
                    hint = nearest_name(part.ref, tuple(stages)) or f" ({error})"
                    lines.append(
                        f"stages.{stage.name}: of: {part.ref!r} is no version and no stage before "
                        f"it{hint}"
                    )
        stages.append(stage.name)
    if lines:
        raise BadConfig("\n".join(lines))
