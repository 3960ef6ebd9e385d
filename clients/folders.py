"""Folders that appear whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clients.files import sync


class FolderTaken(FileExistsError):
    """The folder to write holds something already."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes ``folder``, durably, when the block ends.

    Where the block raises, nothing is left. Until it ends, nobody sees a part of it.

    Args:
        folder: what it becomes; it must not exist or be empty.

    Raises:
        FolderTaken: if ``folder`` has something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderTaken(f"{folder} is not empty; give a folder that is, or that is not there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch) / "whole"  # not scratch itself, which only its owner may read
        made.mkdir()
        yield made
        for path in [*sorted(made.rglob("*")), made]:
            sync(path)
        made.replace(folder)  # one rename, which an empty folder gives way to
    sync(folder.parent)
