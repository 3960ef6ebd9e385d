"""Kinds of alias moves, yanked versions, and an index of whose updates a version holds."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

PREFIX = "ix_names_prefix"
PAGE = 1000


def upgrade() -> None:
    op.add_column(
        "promotions", sa.Column("kind", sa.String, nullable=False, server_default="promote")
    )
    op.create_index(PREFIX, "names", ["name"], postgresql_ops={"name": "text_pattern_ops"})
    op.create_table(
        "yanks",
        sa.Column("version", sa.String, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("yanked", sa.Boolean, nullable=False),
        sa.Column("who", sa.String, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "contributions",
        sa.Column("client", sa.String, primary_key=True),
        sa.Column(
            "number",
            sa.Integer,
            sa.ForeignKey("versions.number"),
            primary_key=True,
            autoincrement=False,
        ),
    )
    _index_what_recipes_say(op.get_bind())


def _index_what_recipes_say(connection: sa.Connection) -> None:
    versions = sa.table("versions", sa.column("number", sa.Integer), sa.column("recipe", sa.Text))
    contributions = sa.table("contributions", sa.column("client"), sa.column("number", sa.Integer))
    number = -1
    while True:
        page = sa.select(versions.c.number, versions.c.recipe).where(versions.c.number > number)
        rows = connection.execute(page.order_by(versions.c.number).limit(PAGE)).all()
        if not rows:
            return
        number = rows[-1].number
        found = [
            {"client": client, "number": row.number}
            for row in rows
            for client in _clients(json.loads(row.recipe))
        ]
        if found:
            connection.execute(sa.insert(contributions), found)


def _clients(recipe: dict[str, Any]) -> set[str]:
    return {leaf["client"] for leaf in recipe.get("updates", ())}


def downgrade() -> None:
    op.drop_table("contributions")
    op.drop_table("yanks")
    op.drop_index(PREFIX, "names")
    op.drop_column("promotions", "kind")
