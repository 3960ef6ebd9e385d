"""Runs the migrations on the connection that `storage.database` gives, or on `-x url=URL`."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from storage.database import REVISION_TABLE, connect, writing
from storage.schema import Timestamp, metadata


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=REVISION_TABLE,
        render_as_batch=True,  # SQLite alters a table by making a new one
        # a migration stays as it was written, whatever becomes of our own type
        render_item=lambda kind, item, _: (
            "sa.DateTime(timezone=True)" if isinstance(item, Timestamp) else False
        ),
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    engine = connect(context.get_x_argument(as_dictionary=True)["url"])
    with writing(engine) as own:
        migrate(own)
    engine.dispose()
