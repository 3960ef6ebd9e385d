"""A site's secret keys: drawn once, and where the one of a client in a run lies."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from clients.files import sync, write_durably

KEY_BYTES = 32


def new_key() -> bytes:
    """Return a fresh secret key from the operating system."""
    return os.urandom(KEY_BYTES)


def drawn_once(path: Path) -> bytes:
    """Return the key in ``path``, drawing it first if nobody has; two at once agree."""
    while not path.exists():
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        write_durably(draft, new_key())
        try:
            os.link(draft, path)  # fails if another process was first
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        sync(path.parent)  # a key must not be lost once something was made with it
    return path.read_bytes()


def data_key(site: Path) -> bytes:
    """Return the key of what the site in folder ``site`` says of its data; one for all runs."""
    site.mkdir(mode=0o700, parents=True, exist_ok=True)
    return drawn_once(site / "data.key")


def run_folder(site: Path, run: str, client: str) -> Path:
    """Return where the site in folder ``site`` keeps what belongs to a client in a run."""
    return site / hashlib.sha256(f"{run}\0{client}".encode()).hexdigest()[:32]


def destroy_key(site: Path, run: str, client: str) -> None:
    """Delete the key of (run, client) for good, if the site in folder ``site`` has one."""
    (run_folder(site, run, client) / "key").unlink(missing_ok=True)


def has_key(site: Path, run: str, client: str) -> bool:
    """Return whether the site in folder ``site`` has drawn the key of (run, client)."""
    return (run_folder(site, run, client) / "key").is_file()
