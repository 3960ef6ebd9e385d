"""A run on one screen: plan, train, accept, aggregate, commit, round after round.

Everything a run needs is in its last committed round and in the ledger, so resuming a run is the
same as running it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from clients.assignment import Assignment
from clients.keys import data_key
from clients.regularizers import When
from orchestrator.acceptance import OPEN, Accepted, decoded_update, lazily, moved
from orchestrator.availability import absent
from orchestrator.backends.base import Backend, Failure, Result
from orchestrator.beginning import begin
from orchestrator.central import Central, central_of
from orchestrator.closing import begin_closing, finish_closing
from orchestrator.cohort import Roster, cohort_of, goal, quorum, roster
from orchestrator.collecting import Collector, RoundFailed
from orchestrator.committed import Commits, Committed, consolidated
from orchestrator.desk import Desk
from orchestrator.downlink import Downlink
from orchestrator.history import Asked, History, Open
from orchestrator.judging import Judge
from orchestrator.merging import beneath
from orchestrator.plan import (
    Participant,
    Plan,
    RoundInputs,
    plan_init,
    plan_round,
)
from orchestrator.policy import TRAIN_LOSS
from orchestrator.reading import opening, plan_reading
from orchestrator.recipes import round_recipe
from orchestrator.rehearsed import rehearsed_people
from orchestrator.relating import relate_again
from orchestrator.remembering import Remembering
from orchestrator.retention import drop_after_close, drop_after_round, folder_of, keep_round
from orchestrator.spending import note_unprotected
from orchestrator.stopping import best, exhausted
from storage.ledger import Ledger, RunFields
from storage.store import AdapterStore
from strategies import STRATEGIES
from strategies.base import Broadcast, ClientSpec, ServerState, Strategy, Tensors, Update

__all__ = ["Cancelled", "Federation", "Observe", "Paused", "RoundFailed"]

Observe = Callable[[str, Mapping[str, Any]], None]


class Paused(RuntimeError):
    """Somebody asked to pause the run; it goes on from here when it is resumed."""


class Cancelled(RuntimeError):
    """Somebody cancelled the run."""


@dataclass(slots=True)
class Federation:
    """One run and all it works with.

    Attributes:
        plan: what the run decided at its start.
        store: where versions are committed.
        ledger: where events and privacy spends are written, each before what follows from it.
        backend: where clients train.
        home: folder for spilled updates and the clients' private state.
        observe: called with each event, for progress; the same events are in the ledger.
        token: of who drives the run: events are refused when it is not the newest any more.
        wanted: returns what people want of the run: ``run``, ``pause`` or ``cancel``.
    """

    plan: Plan
    store: AdapterStore
    ledger: Ledger
    backend: Backend
    home: Path
    observe: Observe = lambda kind, data: None
    token: int | None = None
    wanted: Callable[[], str] = lambda: "run"
    strategy: Strategy = field(init=False)
    _roster: Roster = field(init=False)
    _desk: Desk = field(init=False)
    _downlink: Downlink = field(init=False)
    _collector: Collector = field(init=False)
    _known: History = field(default_factory=History, init=False)
    _commits: Commits = field(init=False)
    _central: Central | None = field(init=False)
    _remembering: Remembering = field(init=False)
    _judge: Judge = field(init=False)
    _absent: tuple[int, set[str]] = field(default=(0, set()), init=False)

    def __post_init__(self) -> None:
        choice, plan = self.plan.strategy, self.plan
        self.strategy = STRATEGIES.get(choice.name).build(**choice.options)
        self._roster = roster(plan.participants, plan.config.cohort)
        self._commits = Commits(self.store, plan.start.stack)
        self._central = central_of(plan, self.home)
        self._desk = Desk(self.backend, self._started, self._stepped, self._heed)
        self._downlink = Downlink(self.store, lambda: self._history().held, self._as_asked)
        self._collector = Collector(
            plan=plan,
            people={p.name: p for p in plan.participants},
            roster=self._roster,
            folder=folder_of(self.home, plan.run),
            desk=self._desk,
            ledger=self.ledger,
            log=self._log,
            history=self._history,
            assign=self._assignments,
            shortened=self._downlink.shortened,
            heed=self._heed,
            unreachable=self._unreachable,
            seal=OPEN if self._central is None else self._central.seal,
        )
        self._judge = Judge(
            plan,
            self.store,
            self.ledger,
            self._desk,
            self._log,
            self._history,
            self._inputs,
            self._unreachable,
        )
        self._remembering = Remembering(plan, self.store, self._read, self._log, self._history)

    def run(self) -> str:
        """Run what is left of the plan and return the id of the final version.

        Raises:
            RoundFailed: if too few updates of a round could be accepted; the run can be resumed.
            Paused, Cancelled: if somebody asked for it.
            LeaseLost: if somebody else drives the run by now.
            KeyLost: if the run's noise cannot be had again, and must be.
        """
        if self._central is not None:
            self._central.refuse_lost_key(self._history())
        private = self.plan.config.privacy
        if private and private.insecure_seed is None and self.plan.config.keyed_by_clients:
            data_key(Path(self._sites))  # by which a spend knows its site: before the first
        try:
            done = self._last_commit() or self._begin()
            done = self._commits.add(self._remembering.prepared(done), self._awaited())
            self._judge.score(done)
            while done.round < self.plan.config.rounds and not self._stops():
                self._heed()
                done = self._round(done)
                self._judge.score(done)
            return self._finish(done)
        finally:
            self._collector.close()

    def _round(self, done: Committed) -> Committed:
        """Ask the cohort, aggregate what it sends and commit the result."""
        opened = self._opened(done)
        relate_again(self.plan, opened.cohort, self.ledger, Path(self._sites))
        accepted = self._collector.collect(opened)
        state = self._aggregated(opened, accepted, done)
        self.observe("aggregated", {"round": opened.round, **state.metrics})
        last = opened.round == self.plan.config.rounds and not self._remembering.ends_apart
        memory = done.memory
        if last:
            memory = consolidated(self.plan.regularizers, state.adapter, memory)
        version = self.store.commit(
            state.adapter,
            auxiliary=state.auxiliary,
            memory=memory,
            parents={done.version: "init" if opened.round == 1 else "round"},
            recipe=round_recipe(self.plan, opened.round, [a.leaf for a in accepted], done.offset),
            metrics=state.metrics,
        )
        if self.plan.config.retention.keep != "none":
            keep_round(self.store, self.plan.run, version, opened.round, accepted)
        faults = {client: list(fault) for client, fault in self._history().faults.items()}
        facts = {
            "round": opened.round,
            "version": version,
            "updates": len(accepted),
            "faults": faults,
        }
        self._log("committed", facts, version=version, round=opened.round)
        self._downlink.turned(opened.round, version, done.state.adapter, state)
        done = Committed(opened.round, version, state, memory, done.offset)
        self._forget(opened.round)
        return self._commits.add(done, self._awaited())

    def _aggregated(
        self, opened: Open, accepted: Sequence[Accepted], done: Committed
    ) -> ServerState:
        """Return the next state, from the updates or from their noised mean alone."""
        if self._central is None:
            return self.strategy.aggregate(done.state, lazily(accepted, self._onto(done)))
        [asked] = self._assignments(opened.round, done.version, self.plan.participants[:1])
        # shares of the noise are added up as the whole numbers that they came as
        fresh = self._onto(done) if asked.noise_share is None else (lambda update, weight: update)
        updates = lazily(accepted, fresh)
        aggregate = partial(self.strategy.aggregate, done.state)
        return self._central.aggregated(aggregate, updates, accepted, asked)

    def _opened(self, done: Committed) -> Open:
        """Return the round that is open, or open the next: whom it asks is written down first."""
        history = self._history()
        if history.open is None:
            config, num_clients = self.plan.config, len(self._roster.names)
            cohort: tuple[str, ...] = ()  # an asynchronous run asks as it goes
            if config.asynchronous is None:
                cohort = cohort_of(self.plan, self._roster, history, self._unreachable())
            self._log(
                "round",
                {
                    "round": done.round + 1,
                    "base": done.version,
                    "cohort": cohort,
                    "goal": goal(config, num_clients),
                    "quorum": quorum(config, num_clients),
                },
            )
            history = self._history()
        assert history.open is not None
        return history.open

    def _read(self, base: Committed, when: When) -> list[Accepted]:
        """Ask everybody what a version is to remember of their data; return what they say."""
        self._heed()
        self._collector.close()
        history = self._history()
        if history.open is None:
            facts = opening(self.plan, self._roster, history, self._unreachable(), base)
            self._log("reading", {**facts, "reading": when})
            history = self._history()
        assert history.open is not None
        relate_again(self.plan, history.open.cohort, self.ledger, Path(self._sites))
        return self._collector.collect(history.open)

    def _assignments(
        self, round_: int, base: str, cohort: Sequence[Participant]
    ) -> list[Assignment]:
        """Return what a round's clients are asked, from a base version: the same every time."""
        start, opened = self._commits.of(base), self._history().open
        inputs = self._inputs(round_, start)

        def broadcast(client: ClientSpec) -> Broadcast:
            return self.strategy.broadcast(start.state, client)

        plan = self.plan
        if opened is not None and opened.reading:
            return plan_reading(plan, inputs, broadcast, cohort, opened.reading)
        if self._central is not None:
            plan = replace(plan, central=self._central.terms_for(start.state))
        return plan_round(plan, inputs, broadcast, cohort)

    def _onto(self, done: Committed) -> Callable[[Update, float], Update]:
        """Return what makes an update of an older version one of ``done``."""

        def fresh(update: Update, weight: float) -> Update:
            update = self._decoded(update)
            if update.base == done.version:
                return update
            base = self._commits.of(update.base).state.adapter
            return moved(update, base, done.state.adapter, weight)

        return fresh

    def _decoded(self, update: Update) -> Update:
        """Return an update with the tensors that its client means by what it sent."""
        asked = self._as_asked(Asked(update.client, update.round, update.base))
        return decoded_update(update, asked)

    def _as_asked(self, asked: Asked) -> Assignment:
        """Return what a client was asked, once more and whole."""
        who = self._collector.people[asked.client]
        [assignment] = self._assignments(asked.round, asked.base, [who])
        return assignment

    def _stops(self) -> bool:
        """Return whether versions get no better, by ``stop``."""
        history, stop = self._history(), self.plan.config.stop
        if stop is None or history.stopped is not None:
            return history.stopped is not None
        if exhausted(history.scored(stop.metric), stop):
            times = "rounds" if stop.metric == TRAIN_LOSS else "evaluations"
            reason = f"{stop.metric} did not improve in {stop.patience} {times}"
            self._log("stopped", {"round": history.round, "reason": reason})
            return True
        return False

    def _finish(self, done: Committed) -> str:
        """Name the run's result and return its id."""
        result = done
        if self.plan.config.select == "best":
            judge = self.plan.config.judge
            top = best(self._history().scored(judge.metric), judge)
            result = self._commits.of(top.version) if top else done
        version = self._remembering.settled(result)
        self._collector.close()  # who is late would draw a new key
        document = self.plan.config.model_dump(mode="json")
        drop_after_close(self.store, self.plan.run, self.home, document)
        name = self.store.name(self.plan.config.name, version)
        facts = {"version": version, "name": name}
        begin_closing(self.home, self.plan.run, document)
        self._log("completed", facts, status="completed", version=version)
        finish_closing(self.home, self.ledger)
        return version

    def _forget(self, round_: int) -> None:
        """Delete the updates that are not kept after a round, and bury those withdrawn by now."""
        folder, retention = self._collector.folder, self.plan.config.retention
        drop_after_round(self.store, self.plan.run, folder, retention, round_)
        self.store.updates.bury()

    def _last_commit(self) -> Committed | None:
        version = self._history().version
        return None if version is None else self._commits.of(version)

    def _awaited(self) -> set[str]:
        return {asked.base for asked in self._history().pending.values()}

    def _begin(self) -> Committed:
        """Commit the version that round 1 starts from."""
        note_unprotected(self.plan, self.ledger, rehearsed_people(self.plan, self.store))
        done = begin(self.plan, self.store, self.strategy, self._initial, self.store.commit)
        self._log("started", {"version": done.version})
        return self._commits.add(done, ())

    def _initial(self, memory: Tensors) -> Update:
        """Return the adapter's first tensors, made where the base model is."""
        self._log("initialising", {"adapter": self.plan.adapter.name})
        below = beneath(self.store, self.plan.start.stack, None)
        asked = plan_init(self.plan, RoundInputs(0, "", below, memory, self._sites))
        result = self._one(asked)
        if isinstance(result, Failure):
            raise RoundFailed(f"the adapter cannot be initialised: {result.reason}")
        assert isinstance(result, Update)
        return result

    def _one(self, asked: Assignment) -> Result:
        """Return the result of what no client is asked, tried again as clients are."""

        def retried(failure: Failure) -> None:
            facts = {"action": asked.action, "round": asked.round, "reason": failure.reason}
            self._log("retried", facts)

        config = self.plan.config
        return self._desk.one(asked, config.deadline_s, config.retries, retried)

    def _inputs(self, round_: int, start: Committed) -> RoundInputs:
        below = self._commits.below(start.version)
        return RoundInputs(round_, start.version, below, start.memory, self._sites)

    @property
    def _sites(self) -> str:
        return str(self.home / "sites")

    def _started(self, assignment: Assignment) -> None:
        if assignment.action == "train":
            self.observe("training", {"client": assignment.client})

    def _stepped(self, assignment: Assignment, step: int, steps: int) -> None:
        if assignment.action == "train":
            self.observe("step", {"client": assignment.client, "step": step, "steps": steps})

    def _unreachable(self) -> set[str]:
        """Return who withdrew, or cannot be asked in the round that is open or comes next.

        Who is not there is looked for once a round; who withdraws, each time.
        """
        history = self._history()
        round_ = history.open.round if history.open else history.round + 1
        if self._absent[0] != round_:
            self._absent = round_, absent(self.plan, round_, self.ledger, self._log)
        return self._absent[1] | self.ledger.withdrawals.names()

    def _heed(self) -> None:
        """Stop where people want the run to stop."""
        run, wish = self.plan.run, self.wanted()
        if wish == "pause":
            raise Paused(f"run {run} is paused; go on with: weft runs resume {run}")
        if wish == "cancel":
            raise Cancelled(f"run {run} is cancelled; what it committed stays")

    def _history(self) -> History:
        """Return the run's history; reads only what was written since the last time."""
        news = self.ledger.events(self.plan.run, after=self._known.seq)
        self._known = self._known.after_all(news)
        return self._known

    def _log(self, kind: str, data: Mapping[str, Any], **fields: Unpack[RunFields]) -> None:
        """Write an event, and what it changes of the run's row, to the ledger, then show it."""
        self.ledger.record(self.plan.run, kind, data, token=self.token, **fields)
        self.observe(kind, data)
