"""Sites' nodes: who they are, whether they are let in, and which clients' data lie there."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "nodes",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("public_key", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("budgets", sa.Text, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("who", sa.String, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_nodes_fingerprint", "nodes", ["fingerprint"])
    op.create_table(
        "node_sightings",
        sa.Column("node", sa.String, primary_key=True),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("flower_id", sa.String),
        sa.Column("seen_at", sa.DateTime(timezone=True)),
        sa.Column("weft", sa.String),
        sa.Column("flwr", sa.String),
        sa.Column("problem", sa.Text),
    )
    op.add_column("clients", sa.Column("node", sa.String))
    op.create_index("ix_clients_node", "clients", ["node"])


def downgrade() -> None:
    op.drop_index("ix_clients_node", "clients")
    op.drop_column("clients", "node")
    op.drop_table("node_sightings")
    op.drop_table("nodes")
