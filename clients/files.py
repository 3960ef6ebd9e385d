"""Files that a crash leaves whole or not there at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` so that after a crash ``path`` holds all of it or is not there.

    Raises:
        OSError: naming ``path``, if there is no space; then nothing is left beside it.
    """
    handle, draft = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(path)
        sync(path.parent)
    except OSError as error:
        Path(draft).unlink(missing_ok=True)
        error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Make durable what a file holds, or which names a folder has.

    Raises:
        OSError: naming ``path``, if there is no space.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)  # the system names none
        raise
    finally:
        os.close(handle)
