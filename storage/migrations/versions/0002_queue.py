"""Runs as a projection of their events, and as a queue: leases, priorities, labels."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

QUEUE = "ix_runs_status_priority_number_labels"
PAGE = 500


def upgrade() -> None:
    # plain ALTER TABLE on both databases: no table is made anew, so references stay as they are
    for column in _columns():
        op.add_column("runs", column)
    op.add_column("events", sa.Column("changes", sa.Text, nullable=False, server_default="{}"))
    op.drop_index("ix_runs_status", "runs")
    op.create_index(QUEUE, "runs", ["status", "priority", "number", "labels"])
    op.create_index("ix_runs_status_number", "runs", ["status", "number"])
    op.create_index("ix_runs_version", "runs", ["version"])
    _say_where_each_run_stands(op.get_bind())


def _columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
        sa.Column("labels", sa.Text, nullable=False, server_default="{}"),
        sa.Column("owner", sa.String),
        sa.Column("token", sa.Integer, nullable=False, server_default="0"),
        sa.Column("lease_until", sa.DateTime(timezone=True)),
        sa.Column("wanted", sa.String, nullable=False, server_default="run"),
        sa.Column("seq", sa.Integer, nullable=False, server_default="0"),
    )


def _say_where_each_run_stands(connection: sa.Connection) -> None:
    """Give each run an event with its row: until now, events did not say what they changed."""
    time = sa.DateTime(timezone=True)
    runs = sa.table(
        "runs",
        *(sa.column(name) for name in ("id", "status", "version", "round", "rounds", "error")),
        *(sa.column("number", sa.Integer), sa.column("seq", sa.Integer)),
        *(sa.column("started_at", time), sa.column("finished_at", time)),
    )
    events = sa.table(
        "events",
        *(sa.column(name) for name in ("run", "seq", "kind", "data", "changes")),
        sa.column("created_at", time),
    )
    last = sa.select(sa.func.max(events.c.seq)).where(events.c.run == runs.c.id)
    moment = datetime.now(UTC)
    number = -1
    while True:
        page = sa.select(runs, last.scalar_subquery().label("last")).where(runs.c.number > number)
        rows = connection.execute(page.order_by(runs.c.number).limit(PAGE)).all()
        if not rows:
            return
        number = rows[-1].number
        connection.execute(
            sa.insert(events),
            [
                {
                    "run": row.id,
                    "seq": (row.last or 0) + 1,
                    "kind": "migrated",
                    "data": "{}",
                    "changes": json.dumps(_standing(row), sort_keys=True, ensure_ascii=False),
                    "created_at": moment,
                }
                for row in rows
            ],
        )
        for row in rows:
            here = sa.update(runs).where(runs.c.number == row.number)
            connection.execute(here.values(seq=(row.last or 0) + 1))


def _standing(row: sa.Row[Any]) -> dict[str, Any]:
    names = ("status", "version", "round", "rounds", "error")
    times = {name: getattr(row, name) for name in ("started_at", "finished_at")}
    return {name: getattr(row, name) for name in names} | {
        # SQLite gives back a time without its zone, which is UTC
        name: time and (time if time.tzinfo else time.replace(tzinfo=UTC)).isoformat()
        for name, time in times.items()
    }


def downgrade() -> None:
    op.drop_index("ix_runs_version", "runs")
    op.drop_index("ix_runs_status_number", "runs")
    op.drop_index(QUEUE, "runs")
    op.create_index("ix_runs_status", "runs", ["status"])
    op.execute("DELETE FROM events WHERE kind = 'migrated'")
    op.execute("UPDATE runs SET status = 'failed' WHERE status = 'paused'")
    op.drop_column("events", "changes")
    for column in reversed(_columns()):
        op.drop_column("runs", column.name)
