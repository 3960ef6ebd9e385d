"""A run on one screen: plan, train, accept, aggregate, commit, round after round.

Everything a run needs is in its last committed round and in the ledger, so resuming a run is the
same as running it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from clients.assignment import Assignment
from clients.evaluate import Evaluation
from clients.initialisations import OFFSET
from clients.regularizers import REGULARIZERS, namespaced, recall
from orchestrator.acceptance import Accepted, lazily, refusal, spill
from orchestrator.backends.base import Backend, Failure, complete
from orchestrator.merging import beneath, split_head
from orchestrator.plan import Plan, RoundInputs, plan_evaluation, plan_init, plan_round
from orchestrator.recipes import offset_recipe, round_recipe, start_recipe
from orchestrator.spending import reserve
from storage.ledger import Ledger, RunFields
from storage.store import AdapterStore
from strategies import STRATEGIES
from strategies.base import Broadcast, ClientSpec, ServerState, Strategy, Tensors, Update

Observe = Callable[[str, Mapping[str, Any]], None]

_EDGES = {"fresh": "init", "continue": "continue", "stack": "stack"}


class RoundFailed(RuntimeError):
    """No client of a round returned an update that could be accepted."""


class Paused(RuntimeError):
    """Somebody asked to pause the run; it goes on from here when it is resumed."""


class Cancelled(RuntimeError):
    """Somebody cancelled the run."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The last committed round.

    Attributes:
        round: 0 before the first round.
        version: its id.
        state: what the strategy carries.
        memory: regulariser memory.
        offset: id of what lies underneath besides the stack, or None.
    """

    round: int
    version: str
    state: ServerState
    memory: Tensors
    offset: str | None


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
    underlay: Tensors = field(init=False)

    def __post_init__(self) -> None:
        choice = self.plan.strategy
        self.strategy = STRATEGIES.get(choice.name).build(**choice.options)
        self.underlay = beneath(self.store, self.plan.start.stack, None)

    def run(self) -> str:
        """Run what is left of the plan and return the id of the final version.

        Raises:
            RoundFailed: if no update of a round could be accepted; the run can be resumed.
            Paused, Cancelled: if somebody asked for it.
            LeaseLost: if somebody else drives the run by now.
        """
        done = self._last_commit() or self._begin()
        self.underlay = beneath(self.store, self.plan.start.stack, done.offset)
        for round_ in range(done.round + 1, self.plan.config.rounds + 1):
            self._heed()
            done = self._round(round_, done)
        name = self.store.name(self.plan.config.name, done.version)
        self._log("completed", {"version": done.version, "name": name}, status="completed")
        return done.version

    def _heed(self) -> None:
        """Stop where people want the run to stop."""
        run, wish = self.plan.run, self.wanted()
        if wish == "pause":
            raise Paused(f"run {run} is paused; go on with: weft runs resume {run}")
        if wish == "cancel":
            raise Cancelled(f"run {run} is cancelled; what it committed stays")

    def _round(self, round_: int, done: Committed) -> Committed:
        """Ask the cohort, aggregate what it sends and commit the result."""
        inputs = self._inputs(round_, done.version, done.memory)

        def broadcast(client: ClientSpec) -> Broadcast:
            return self.strategy.broadcast(done.state, client)

        assignments = plan_round(self.plan, inputs, broadcast, self._participations(round_))
        self._log("round", {"round": round_, "cohort": [a.client for a in assignments]})
        assignments = reserve(self.plan, assignments, self.ledger, self._log)
        accepted = self._collect(assignments)
        state = self.strategy.aggregate(done.state, lazily(accepted))
        last = round_ == self.plan.config.rounds
        memory = self._consolidated(state.adapter, done.memory) if last else done.memory
        version = self.store.commit(
            state.adapter,
            auxiliary=state.auxiliary,
            memory=memory,
            parents={done.version: "init" if round_ == 1 else "round"},
            recipe=round_recipe(self.plan, round_, [a.leaf for a in accepted], done.offset),
        )
        facts = {"round": round_, "version": version, "updates": len(accepted)}
        self._log("committed", facts, version=version, round=round_)
        self._evaluate(inputs, version, state.adapter)
        return Committed(round_, version, state, memory, done.offset)

    def _collect(self, assignments: list[Assignment]) -> list[Accepted]:
        """Return the accepted updates in client order; each is spilled as it arrives."""
        sent = {a.client: a for a in assignments}
        people = {p.name: p for p in self.plan.participants}
        accepted: dict[str, Accepted] = {}
        refused: dict[str, str] = {}
        for result in self._results(assignments, shown=True):
            if isinstance(result, Update):
                client, reason = result.client, refusal(result, sent[result.client])
                if reason is None:
                    folder = self.home / "runs" / self.plan.run / f"round-{result.round}"
                    accepted[client] = spill(result, people[client], folder)
                    self._log("accepted", {"client": client, **result.metrics})
                    continue
            else:
                assert isinstance(result, Failure)
                client, reason = result.client, result.reason
            refused[client] = reason
            self._log("refused", {"client": client, "reason": reason})
        if not accepted:
            why = "; ".join(f"{client}: {reason}" for client, reason in sorted(refused.items()))
            raise RoundFailed(
                f"no update could be accepted ({why or 'no client was left to ask'}); mend it and "
                f"go on with: weft run --resume {self.plan.run}"
            )
        return [accepted[client] for client in sorted(accepted)]

    def _last_commit(self) -> Committed | None:
        record = self.ledger.run(self.plan.run)
        started = [e for e in self.ledger.events(self.plan.run) if e.kind == "started"]
        version = record.version or (started[-1].data["version"] if started else None)
        if version is None:
            return None
        state = ServerState(self.store.tensors(version), self.store.auxiliary(version))
        offset = self.store.version(version).recipe.get("offset")
        return Committed(record.round, version, state, self.store.memory(version), offset)

    def _begin(self) -> Committed:
        """Commit the version that round 1 starts from, after the offset that it lies on, if any."""
        start = self.plan.start
        memory = self.store.memory(start.version) if start.version else {}
        earlier = self.store.tensors(start.version) if start.version else {}
        adapter, offset, read = earlier, start.offset, None
        if start.mode != "continue":
            kept = split_head(earlier)[1] if start.mode == "stack" else {}  # rows of earlier tasks
            made, offset, read = self._initial(memory)
            adapter = {**made, **kept}
            for choice in self.plan.regularizers:
                method = REGULARIZERS.get(choice.name).build(**choice.options)
                adapter = dict(method.initialise(adapter, recall(memory, choice.name)))
        state = self.strategy.init(adapter)
        parents = {start.version: _EDGES[start.mode]} if start.version else {}
        version = self.store.commit(
            state.adapter,
            auxiliary=state.auxiliary,
            memory=memory,
            parents=parents | ({offset: "offset"} if offset else {}),
            recipe=start_recipe(self.plan, offset, read),
        )
        self._log("started", {"version": version})
        return Committed(0, version, state, memory, offset)

    def _initial(self, memory: Tensors) -> tuple[Tensors, str | None, Mapping[str, Any] | None]:
        """Return the adapter's first tensors, their offset's id, and which data they come from.

        They are made where the base model is.
        """
        self._log("initialising", {"adapter": self.plan.adapter.name})
        [result] = self._results([plan_init(self.plan, self._inputs(0, "", memory))])
        if isinstance(result, Failure):
            raise RoundFailed(f"the adapter cannot be initialised: {result.reason}")
        assert isinstance(result, Update)
        offset = recall(result.tensors, OFFSET.removesuffix("/"))
        own = {k: v for k, v in result.tensors.items() if not k.startswith(OFFSET)}
        read = {"examples": result.num_examples, "fingerprint": result.fingerprint}
        chosen = read if result.fingerprint else None
        recipe = offset_recipe(self.plan, chosen)
        return own, self.store.commit(offset, parents={}, recipe=recipe) if offset else None, chosen

    def _consolidated(self, adapter: Tensors, memory: Tensors) -> Tensors:
        """Return the memory after the task, from the final adapter alone."""
        result = dict(memory)
        for choice in self.plan.regularizers:
            method = REGULARIZERS.get(choice.name).build(**choice.options)
            own = method.consolidate(adapter, recall(memory, choice.name))
            result |= namespaced(own, choice.name)
        return result

    def _evaluate(self, inputs: RoundInputs, version: str, adapter: Tensors) -> None:
        chosen, rounds = self.plan.config.evaluate, self.plan.config.rounds
        if chosen is None or (inputs.round % chosen.every and inputs.round != rounds):
            return
        [result] = self._results([plan_evaluation(self.plan, inputs, adapter, chosen)])
        if isinstance(result, Evaluation):
            self.store.record_metrics(version, result.metrics)
            self._log("evaluated", {"round": inputs.round, **result.metrics})
        elif isinstance(result, Failure):
            reason = {"round": inputs.round, "reason": result.reason}
            self._log("evaluation failed", reason)

    def _results(self, assignments: list[Assignment], shown: bool = False) -> Any:
        def started(assignment: Assignment) -> None:
            if shown:
                self.observe("training", {"client": assignment.client})

        deadline = self.plan.config.backend.deadline_s
        return complete(self.backend, assignments, deadline, started)

    def _inputs(self, round_: int, version: str, memory: Tensors) -> RoundInputs:
        return RoundInputs(round_, version, self.underlay, memory, str(self.home / "sites"))

    def _participations(self, before: int) -> dict[str, int]:
        """Return in how many rounds before ``before`` each client was assigned."""
        rounds = {
            event.data["round"]: event.data["assigned"]
            for event in self.ledger.events(self.plan.run)
            if event.kind == "assigned" and event.data["round"] < before
        }
        clients = [client for assigned in rounds.values() for client in assigned]
        return {client: clients.count(client) for client in set(clients)}

    def _log(self, kind: str, data: Mapping[str, Any], **fields: Unpack[RunFields]) -> None:
        """Write an event, and what it changes of the run's row, to the ledger, then show it."""
        self.ledger.record(self.plan.run, kind, data, token=self.token, **fields)
        self.observe(kind, data)
