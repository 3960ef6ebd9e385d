"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (  # in the order in which they refer to each other
    "versions",
    "version_parents",
    "metrics",
    "names",
    "named_versions",
    "promotions",
    "populations",
    "clients",
    "spends",
    "runs",
    "events",
)


def upgrade() -> None:
    # names of constraints and indexes come from the naming convention of the schema's metadata
    op.create_table(
        "versions",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("tensors", sa.String, nullable=False),
        sa.Column("auxiliary", sa.String),
        sa.Column("memory", sa.String),
        sa.Column("recipe", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "version_parents",
        sa.Column("child", sa.String, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("parent", sa.String, sa.ForeignKey("versions.id"), primary_key=True, index=True),
        sa.Column("kind", sa.String, primary_key=True),
    )
    op.create_table(
        "metrics",
        sa.Column("version", sa.String, sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.Float(53), nullable=False),
    )
    op.create_table(
        "names",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "named_versions",
        sa.Column("name", sa.String, sa.ForeignKey("names.name"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.String, sa.ForeignKey("versions.id"), nullable=False, index=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "promotions",
        sa.Column("name", sa.String, sa.ForeignKey("names.name"), primary_key=True),
        sa.Column("alias", sa.String, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.String, sa.ForeignKey("versions.id"), nullable=False, index=True),
        sa.Column("who", sa.String, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "populations",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("epsilon", sa.Float(53)),
        sa.Column("delta", sa.Float(53)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "clients",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column(
            "population", sa.String, sa.ForeignKey("populations.name"), nullable=False, index=True
        ),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("fields", sa.Text, nullable=False),
        sa.Column("num_examples", sa.Integer),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("public", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "spends",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("event", sa.String, nullable=False, unique=True),
        sa.Column("population", sa.String, nullable=False, index=True),
        sa.Column("client", sa.String, nullable=False),
        sa.Column("run", sa.String, nullable=False, index=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("assignment", sa.String, nullable=False),
        sa.Column("mechanism", sa.String, nullable=False),
        sa.Column("unit", sa.String, nullable=False),
        sa.Column("adjacency", sa.String, nullable=False),
        sa.Column("parameters", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("void", sa.Text),
    )
    op.create_table(
        "runs",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("name", sa.String, nullable=False, index=True),
        sa.Column("status", sa.String, nullable=False, index=True),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("version", sa.String, sa.ForeignKey("versions.id")),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("rounds", sa.Integer, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
    )
    op.create_table(
        "events",
        sa.Column("run", sa.String, sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    for table in reversed(TABLES):
        op.drop_table(table)
