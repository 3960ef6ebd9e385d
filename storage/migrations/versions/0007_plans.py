"""A run's plan in a table of its own: an event rewrites the run's row, which was megabytes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "plans",
        sa.Column("run", sa.String, sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("plan", sa.Text, nullable=False),
    )
    op.execute("INSERT INTO plans (run, plan) SELECT id, plan FROM runs")
    op.drop_column("runs", "plan")


def downgrade() -> None:
    op.add_column("runs", sa.Column("plan", sa.Text, nullable=False, server_default="{}"))
    own = "SELECT plans.plan FROM plans WHERE plans.run = runs.id"
    op.execute(f"UPDATE runs SET plan = ({own})")
    op.drop_table("plans")
