"""The updates of a round as they come in: until enough are there, or all, or time is up.

What happens is decided here once and written down before it has any effect; see
:mod:`orchestrator.history`. A round that was interrupted keeps what it has accepted and asks again
for the rest: a client that has its update already sends the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

from clients.assignment import Assignment
from orchestrator.acceptance import OPEN, Accepted, Seal, refusal, spill, spilled
from orchestrator.backends.base import Failure, Result
from orchestrator.cohort import Roster, asked_next
from orchestrator.desk import Desk
from orchestrator.history import Asked, History, Key, Open, Taken
from orchestrator.plan import Participant, Plan
from orchestrator.spending import Log, bytes_sent, reserve
from storage.ledger import Ledger
from strategies.base import Update

End: TypeAlias = Literal["enough", "nobody left", "deadline"]
_WITHDREW = "the client withdrew; its updates are used no more"
_DIFFERS = "the update is not the one that was accepted before; it cannot be taken in its place"


class RoundFailed(RuntimeError):
    """Too few clients of a round returned an update that could be accepted."""


@dataclass(slots=True)
class Collector:
    """Asks clients and takes their updates, round after round.

    Attributes:
        plan: the run's plan.
        people: its participants by name.
        roster: who may be asked.
        folder: the run's own, for spilled updates.
        desk: where assignments go.
        ledger: where spends are written, before anything is sent.
        log: writes an event.
        history: returns the run's history, with all events so far.
        assign: returns the assignments of a round's clients, from a base version.
        shortened: returns assignments without what their clients hold.
        heed: raises where people want the run to stop.
        unreachable: returns who cannot be asked now.
        seal: what accepted updates are known by.
        clock: returns seconds.
    """

    plan: Plan
    people: Mapping[str, Participant]
    roster: Roster
    folder: Path
    desk: Desk
    ledger: Ledger
    log: Log
    history: Callable[[], History]
    assign: Callable[[int, str, Sequence[Participant]], list[Assignment]]
    shortened: Callable[[Sequence[Assignment]], list[Assignment]]
    heed: Callable[[], None]
    unreachable: Callable[[], set[str]]
    seal: Seal = OPEN
    clock: Callable[[], float] = time.monotonic
    _sent: dict[Key, Assignment] = field(default_factory=dict, init=False)
    _short: set[Key] = field(default_factory=set, init=False)
    _given_up: set[Key] = field(default_factory=set, init=False)
    _tries: dict[Key, int] = field(default_factory=dict, init=False)
    _taken: dict[Key, Accepted] = field(default_factory=dict, init=False)
    _lost: dict[Key, Taken] = field(default_factory=dict, init=False)
    _reasons: dict[str, str] = field(default_factory=dict, init=False)

    def collect(self, opened: Open) -> list[Accepted]:
        """Return what the round aggregates, by client and round; decided and written down.

        Raises:
            RoundFailed: if too few updates could be accepted.
        """
        history = self.history()
        self._reasons.clear()
        gone = self.ledger.withdrawals.names()
        taken = [one for one in history.taken.values() if one.client not in gone]
        self._recover(opened.closed or taken)
        self._ask(self._lost.values())
        if opened.closed is None:
            self._drop_stale(opened, history)
            self._ask(_outstanding(opened, self.history()))
        end = self._receive(opened)
        return self._close(opened, end) if opened.closed is None else self._as_decided(opened)

    def close(self) -> None:
        """Give up what still runs."""
        self.desk.give_up()
        self._sent.clear()
        self._short.clear()
        self._given_up.clear()

    def _recover(self, known: Iterable[Taken]) -> None:
        """Find accepted updates on disk; what is not there, or damaged, must come again."""
        self._taken.clear()
        self._lost.clear()
        for one in known:
            found = spilled(one, self.people[one.client], self.folder, self.seal)
            if found is None:
                self._lost[one.key] = one
            else:
                self._taken[one.key] = found

    def _drop_stale(self, opened: Open, history: History) -> None:
        """Wait no longer for who would answer with an update that is too old."""
        stale = self.plan.config.stale
        for asked in history.pending.values():
            age = opened.round - asked.round
            if stale is not None and age > stale.max_staleness:
                if self._sent.pop((asked.client, asked.round), None) is not None:
                    self._given_up.add((asked.client, asked.round))
                reason = f"its update would be {age} versions old, allowed {stale.max_staleness}"
                self._refuse(asked.client, asked.round, reason)

    def _ask(self, wanted: Iterable[Asked | Taken]) -> None:
        """Send assignments to those who have none, their spends on the ledger first."""
        gone = self.ledger.withdrawals.names()
        missing = [one for one in wanted if (one.client, one.round) not in self._sent]
        open_ = [one for one in missing if one.client not in gone]
        open_.sort(key=lambda one: (one.round, one.base, one.client))
        for (round_, base), group in groupby(open_, key=lambda one: (one.round, one.base)):
            assignments = self.assign(round_, base, [self.people[one.client] for one in group])
            sent = {a.client: a for a in self.shortened(assignments)}
            kept = reserve(assignments, self.people, self.ledger, self._noted, sent)
            self._sent |= {(a.client, a.round): a for a in kept}
            self._short |= {(a.client, a.round) for a in kept if sent[a.client].held}
            self.desk.ask(sent[a.client] for a in kept)

    def _refill(self) -> None:
        """Keep as many clients training as an asynchronous run wants."""
        history = self.history()
        assert history.open is not None
        names = asked_next(self.plan, self.roster, history, self.unreachable())
        self._ask([Asked(name, history.open.round, history.open.base) for name in names])

    def _receive(self, opened: Open) -> End:
        """Take results until enough are there, nobody is left to wait for, or time is up."""
        until = self.clock() + self.plan.config.deadline_s
        while True:
            full = opened.closed is not None or self._count(opened) >= opened.goal
            if full and not self._lost:
                return "enough"
            asks_more = self.plan.config.asynchronous is not None and not opened.reading
            if asks_more and opened.closed is None:
                self._refill()
            if not self._sent:
                return "nobody left"
            self.heed()
            if self.clock() > until:
                return "deadline"
            result = self.desk.next()
            if result is not None:
                self._take(result)

    def _count(self, opened: Open) -> int:
        """Return how many updates count towards the round's goal: late ones are a bonus."""
        if self.plan.config.asynchronous is not None:
            return len(self._taken)
        return sum(round_ == opened.round for _, round_ in self._taken)

    def _take(self, result: Result) -> None:
        """Accept an update, or try again, or take note of the failure."""
        if (result.client, result.round) not in self._sent:
            misplaced = self._misplaced(result)
            if misplaced is None:
                return
            result = misplaced
        key = (result.client, result.round)
        assignment = self._sent[key]
        if result.client in self.ledger.withdrawals.names():
            del self._sent[key]
            self._refuse(*key, _WITHDREW)
            return
        short = key in self._short
        self._short.discard(key)  # what is asked again goes whole
        if isinstance(result, Failure) and result.not_held and short:
            asked = {"round": result.round, "base": assignment.base, "assigned": [result.client]}
            self.log("assigned", {**asked, **bytes_sent([assignment])})
            self.desk.ask([assignment])
            return
        if isinstance(result, Failure):
            self._tries[key] = self._tries.get(key, 0) + 1
            if self._tries[key] <= self.plan.config.retries and not result.final:
                facts = {"client": result.client, "round": result.round, "reason": result.reason}
                self.log("retried", facts)
                self.desk.ask([assignment])
                return
        del self._sent[key]
        self._tries.pop(key, None)
        if isinstance(result, Failure):
            self._refuse(*key, result.reason)
            return
        assert isinstance(result, Update)
        reason = refusal(result, assignment, self.plan.config.max_update_norm)
        if reason is None:
            accepted = spill(result, self.people[result.client], self.folder, self.seal)
            promised = self._lost.pop(key, None)
            if promised is None or promised.digest == accepted.leaf["digest"]:
                self._taken[key] = accepted
                facts = {k: accepted.leaf[k] for k in ("client", "base", "digest")}
                facts |= {"round": result.round, "bytes": accepted.path.stat().st_size}
                self.log("accepted", {**result.metrics, **facts})
                return
            reason = _DIFFERS
        self._refuse(*key, reason)

    def _misplaced(self, result: Result) -> Failure | None:
        """Return the failure of a client that answers with an update that it was not asked for.

        None where it owes no other, and where it was given up. An update that was accepted already
        is refused with a sentence that is no fault: the first counts.
        """
        key = (result.client, result.round)
        if key in self._taken and isinstance(result, Update):
            reason = f"its update of round {result.round} came again, and the first counts"
            self.log("duplicate", {"client": key[0], "round": key[1], "reason": reason})
            return None
        if key in self._given_up:
            self._given_up.discard(key)
            return None
        owed = next((a for (client, _), a in self._sent.items() if client == result.client), None)
        if owed is None or not isinstance(result, Update):
            return None
        return Failure(owed.client, owed.round, str(refusal(result, owed)))

    def _noted(self, kind: str, data: Mapping[str, Any]) -> None:
        """Log an event, and know why a client is not asked: a budget has too little left."""
        if kind == "refused":
            self._reasons[data["client"]] = data["reason"]
        self.log(kind, data)

    def _refuse(self, client: str, round_: int, reason: str) -> None:
        self._lost.pop((client, round_), None)
        self._reasons[client] = reason
        self.log("refused", {"client": client, "round": round_, "reason": reason, "fault": True})

    def _as_decided(self, opened: Open) -> list[Accepted]:
        """Return what was decided before the run was interrupted."""
        assert opened.closed is not None
        gone = [one.client for one in opened.closed if one.key not in self._taken]
        if gone:
            raise RoundFailed(
                f"round {opened.round} was closed with an update of {gone[0]} that is gone, and it "
                f"cannot be had again ({self._reasons.get(gone[0], 'no answer in time')}); go on "
                f"when it can: weft run --resume {self.plan.run}"
            )
        return [self._taken[one.key].weighing(one.weight) for one in opened.closed]

    def _close(self, opened: Open, end: End) -> list[Accepted]:
        """Decide what is aggregated and what becomes of the others, and write it down."""
        stale = None if opened.reading else self.plan.config.stale  # nothing comes after it
        waiting = sorted(client for client, _ in self._sent)
        gone = self.ledger.withdrawals.names()
        missed = waiting if end == "deadline" else []
        for client, _ in list(self._taken):
            if client in gone:
                self._reasons[client] = _WITHDREW
        self._taken = {key: one for key, one in self._taken.items() if key[0] not in gone}
        if self._count(opened) < max(opened.quorum, 1):
            raise self._failed(opened, missed)
        updates = []
        for (_, round_), accepted in sorted(self._taken.items()):
            age = opened.round - round_
            updates.append(accepted.weighing(stale.weight(age) if stale and age else 1.0))
        kept = ("client", "base", "digest", "weight")
        self.log(
            "closed",
            {
                "round": opened.round,
                "updates": [{**{k: a.leaf[k] for k in kept}, "round": a.round} for a in updates],
                "late": waiting if stale else [],
                "missed": [] if stale else missed,
                "spare": [] if stale or missed else waiting,
            },
        )
        if not stale:
            self.close()
        return updates

    def _failed(self, opened: Open, missed: Sequence[str]) -> RoundFailed:
        count = self._count(opened)
        facts = {"round": opened.round, "updates": count, "quorum": opened.quorum}
        self.log("below quorum", {**facts, "missed": missed})
        reasons = self._reasons | dict.fromkeys(missed, "missed the round's deadline")
        why = "; ".join(f"{client}: {reason}" for client, reason in sorted(reasons.items()))
        short = f"{count} of the {opened.quorum} updates that it needs" if count else "no update"
        return RoundFailed(
            f"round {opened.round}: {short} could be accepted "
            f"({why or 'no client was left to ask'}); mend it and go on with: "
            f"weft run --resume {self.plan.run}"
        )


def _outstanding(opened: Open, history: History) -> list[Asked]:
    """Return what was asked and not answered, and what of the cohort was not asked yet."""
    answered = {client for client, round_ in history.taken if round_ == opened.round}
    current = history.open or opened
    done = {*answered, *current.refused, *history.pending}
    fresh = [Asked(c, opened.round, opened.base) for c in opened.cohort if c not in done]
    return [*history.pending.values(), *fresh]
