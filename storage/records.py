"""What the ledger holds: clients, spends, runs and events, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, get_args

Status: TypeAlias = Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
"""Where a run stands."""

Wish: TypeAlias = Literal["run", "pause", "cancel"]
"""What people want of a run that is being driven."""

Policy: TypeAlias = Literal["refuse", "shorten", "ask"]
"""What happens to a run that a budget has too little left for: it is refused; its clients take part
in as many rounds as fit; or whoever launches it must say which."""

POLICIES: tuple[Policy, ...] = get_args(Policy)
STATUSES: tuple[Status, ...] = get_args(Status)
WISHES: tuple[Wish, ...] = get_args(Wish)
FINAL: frozenset[Status] = frozenset({"completed", "failed", "cancelled"})


def now() -> datetime:
    """Return the time, UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """A data set that takes part in federated runs.

    Attributes:
        name: unique.
        data: URI of the data set, such as ``jsonl:/data/notes.jsonl``.
        population: whose data it is; budgets and spends belong to the population.
        fields: weft's column name to the file's own.
        num_examples: declared size, >= 0, or None.
        epsilon: the population's budget, > 0, or None for no budget.
        delta: in (0, 1); None exactly where ``epsilon`` is.
        labels: the operator's labels, such as ``{"gpu": "a100"}``.
        public: whether the data are public.
        created_at: when it was registered, UTC.
        node: the site's node that has the data, or None where they are not a node's.
        holdout: what is never trained on: a share such as ``0.1`` or ``0.1:patient_id``, or another
            data set's URI; None for nothing.
    """

    name: str
    data: str
    population: str
    fields: Mapping[str, str] = field(default_factory=dict)
    num_examples: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    public: bool = False
    created_at: datetime = field(default_factory=now, compare=False)
    node: str | None = None
    holdout: str | None = None


@dataclass(frozen=True, slots=True)
class SpendRow:
    """One privacy event: a mechanism applied to one population's data.

    Attributes:
        event: the caller's key; the same event is recorded once.
        population: whose data.
        client: who trained.
        run: the run's id.
        round: the round, >= 1.
        assignment: digest of the assignment.
        mechanism: such as ``gaussian``.
        unit: whose presence is hidden, such as ``example``.
        adjacency: such as ``add-remove``.
        parameters: of the mechanism, JSON.
        void: why it does not count, or None while it does.
        created_at: when it was recorded, UTC.
    """

    event: str
    population: str
    client: str
    run: str
    round: int
    assignment: str
    mechanism: str
    unit: str
    adjacency: str
    parameters: Mapping[str, Any]
    void: str | None = None
    created_at: datetime = field(default_factory=now, compare=False)


@dataclass(frozen=True, slots=True)
class Queueing:
    """How a new run waits for who drives it.

    Attributes:
        priority: a higher one is claimed first; runs of one priority in the order of asking.
        labels: what limits of concurrency go by, such as ``{"gpu": "a100"}``.
        owner: who drives it from the start; None leaves it to whoever claims it.
        lease_s: seconds until an owner that is not heard of has lost it.
        facts: what else its first event says, JSON.
    """

    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    owner: str | None = None
    lease_s: float = 60.0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run, but for its plan, which is long where clients are many: :meth:`RunLog.plan` has it.

    Attributes:
        id: unique.
        name: what people call it; several runs may share it.
        status: where it stands.
        config: the resolved config, JSON.
        version: id of the last committed version, or None.
        round: the last committed round, 0 before the first.
        rounds: how many there will be; 0 where that is not known.
        error: why it failed, or None.
        created_at: when it was asked for, UTC.
        started_at: when it first ran, or None.
        finished_at: when it completed, failed or was cancelled, or None.
        priority: a higher one is claimed first.
        labels: what limits of concurrency go by.
        owner: who drives it while it is running, or None.
        token: the fencing token: it rises when the run changes hands, and only who has the
            newest may write.
        lease_until: when its owner has lost it unless the lease is renewed, or None.
        wanted: what people want of it.
        seq: number of its last event.
    """

    id: str
    name: str
    status: Status
    config: dict[str, Any]
    version: str | None
    round: int
    rounds: int
    error: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    priority: int
    labels: dict[str, str]
    owner: str | None
    token: int
    lease_until: datetime | None
    wanted: Wish
    seq: int


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a run's log.

    Attributes:
        seq: counts from 1 without gaps.
        kind: what happened.
        data: the facts of it, JSON.
        at: when, UTC.
        changes: what it changed of where the run stands; see :mod:`storage.projection`.
    """

    seq: int
    kind: str
    data: dict[str, Any]
    at: datetime
    changes: dict[str, Any]
