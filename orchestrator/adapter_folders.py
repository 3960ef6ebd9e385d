"""Which exported folders of adapters are in use, and by which deployments; the others are removed.

Deployments share a folder of adapters: several aliases, servers and homes may write into one place,
and what one needs no more another may still serve. So each says beside the adapters which of them
it uses, and a folder goes with the last word for it. A server reads an adapter again whenever it
was displaced from its memory: as long as it is loaded it is in use.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.manifest import BadManifest, NoManifest, check_manifest

_USES, _LOCK, _GONE = ".weft-uses", "lock", "gone"


def use(adapters: Path, folder: str, by: str) -> None:
    """Say that a deployment uses a folder, before it looks whether that is there.

    Args:
        adapters: where the adapters' folders are.
        folder: the name of one.
        by: the deployment's key.

    Raises:
        OSError: if that cannot be written there.
    """
    with _alone(adapters) as uses:
        place = uses / folder
        place.mkdir(exist_ok=True)
        (place / by).touch()


def leave(adapters: Path, by: str, loaded: Collection[str], spare: int = 0) -> tuple[str, ...]:
    """Say that a deployment uses no other folders any more, and remove those that nobody uses.

    Only what was exported and is as it was is removed. One that is killed on the way is finished by
    the next.

    Args:
        adapters: where the adapters' folders are.
        by: the deployment's key.
        loaded: the names of the folders that it uses.
        spare: how many besides it keeps, those that it used last.

    Returns:
        The names of what was removed, sorted.

    Raises:
        OSError: if something cannot be removed.
    """
    removed = []
    with _alone(adapters) as uses:
        shutil.rmtree(uses / _GONE, ignore_errors=True)
        mine = [path for path in uses.glob(f"*/{by}") if path.parent.name not in loaded]
        mine.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in mine[spare:]:
            folder = adapters / path.parent.name
            if list(path.parent.iterdir()) == [path] and _is_whole(folder):
                (uses / _GONE).mkdir(exist_ok=True)
                folder.replace(uses / _GONE / folder.name)  # in one step: nobody sees a half
                removed.append(folder.name)
            path.unlink()
            with suppress(OSError):  # others use it
                path.parent.rmdir()
        shutil.rmtree(uses / _GONE, ignore_errors=True)
    return tuple(sorted(removed))


def _is_whole(folder: Path) -> bool:
    """Return whether a folder is what was exported, and nothing that somebody put there."""
    try:
        return not check_manifest(folder).problems
    except (NoManifest, BadManifest):
        return False


@contextmanager
def _alone(adapters: Path) -> Iterator[Path]:
    uses = adapters / _USES
    uses.mkdir(parents=True, exist_ok=True)
    with (uses / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield uses
