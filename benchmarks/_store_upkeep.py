"""What ``fsck``, ``gc`` and a restore cost at many versions: seconds, and memory on top.

Each is done by a process of its own, whose peak is what the kernel says of it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _figures import Figure
from _store_rows import fill

from storage.backup import back_up
from storage.blobs import BlobStore, name_of
from storage.database import open_database
from storage.fsck import fsck
from storage.garbage import collect
from storage.restoring import restore

ORPHANS = 1_000


def keeping(folder: Path, versions: int) -> list[Figure]:
    """Return the figures of a store on SQLite, with 1,000 blobs more than it reaches."""
    folder.mkdir()
    url = f"sqlite:///{folder}/weft.db"
    engine = open_database(url)
    filled = fill(engine, versions)
    engine.dispose()
    for number in range(1, filled.versions + ORPHANS + 1):
        _write(folder / "blobs", b"%d" % number)  # as the rows name them
    setting = f"sqlite, {filled.versions:,} versions, as many blobs of some bytes in a folder"
    found = []
    for what in ("gc, dry run", "gc --delete", "fsck", "backup of rows", "restore of rows"):
        command = [sys.executable, __file__, what, url, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, grown = json.loads(done.stdout)
        found.append(Figure(what, seconds, "s", None, "lower", "", setting))
        found.append(Figure(f"{what}, peak memory", grown, "MiB", None, "lower", "", setting))
    return found


def _write(blobs: Path, data: bytes) -> None:
    path = blobs / name_of(hashlib.sha256(data).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main(what: str, url: str, folder: Path) -> None:
    """Do one of them and print its seconds, and the MiB by which it made this process larger."""
    engine, blobs = open_database(url), BlobStore(folder / "blobs")
    calls: dict[str, Callable[[], object]] = {
        "gc, dry run": lambda: collect(engine, blobs),
        "gc --delete": lambda: collect(engine, blobs, delete_them=True),
        "fsck": lambda: fsck(engine, blobs),
        "backup of rows": lambda: back_up(engine, None, folder / "backup"),
        "restore of rows": lambda: _restored(folder),
    }
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: imports have one too
    before = _kib("VmRSS")
    began = time.perf_counter()
    calls[what]()
    seconds = time.perf_counter() - began
    print(json.dumps([seconds, (_kib("VmHWM") - before) / 1024]))


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    [found] = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found)


def _restored(folder: Path) -> None:
    """Bring the rows back; the blobs are there already."""
    engine = open_database(f"sqlite:///{folder}/restored.db")
    restore(engine, BlobStore(folder / "blobs"), folder / "backup")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
