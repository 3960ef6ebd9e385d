"""A run on one screen: plan, train, accept, aggregate, commit, round after round.

Everything a run needs is in its last committed round and in the ledger, so resuming a run is the
same as running it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clients.assignment import Assignment
from clients.evaluate import Evaluation
from clients.regularizers import REGULARIZERS, namespaced, recall
from orchestrator.acceptance import Accepted, lazily, refusal, spill
from orchestrator.backends.base import Backend, Failure, complete
from orchestrator.merging import split_head, stacked
from orchestrator.plan import Plan, RoundInputs, plan_evaluation, plan_init, plan_round
from orchestrator.recipes import round_recipe, start_recipe
from orchestrator.spending import reserve
from storage.ledger import Ledger
from storage.store import AdapterStore
from strategies import STRATEGIES
from strategies.base import Broadcast, ClientSpec, ServerState, Strategy, Tensors, Update

Observe = Callable[[str, Mapping[str, Any]], None]

_EDGES = {"fresh": "init", "continue": "continue", "stack": "stack"}


class RoundFailed(RuntimeError):
    """No client of a round returned an update that could be accepted."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The last committed round.

    Attributes:
        round: 0 before the first round.
        version: its id.
        state: what the strategy carries.
        memory: regulariser memory.
    """

    round: int
    version: str
    state: ServerState
    memory: Tensors


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
    """

    plan: Plan
    store: AdapterStore
    ledger: Ledger
    backend: Backend
    home: Path
    observe: Observe = lambda kind, data: None
    strategy: Strategy = field(init=False)
    underlay: Tensors = field(init=False)

    def __post_init__(self) -> None:
        choice = self.plan.strategy
        self.strategy = STRATEGIES.get(choice.name).build(**choice.options)
        self.underlay = stacked([self.store.tensors(ref) for ref in self.plan.start.stack])

    def run(self) -> str:
        """Run what is left of the plan and return the id of the final version.

        Raises:
            RoundFailed: if no update of a round could be accepted; the run can be resumed.
        """
        done = self._last_commit() or self._begin()
        for round_ in range(done.round + 1, self.plan.config.rounds + 1):
            done = self._round(round_, done)
        name = self.store.name(self.plan.config.name, done.version)
        self.ledger.set_status(self.plan.run, "completed")
        self._log("completed", {"version": done.version, "name": name})
        return done.version

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
        self.observe("aggregated", {"round": round_})
        last = round_ == self.plan.config.rounds
        memory = self._consolidated(state.adapter, done.memory) if last else done.memory
        version = self.store.commit(
            state.adapter,
            auxiliary=state.auxiliary,
            memory=memory,
            parents={done.version: "init" if round_ == 1 else "round"},
            recipe=round_recipe(self.plan, round_, [a.leaf for a in accepted]),
        )
        self.ledger.set_status(self.plan.run, "running", version=version, round=round_)
        self._log("committed", {"round": round_, "version": version, "updates": len(accepted)})
        self._evaluate(inputs, version, state.adapter)
        return Committed(round_, version, state, memory)

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
                    size = accepted[client].path.stat().st_size
                    self._log("accepted", {"client": client, "bytes": size, **result.metrics})
                    continue
            else:
                assert isinstance(result, Failure)
                client, reason = result.client, result.reason
            refused[client] = reason
            self._log("refused", {"client": client, "reason": reason})
        if not accepted:
            self._log("below quorum", {"updates": 0, "quorum": 1})
            why = "; ".join(f"{client}: {reason}" for client, reason in sorted(refused.items()))
            raise RoundFailed(
                f"no update could be accepted ({why or 'no client was left to ask'}); mend it and "
                f"go on with: weft run --resume {self.plan.run}"
            )
        return [accepted[client] for client in sorted(accepted)]

    def _last_commit(self) -> Committed | None:
        record = self.ledger.run(self.plan.run)
        if record.version is None:
            return None
        store, version = self.store, record.version
        state = ServerState(store.tensors(version), store.auxiliary(version))
        return Committed(record.round, version, state, store.memory(version))

    def _begin(self) -> Committed:
        """Commit the version that round 1 starts from."""
        start = self.plan.start
        memory = self.store.memory(start.version) if start.version else {}
        earlier = self.store.tensors(start.version) if start.version else {}
        adapter = earlier
        if start.mode != "continue":
            kept = split_head(earlier)[1] if start.mode == "stack" else {}  # rows of earlier tasks
            adapter = {**self._initial(memory), **kept}
            for choice in self.plan.regularizers:
                method = REGULARIZERS.get(choice.name).build(**choice.options)
                adapter = dict(method.initialise(adapter, recall(memory, choice.name)))
        state = self.strategy.init(adapter)
        version = self.store.commit(
            state.adapter,
            auxiliary=state.auxiliary,
            memory=memory,
            parents={start.version: _EDGES[start.mode]} if start.version else {},
            recipe=start_recipe(self.plan),
        )
        self._log("started", {"version": version})
        return Committed(0, version, state, memory)

    def _initial(self, memory: Tensors) -> dict[str, Tensor]:
        """Return the adapter's first tensors, made where the base model is."""
        self._log("initialising", {"adapter": self.plan.adapter.name})
        [result] = self._results([plan_init(self.plan, self._inputs(0, "", memory))])
        if isinstance(result, Failure):
            raise RoundFailed(f"the adapter cannot be initialised: {result.reason}")
        assert isinstance(result, Update)
        return dict(result.tensors)

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

    def _log(self, kind: str, data: Mapping[str, Any]) -> None:
        """Write an event to the ledger, then show it."""
        self.ledger.append(self.plan.run, kind, data)
        self.observe(kind, data)
