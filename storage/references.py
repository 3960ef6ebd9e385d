"""Which blobs the database reaches, and how a writer and ``gc`` agree about one.

A blob is put first and its row comes last, so for a while nothing reaches it. Therefore ``gc``
condemns a blob, with the time, and removes it in a later pass. Who writes a row claims the row's
blobs in the same transaction, which excludes ``gc``: a condemned one is rescued, and one that was
removed since it was put is put again. However long a writer waits in between, no row ever names a
blob that ``gc`` has removed.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Column, Connection, delete, select

from storage.blobs import BlobStore
from storage.database import lock
from storage.schema import condemned, metadata

LOCK = "weft blobs"
"""Held shared by who writes rows that name blobs, alone by who removes blobs."""

_PAGE = 10_000
_AT_ONCE = 500


def blob_columns() -> list[Column[str]]:
    """Return every column that holds a blob's digest."""
    return [
        column
        for table in metadata.sorted_tables
        for column in table.columns
        if column.info.get("blob")
    ]


def references(connection: Connection) -> dict[str, str]:
    """Return every digest that the database names, with the table and column that do.

    About 200 bytes of memory each.
    """
    found: dict[str, str] = {}
    for column in blob_columns():
        query = select(column).where(column.is_not(None)).execution_options(yield_per=_PAGE)
        place = f"{column.table.name}.{column.name}"
        for digest in connection.scalars(query):
            found.setdefault(digest, place)
    return found


def claim(connection: Connection, blobs: BlobStore, digests: Sequence[str | None]) -> list[str]:
    """Return which of ``digests`` were removed by now; if none, they are safe with this row.

    Call it in the transaction of :func:`storage.database.writing` that writes the row. If it
    returns any, write no row, put the blobs again and begin anew.

    Args:
        connection: of the transaction.
        blobs: where they were put.
        digests: of the row; None is skipped.
    """
    wanted = [digest for digest in digests if digest is not None]
    lock(connection, LOCK, shared=True)
    gone = []
    for start in range(0, len(wanted), _AT_ONCE):
        known = condemned.c.digest.in_(wanted[start : start + _AT_ONCE])
        found = connection.scalars(select(condemned.c.digest).where(known)).all()
        lost = [digest for digest in found if not blobs.has(digest)]
        if found and not lost:
            connection.execute(delete(condemned).where(known))
        gone += lost
    return gone
