"""Which blobs the database reaches, and how a writer and ``gc`` agree about one.

A blob is put first and its row comes last, so for a while nothing reaches it. Therefore ``gc``
condemns a blob, with the time, and removes it in a later pass. Who writes a row claims the row's
blobs in the same transaction, which excludes ``gc``: a condemned one is rescued, and one that was
removed since it was put is put again. However long a writer waits in between, no row ever names a
blob that ``gc`` has removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from sqlalchemy import Column, Connection, delete, literal, select, union_all

from storage.blobs import BlobStore, is_digest
from storage.database import in_byte_order, lock
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


def references(connection: Connection) -> Iterator[tuple[str, str]]:
    """Yield every digest that the database names, once, in order, with a table and column that do.

    The database sorts them; what is held here is a page. A blob column that somebody wrote anything
    else into names nothing: ``fsck`` finds that by the id of its version.
    """
    parts = [
        select(
            column.label("digest"), literal(f"{column.table.name}.{column.name}").label("by")
        ).where(column.is_not(None))
        for column in blob_columns()
    ]
    named = union_all(*parts).subquery()
    query = select(named).order_by(in_byte_order(connection, named.c.digest), named.c.by)
    found = connection.execute(query.execution_options(yield_per=_PAGE))
    for digest, rows in groupby(found, key=itemgetter(0)):
        if is_digest(digest):
            yield digest, next(rows)[1]


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
