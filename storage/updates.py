"""Client updates whose bytes are kept, as blobs: a version can be aggregated again from them.

A run keeps the updates that its versions were aggregated from. Their blobs are put first and their
rows come last; a row goes first and its blob last. Of a client that withdrew a row stays, without a
blob: its tombstone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    and_,
    delete,
    select,
    update,
)

from storage.blobs import BlobCorrupt, BlobMissing, BlobStore
from storage.database import insert_missing, writing
from storage.garbage import discard
from storage.references import claim
from storage.schema import kept_updates, withdrawals


class UpdateGone(LookupError):
    """An update's bytes cannot be had; the message says why, as what follows its name."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """An update that a version was aggregated from.

    Attributes:
        client: whose.
        digest: SHA-256 of its bytes, as the version's recipe has it.
        path: file of this machine that holds them.
    """

    client: str
    digest: str
    path: Path


class Updates:
    """The updates that are kept; part of :class:`storage.store.AdapterStore`.

    Args:
        engine: from :func:`storage.database.open_database`.
        blobs: where their bytes are.
    """

    def __init__(self, engine: Engine, blobs: BlobStore) -> None:
        self._engine = engine
        self._blobs = blobs

    def keep(self, run: str, version: str, round_: int, leaves: Sequence[Leaf]) -> None:
        """Keep the bytes of a version's updates; of who withdrew, only that they were there.

        Idempotent. The files stay, and may be removed when it returns: see
        :meth:`storage.blobs.BlobStore.adopt`. A crash leaves at most blobs that no row names.

        Args:
            run: that keeps them.
            version: full id of what was aggregated from them.
            round_: of that version.
            leaves: the updates.

        Raises:
            OSError, BlobsUnavailable: if they cannot be stored.
        """
        facts = {"run": run, "version": version, "round": round_}
        while True:
            with self._engine.connect() as connection:
                gone = _withdrawn(connection)
            self._blobs.adopt({one.digest: one.path for one in leaves if one.client not in gone})
            with writing(self._engine) as connection:
                gone |= _withdrawn(connection)
                rows: list[dict[str, Any]] = [
                    {
                        **facts,
                        "digest": one.digest,
                        "client": one.client,
                        "blob": None if one.client in gone else one.digest,
                    }
                    for one in leaves
                ]
                if not claim(connection, self._blobs, [row["blob"] for row in rows]):
                    insert_missing(connection, kept_updates, rows)
                    return

    def drop(self, run: str, until: int | None = None) -> int:
        """Keep a run's updates no longer, and return how many those were; tombstones stay.

        What no other run keeps is removed at once; what a crash leaves of it, ``gc`` removes.

        Args:
            run: whose.
            until: the last round whose version's updates are dropped; None for all.
        """
        own = and_(kept_updates.c.run == run, kept_updates.c.blob.is_not(None))
        which = own if until is None else and_(own, kept_updates.c.round <= until)
        return self._release(which, delete(kept_updates).where(which))

    def bury(self) -> int:
        """Leave only tombstones of the updates of who withdrew, and return how many were buried."""
        absent = select(withdrawals.c.client)
        which = and_(kept_updates.c.client.in_(absent), kept_updates.c.blob.is_not(None))
        return self._release(which, update(kept_updates).where(which).values(blob=None))

    def read(self, digest: str) -> bytes:
        """Return an update's bytes, verified.

        Raises:
            UpdateGone: if they are not kept, or were buried, or are damaged.
            BlobsUnavailable: if the place of the blobs cannot be reached.
        """
        query = select(kept_updates.c.blob).where(kept_updates.c.digest == digest)
        with self._engine.connect() as connection:
            found = connection.scalars(query).all()
        if not found:
            raise UpdateGone("is not kept (see retention)")
        if not any(found):
            raise UpdateGone("was withdrawn")
        try:
            return self._blobs.fetch(digest)
        except (BlobMissing, BlobCorrupt) as error:
            raise UpdateGone(f"cannot be read: {error.args[0]}") from error

    def _release(self, which: ColumnElement[bool], change: Executable) -> int:
        """Make ``change`` to the rows that are ``which``, then remove what they alone named."""
        named = select(kept_updates.c.digest).where(which)
        with self._engine.connect() as connection:
            if connection.scalar(named.limit(1)) is None:
                return 0
        with writing(self._engine) as connection:
            found = connection.scalars(named).all()
            connection.execute(change)
        discard(self._engine, self._blobs, found, _kept)
        return len(found)


def _withdrawn(connection: Connection) -> set[str]:
    return set(connection.scalars(select(withdrawals.c.client)))


def _kept(connection: Connection, digests: Sequence[str]) -> set[str]:
    """Return which updates are kept still: an update's bytes are no tensors' of a version."""
    which = and_(kept_updates.c.digest.in_(digests), kept_updates.c.blob.is_not(None))
    return set(connection.scalars(select(kept_updates.c.digest).where(which)))
