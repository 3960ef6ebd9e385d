"""What clients hold out of their data, which is never trained on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("clients", sa.Column("holdout", sa.Text))


def downgrade() -> None:
    op.drop_column("clients", "holdout")
