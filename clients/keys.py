"""A site's secret keys: drawn once, and where the one of a client in a run lies."""

from __future__ import annotations

import hashlib
import hmac
import os
import uuid
from contextlib import suppress
from pathlib import Path

from clients.files import sync, write_durably

KEY_BYTES = 32
_DOOMED = ".doomed-"


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


def site_mark(site: Path) -> str:
    """Return what tells the site in folder ``site`` from one that has lost its keys.

    A keyed digest: it says nothing of the key. Empty where there is no key (yet, or not here).
    """
    try:
        key = (site / "data.key").read_bytes()
    except OSError:
        return ""
    return hmac.digest(key, b"weft site", "sha256").hex()[:16]


def run_folder(site: Path, run: str, client: str) -> Path:
    """Return where the site in folder ``site`` keeps what belongs to a client in a run."""
    return site / hashlib.sha256(f"{run}\0{client}".encode()).hexdigest()[:32]


def destroy_key(site: Path, run: str, client: str) -> None:
    """Overwrite and delete the key of (run, client), if the site in folder ``site`` has one.

    Durable when it returns. After a crash on the way the key is what it was or is not there, and
    what is left of it has another name, which the next call finds. What a file system or a disk
    keeps of overwritten bytes is beyond this.
    """
    folder = run_folder(site, run, client)
    with suppress(FileNotFoundError):
        # first out of the way: half a key, or what it was overwritten with, must not be one
        (folder / "key").rename(folder / f"{_DOOMED}{uuid.uuid4().hex}")
        sync(folder)
    doomed = list(folder.glob(f"{_DOOMED}*"))
    for path in doomed:
        with suppress(FileNotFoundError):  # another process was faster
            with path.open("r+b") as file:  # at random, for whoever may be reading it
                file.write(os.urandom(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()
    if doomed:
        sync(folder)


def has_key(site: Path, run: str, client: str) -> bool:
    """Return whether the site in folder ``site`` has drawn the key of (run, client)."""
    return (run_folder(site, run, client) / "key").is_file()
