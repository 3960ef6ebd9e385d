"""Signatures over what the store holds, as rows."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Engine, select

from storage.database import insert_or_update, writing
from storage.keys import Signature
from storage.schema import signatures


class SignatureStore:
    """Who signed what.

    Args:
        engine: from :func:`storage.database.open_database`; shared with the adapter store.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, kind: str, subject: str, signature: Signature) -> None:
        """Keep a signature; a key's earlier one over the same subject gives way."""
        row = {
            "kind": kind,
            "subject": subject,
            "key": signature.key,
            "signature": signature.signature,
            "created_at": datetime.now(UTC),
        }
        with writing(self._engine) as connection:
            insert_or_update(connection, signatures, [row])

    def of(self, kind: str, subject: str) -> list[Signature]:
        """Return the signatures over a subject, by key; good ones and others."""
        query = select(signatures.c.key, signatures.c.signature).where(
            signatures.c.kind == kind, signatures.c.subject == subject
        )
        with self._engine.connect() as connection:
            return sorted(Signature(*row) for row in connection.execute(query))
