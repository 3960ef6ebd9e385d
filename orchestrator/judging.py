"""How good a run's versions are: on data held back for it, or on what its clients hold out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.assignment import Assignment
from clients.evaluate import Evaluation
from orchestrator.asking_clients import chosen
from orchestrator.backends.base import Failure
from orchestrator.client_scores import Table, asked_of, table
from orchestrator.committed import Committed
from orchestrator.desk import Desk
from orchestrator.history import History
from orchestrator.plan import Participant, Plan, RoundInputs, plan_evaluation
from orchestrator.spending import Log, charged
from storage.ledger import Ledger
from storage.store import AdapterStore


@dataclass(frozen=True, slots=True)
class Judge:
    """Scores a run's versions where that is due.

    Attributes:
        plan: the run's plan.
        store: where scores are kept with the versions.
        ledger: where spends are written, before anything is sent.
        desk: where assignments go.
        log: writes an event.
        history: returns the run's history, with all events so far.
        inputs: returns what an assignment of a round needs to start from a version.
        unreachable: returns who cannot be asked now.
    """

    plan: Plan
    store: AdapterStore
    ledger: Ledger
    desk: Desk
    log: Log
    history: Callable[[], History]
    inputs: Callable[[int, Committed], RoundInputs]
    unreachable: Callable[[], set[str]]

    def score(self, done: Committed) -> None:
        """Score a version where that is due and was not done."""
        asked, config, round_ = self.plan.config.evaluate, self.plan.config, done.round
        if asked is None or not asked.due(round_, config.rounds):
            return
        if self.history().judged >= round_:
            return
        base = plan_evaluation(self.plan, self.inputs(round_, done), done.state.adapter, asked)
        if asked.clients is None:
            [result] = self._answers([base])
            metrics = dict(result.metrics) if isinstance(result, Evaluation) else {}
            why = result.reason if isinstance(result, Failure) else ""
        else:
            found = self._by_clients(base)
            metrics = found.metrics
            why = "; ".join(f"{client}: {reason}" for client, reason in found.failed.items())
        if metrics:
            self.store.record_metrics(done.version, metrics)
            self.log("evaluated", {"round": round_, **metrics})
        else:
            self.log("evaluation failed", {"round": round_, "reason": why or "noise hides it"})

    def _by_clients(self, base: Assignment) -> Table:
        """Ask clients; a crash in between asks again, and is told what was told before."""
        gone = self.unreachable()
        people = [who for who in scorers(self.plan) if who.name not in gone]
        private = {who.name: who.scoring for who in people if who.scoring is not None}
        asked = asked_of(base, people, private)
        populations = {who.name: who.population for who in people}
        over = charged([one for one in asked if one.private], populations, self.ledger)
        kept = [one for one in asked if one.client not in over]
        refused = {client: str(error) for client, error in over.items()}
        found = table(self._answers(kept), asked, refused)
        self.log(
            "scored by clients",
            {
                "round": base.round,
                "clients": {
                    row.client: {name: one.value for name, one in row.scores.items()}
                    for row in found.rows
                    if not row.reason
                },
                "failed": found.failed,
            },
        )
        return found

    def _answers(self, asked: Sequence[Assignment]) -> list[Any]:
        def retried(failure: Failure) -> None:
            facts: Mapping[str, Any] = {"action": "evaluate", "round": failure.round}
            named = {"client": failure.client} if failure.client else {}
            self.log("retried", {**facts, **named, "reason": failure.reason})

        config = self.plan.config
        return self.desk.several(asked, config.deadline_s, config.retries, retried)


def scorers(plan: Plan) -> list[Participant]:
    """Return which clients of a run are asked for their scores, by name."""
    asked = plan.config.evaluate
    if asked is None or asked.clients is None:
        return []
    return chosen(plan.participants, asked.clients)
