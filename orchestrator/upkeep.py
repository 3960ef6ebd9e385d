"""Keeping a store sound: check it, repair it, and remove what nothing reaches."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.workspace import Workspace
from storage import fsck as checking
from storage import garbage
from storage.blobs import BlobStore
from storage.buckets import open_place
from storage.fsck import Checkup, Progress
from storage.garbage import DRAFT_S, GRACE_S, Collection

_DRAFT = re.compile(r"tmp[a-z0-9_]{8}")
_FOLDERS = ("bases", "runs", "sites")


@dataclass(frozen=True, slots=True)
class HomeCheckup:
    """What ``weft fsck`` found.

    Attributes:
        store: versions, names, runs and blobs.
        drafts: files in the home that a writer left when it died.
    """

    store: Checkup
    drafts: tuple[Path, ...]


def fsck(
    workspace: Workspace,
    repair: bool = False,
    mirrors: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> HomeCheckup:
    """Check a workspace, and with ``repair`` mend it; see :func:`storage.fsck.fsck`.

    Args:
        workspace: which.
        repair: whether anything may be changed.
        mirrors: folders or urls of blobs, such as ``BACKUP/blobs``, to fetch from.
        progress: told how many blobs were hashed, of how many.

    Raises:
        BadBlobsUrl, BlobsUnavailable: if a mirror cannot be read.
    """
    others = [BlobStore(open_place(mirror)) for mirror in mirrors]
    drafts = tuple(_drafts(workspace.home))
    found = checking.fsck(
        workspace.engine, workspace.blobs, repair=repair, mirrors=others, progress=progress
    )
    if repair:
        _remove(drafts)
    return HomeCheckup(found, drafts)


def gc(
    workspace: Workspace, delete: bool = False, grace_s: float = GRACE_S
) -> tuple[Collection, tuple[Path, ...]]:
    """Find, or ``delete``, what nothing reaches; see :func:`storage.garbage.collect`.

    Returns:
        What was found among the blobs, and the drafts of dead writers in the home.
    """
    drafts = tuple(_drafts(workspace.home))
    found = garbage.collect(workspace.engine, workspace.blobs, delete_them=delete, grace_s=grace_s)
    if delete:
        _remove(drafts)
    return found, drafts


def _drafts(home: Path) -> Iterator[Path]:
    """Yield the files that :func:`clients.site.write_durably` left when its process was killed."""
    before = time.time() - DRAFT_S
    for folder in _FOLDERS:
        for path in sorted((home / folder).rglob("tmp*")):
            if _DRAFT.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < before:
                yield path


def _remove(drafts: Sequence[Path]) -> None:
    for path in drafts:
        path.unlink(missing_ok=True)
