"""Looks at where a coordinator keeps things: its database and its blobs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from orchestrator.deployment.findings import Finding, fail, ok, warn
from storage.buckets import open_place
from storage.database import (
    BadDatabaseUrl,
    DatabaseUnavailable,
    NewerSchema,
    OlderSchema,
    connect,
    revision,
    where,
)
from storage.places import BadBlobsUrl, BlobsUnavailable
from storage.schema import HEAD


def database(url: str) -> Iterator[Finding]:
    """Look whether the database answers, and has the tables of this weft; makes none."""
    try:
        engine = connect(url)
    except (BadDatabaseUrl, DatabaseUnavailable) as error:
        yield fail("database", str(error), "correct WEFT_DATABASE")
        return
    try:
        path = engine.url.database if engine.dialect.name == "sqlite" else None
        if path and not Path(path).exists():
            yield ok("database", f"{where(engine)} is not there yet; the first command makes it")
            return
        found = revision(engine)
    except (DatabaseUnavailable, NewerSchema, OlderSchema) as error:
        yield fail("database", str(error), "look whether it runs, and whether its password is set")
        return
    finally:
        engine.dispose()
    if found is None:
        yield ok("database", f"{where(engine)} answers, and is new")
    elif found != HEAD:
        yield fail(
            "database",
            f"{where(engine)} has the tables of schema {found}, and this weft those of {HEAD}",
            "run: weft store upgrade; or, if a newer weft wrote it, install that one",
        )
    else:
        yield ok("database", f"{where(engine)} answers, with schema {found}")
    if path is not None:
        yield from _shared(Path(path))


def _shared(path: Path) -> Iterator[Finding]:
    if path.stat().st_mode & 0o007:
        says = f"everybody on this machine may read {path}, which says who spent what on which data"
        yield warn("database", says, f"run: chmod 660 {path}")


def blobs(home: Path) -> Iterator[Finding]:
    """Look whether blobs can be written and read back, with one that is removed again."""
    try:
        place = open_place(os.environ.get("WEFT_BLOBS") or home / "blobs")
        name, data = f".doctor.{uuid.uuid4().hex}", b"looked at by weft doctor"
        place.write(name, data)
        back = place.read(name)
        place.remove(name)
    except (BadBlobsUrl, BlobsUnavailable, OSError) as error:
        yield fail("blobs", f"no blob can be written: {error}", "correct WEFT_BLOBS, or its keys")
        return
    if back == data:
        yield ok("blobs", f"{place.where()} takes and gives back")
    else:
        do = "do not start a run: use another place, which reads what was written"
        yield fail("blobs", f"{place.where()} gives back other bytes than it was given", do)
