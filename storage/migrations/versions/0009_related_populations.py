"""Which populations share records, what budgets do when they are short, runs without privacy."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "populations", sa.Column("policy", sa.String, nullable=False, server_default="refuse")
    )
    op.create_table(
        "related_populations",
        sa.Column("population", sa.String, primary_key=True),
        sa.Column("other", sa.String, primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "unprotected_runs",
        sa.Column("population", sa.String, primary_key=True),
        sa.Column("run", sa.String, primary_key=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("who", sa.String, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("unprotected_runs")
    op.drop_table("related_populations")
    op.drop_column("populations", "policy")
