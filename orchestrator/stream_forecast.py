"""What a whole stream would spend of people's privacy, task by task, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clients.accounting import BudgetSpent
from orchestrator.budgets import Coming, planned_spends
from orchestrator.config import BadConfig, RunConfig, parse_config
from orchestrator.coordinator import planned
from orchestrator.epsilons import Epsilon, composed, spend_from_row
from orchestrator.launch import make_plan
from orchestrator.plan import Plan
from orchestrator.stream import Stage, Stream
from orchestrator.streaming import Step, steps
from orchestrator.workspace import Workspace
from strategies.spends import PrivacySpend


@dataclass(frozen=True, slots=True)
class StreamShare:
    """What a task costs one population.

    Attributes:
        task: the ε of this task alone.
        stream: the ε of the stream's tasks so far, this one included.
        whole: the ε of these and of all that was spent on the population otherwise.
        budget: the ε that it may spend in all, at the δ of ``whole``; None for no budget.
    """

    task: Epsilon
    stream: Epsilon
    whole: Epsilon
    budget: float | None

    @property
    def left(self) -> float | None:
        """What the budget has left of ε afterwards, >= 0; None without a budget."""
        return None if self.budget is None else max(0.0, self.budget - self.whole.epsilon)

    def is_of(self, other: StreamShare) -> bool:
        """Return whether both are of one population, and hide the same."""
        return _key(self.task) == _key(other.task)


@dataclass(frozen=True, slots=True)
class TaskForecast:
    """What a task of a stream would spend, or did.

    Attributes:
        name: the task's.
        status: ``planned``, or how its run stands.
        rounds: that it would have; fewer than were asked for where a budget shortens it; 0 for a
            version that is given, whose spends are not the stream's.
        private: whether it has DP; where not, no ε bounds what it tells.
        shares: what it costs each population, by name.
    """

    name: str
    status: str
    rounds: int
    private: bool
    shares: tuple[StreamShare, ...]


@dataclass(frozen=True, slots=True)
class StreamForecast:
    """What a stream would spend.

    Attributes:
        name: the stream's.
        tasks: in order.
    """

    name: str
    tasks: tuple[TaskForecast, ...]

    @property
    def totals(self) -> tuple[StreamShare, ...]:
        """What the whole stream costs each population, by name: as of its last task with it."""
        last = {_key(share.task): share for task in self.tasks for share in task.shares}
        return tuple(last[key] for key in sorted(last))

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        return {**asdict(self), "totals": [asdict(share) for share in self.totals]}


def forecast_stream(workspace: Workspace, stream: Stream) -> StreamForecast:
    """Return what a stream would spend; a task is planned as if those before had spent theirs.

    Nothing is started or spent. Tasks that are done count what they spent, those that have begun
    what they may. What a version is that a task will start from decides no noise.

    Raises:
        BadConfig: if a task cannot be run, or none has privacy to speak of.
        BudgetSpent: if a budget has too little left, naming the task that would pass it.
        ChangedTask: if a task that was run is another in the stream by now.
    """
    ahead = _Ahead(workspace)
    found = tuple(
        ahead.task(stream, number, step) for number, step in enumerate(steps(workspace, stream))
    )
    if not any(task.private for task in found):
        raise BadConfig(
            f"stream {stream.name!r} has no privacy section: no ε bounds what it tells; give its "
            "base one, such as privacy: {epsilon: 3}"
        )
    return StreamForecast(stream.name, found)


@dataclass(slots=True)
class _Ahead:
    """What will have been spent by a task of a stream.

    Attributes:
        workspace: where.
        runs: the stream's runs so far.
        results: the versions of its tasks that are done.
        spends: of its tasks so far, by population.
    """

    workspace: Workspace
    runs: set[str] = field(default_factory=set)
    results: list[str] = field(default_factory=list)
    spends: dict[str, list[PrivacySpend]] = field(default_factory=dict)

    def task(self, stream: Stream, number: int, step: Step) -> TaskForecast:
        """Return what a task spends, and count it."""
        name, record = step.stage.name, step.record
        if step.version is not None:
            self.results.append(step.version)
        if record is None and step.version is not None:
            return TaskForecast(name, step.status, 0, False, ())
        if record is None:
            plan = self._planned(step.stage, self._config(stream, number))
        else:
            plan = planned(self.workspace.ledger, record)
        own: dict[str, list[PrivacySpend]] = {}
        if record is not None and record.status == "completed":
            for row in self.workspace.ledger.spends_of_run(record.id):
                own.setdefault(row.population, []).append(spend_from_row(row))
        else:
            spends = planned_spends(plan)
            for who in plan.participants if spends else ():
                own.setdefault(who.population, []).extend(spends[who.name])
        if record is not None:
            self.runs.add(record.id)
        for population, spent in own.items():
            self.spends.setdefault(population, []).extend(spent)
        status = "planned" if record is None else record.status
        private = plan.config.privacy is not None
        shares = tuple(self._shares(plan, own)) if private else ()
        return TaskForecast(name, status, plan.config.rounds, private, shares)

    def _config(self, stream: Stream, number: int) -> RunConfig:
        if len(self.results) == number:
            return stream.config(number, self.results)
        return parse_config(stream.stages[number].document)

    def _planned(self, stage: Stage, config: RunConfig) -> Plan:
        space, coming = self.workspace, Coming(self.spends, self.runs)
        try:
            return make_plan(config, space.store, space.ledger, space.sites, coming)
        except (BadConfig, BudgetSpent) as error:
            raise type(error)(f"task {stage.name}: {error}") from None

    def _shares(
        self, plan: Plan, own: Mapping[str, Sequence[PrivacySpend]]
    ) -> Iterator[StreamShare]:
        """Yield what a task costs each population of its data, or with a budget that counts it."""
        ledger, privacy = self.workspace.ledger, plan.config.privacy
        assert privacy is not None
        budgets, all_related = ledger.budgets(), ledger.relations.all()
        public = {who.population for who in plan.participants if who.public}
        touched = {r for one in own for r in all_related.get(one, ()) if r in budgets}
        for population in sorted(touched | own.keys()):
            related = sorted(all_related.get(population, ()))
            sharing = (population, *related)
            limit, delta = budgets.get(population, (None, privacy.delta))
            history = Coming(self.spends, self.runs).history(ledger, population, related)
            stream = [s for one in sharing for s in self.spends.get(one, ())]
            task = [s for one in sharing for s in own.get(one, ())]
            for kind in sorted(
                {_kind(spend) for spend in task}
            ):  # what hides other things is apart
                known: list[tuple[list[PrivacySpend], Epsilon]] = []
                for spends in (task, stream, history):
                    alike = [spend for spend in spends if _kind(spend) == kind]
                    same = next((value for of, value in known if of == alike), None)  # it is slow
                    value = same or composed(population, alike, delta, public=population in public)
                    known.append((alike, value))
                alone, together, everything = (value for _, value in known)
                yield StreamShare(alone, together, everything, limit)


def _kind(spend: PrivacySpend) -> tuple[str, str, str]:
    return spend.unit, spend.adjacency, spend.mechanism


def _key(one: Epsilon) -> tuple[str, str, str]:
    return one.population, one.unit, one.adjacency
