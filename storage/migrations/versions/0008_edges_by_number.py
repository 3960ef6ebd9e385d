"""Edges of the lineage name versions by their numbers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

EDGES = "version_parents"
KEPT = "version_parents_kept"
BY_PARENT = "ix_version_parents_parent_child_kind"


def upgrade() -> None:
    _keep("child.number AS child, parent.number AS parent", "id")
    _make(sa.Integer, "versions.number", sqlite_with_rowid=False)
    op.create_index(BY_PARENT, EDGES, ["parent", "child", "kind"])


def downgrade() -> None:
    _keep("child.id AS child, parent.id AS parent", "number")
    _make(sa.String, "versions.id")
    op.create_index("ix_version_parents_parent", EDGES, ["parent"])


def _keep(columns: str, key: str) -> None:
    """Move the edges, as the new table wants them, to a table that nothing refers to."""
    op.execute(
        f"CREATE TABLE {KEPT} AS SELECT {columns}, edge.kind AS kind FROM {EDGES} AS edge "
        f"JOIN versions AS child ON child.{key} = edge.child "
        f"JOIN versions AS parent ON parent.{key} = edge.parent"
    )
    op.drop_table(EDGES)


def _make(kind: type[sa.Integer] | type[sa.String], refers_to: str, **options: bool) -> None:
    """Make the table anew, with the names that the schema's convention gives its constraints."""
    op.create_table(
        EDGES,
        sa.Column("child", kind, sa.ForeignKey(refers_to), primary_key=True),
        sa.Column("parent", kind, sa.ForeignKey(refers_to), primary_key=True),
        sa.Column("kind", sa.String, primary_key=True),
        **options,
    )
    op.execute(f"INSERT INTO {EDGES} SELECT child, parent, kind FROM {KEPT} ORDER BY child, parent")
    op.drop_table(KEPT)
