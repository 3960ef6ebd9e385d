"""Which client updates are kept as blobs; an older weft kept them in folders of their runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "kept_updates",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("run", sa.String, sa.ForeignKey("runs.id"), primary_key=True, index=True),
        sa.Column("client", sa.String, nullable=False, index=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("version", sa.String, sa.ForeignKey("versions.id"), nullable=False, index=True),
        sa.Column("blob", sa.String),
    )


def downgrade() -> None:
    op.drop_table("kept_updates")
