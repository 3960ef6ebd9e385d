"""What watches one run, as its config asks: experiment loggers and notifications."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from orchestrator.loggers import LOGGERS, LoggedRun
from orchestrator.observers.base import Observer, Observers
from orchestrator.observers.experiment import Experiment
from orchestrator.observers.webhook import Webhook
from orchestrator.plan import Plan
from orchestrator.spending import spent_by_run
from storage.ledger import Ledger

Observe: TypeAlias = Callable[[str, Mapping[str, Any]], None]


def observers_of(plan: Plan, home: Path, done: int = 0) -> list[Observer]:
    """Return a run's own observers, which have contacted nobody yet.

    Args:
        plan: the run's.
        home: the weft home.
        done: rounds committed before.

    Raises:
        LoggerUnavailable: if a logger needs what is not there.
        BadOptions: if a logger's options do not go together.
        BadWebhook: if there is no address for notifications.
    """
    run = LoggedRun(plan.run, plan.config.name, done, home)
    found: list[Observer] = [
        Experiment(choice.name, LOGGERS.get(choice.name).build(run, **choice.options))
        for choice in plan.loggers
    ]
    notify = plan.config.notify
    return found if notify is None else [*found, Webhook(notify)]


@contextmanager
def watched(plan: Plan, ledger: Ledger, home: Path, observe: Observe) -> Iterator[Observe]:
    """Yield what a run calls with its events: ``observe``, and the run's own observers after it.

    The events ``run`` and ``committed`` gain ``spent``, which returns what the run has spent so
    far by population, computed where somebody asks; ``run`` also gains ``done``, the rounds that
    were committed before.

    Raises:
        LoggerUnavailable, BadOptions, BadWebhook: as :func:`observers_of`.
    """
    done = ledger.run(plan.run).round
    with Observers(*observers_of(plan, home, done)) as others:

        def show(kind: str, data: Mapping[str, Any]) -> None:
            if kind in ("run", "committed"):
                spent = {"spent": cache(partial(spent_by_run, plan, ledger))}
                data = {**data, **spent, **({"done": done} if kind == "run" else {})}
            observe(kind, data)
            others(kind, data)

        yield show
