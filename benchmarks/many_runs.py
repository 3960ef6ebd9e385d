"""What the queue costs with many runs in it: list a page, claim, record an event.

    python benchmarks/many_runs.py [--quick] [--json] [--runs 100000] [--database URL]

Without --database, on SQLite in a temporary folder. Each run's config and plan are of a real size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from _figures import Figure, show
from sqlalchemy import insert

from storage.database import open_database, writing
from storage.ledger import Ledger
from storage.records import now
from storage.schema import events, plans, runs

CONFIG = '{"clients":"' + "c" * 1200 + '"}'
PLAN = '{"participants":"' + "p" * 6000 + '"}'
BATCH = 1000


def fill(ledger: Ledger, count: int) -> None:
    """Insert runs by the thousand: half completed, half queued, of seven priorities."""
    for start in range(0, count, BATCH):
        rows = [
            {
                "id": f"r{n:06d}",
                "name": f"task-{n % 50}",
                "status": ("completed", "queued")[n % 2],
                "config": CONFIG,
                "round": 0,
                "rounds": 10,
                "created_at": now(),
                "priority": n % 7,
                "labels": ('{"gpu":"a100"}', "{}")[n % 3 == 0],
                "seq": 1,
            }
            for n in range(start, min(start + BATCH, count))
        ]
        log = [
            {"run": r["id"], "seq": 1, "kind": "queued", "data": "{}", "created_at": now()}
            for r in rows
        ]
        with writing(ledger._engine) as connection:
            connection.execute(insert(runs), rows)
            connection.execute(insert(plans), [{"run": r["id"], "plan": PLAN} for r in rows])
            connection.execute(insert(events), log)


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Return milliseconds, one a call."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e3)
    return found


def measure(url: str, count: int, repeats: int) -> list[Figure]:
    """Return the figures of one database."""
    ledger = Ledger(open_database(url))
    fill(ledger, count)
    middle = f"r{count // 2:06d}"
    full = {"gpu=a100": 0}
    calls: dict[str, tuple[Callable[[], object], float | None]] = {
        "list the newest 50": (lambda: ledger.runs(50), 50.0),
        "list 50 from the middle": (lambda: ledger.runs(50, before=middle), 50.0),
        "list 50 that are queued": (lambda: ledger.runs(50, status="queued"), 50.0),
        "claim a run": (lambda: ledger.queue.claim("host:1", 60), None),
        "claim past a full label": (lambda: ledger.queue.claim("host:1", 60, full), None),
        "record an event": (lambda: ledger.record(middle, "tick", {"n": 1}), None),
        "is the queue idle": (ledger.queue.is_idle, None),
    }
    setting = f"{url.partition(':')[0]}, {count:,} runs, median of {repeats}"
    found = []
    for name, (call, goal) in calls.items():
        call()
        value = statistics.median(timed(call, repeats))
        found.append(Figure(name, value, "ms", goal, "lower", "", setting))
    ledger._engine.dispose()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="10,000 runs")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--database", help="of an empty PostgreSQL database")
    given = parser.parse_args()
    count = 10_000 if given.quick else given.runs
    with tempfile.TemporaryDirectory() as folder:
        url = given.database or f"sqlite:///{folder}/weft.db"
        show("The queue", measure(url, count, 5 if given.quick else 21), given.json)


if __name__ == "__main__":
    main()
