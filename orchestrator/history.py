"""What a run's log says: folded event by event, so that a resumed run knows what the first knew.

A decision that depends on time or on faults is an event, written before it has any effect. Here it
is read back instead of being made again. A pure function of the log: the same events, in whatever
portions they are read, give the same history.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple, TypeAlias

from clients.regularizers import When
from orchestrator.policy import TRAIN_LOSS
from storage.records import Event

Key: TypeAlias = tuple[str, int]
"""(client, round): what an assignment and its update are known by."""


class Asked(NamedTuple):
    """What was asked of a client.

    Attributes:
        client: who.
        round: the round it was asked in, which its update will name.
        base: the version to train from.
    """

    client: str
    round: int
    base: str


class Taken(NamedTuple):
    """An accepted update.

    Attributes:
        client: who sent it.
        round: the round it was asked in.
        base: the version it was trained from.
        digest: sha256 of its bytes.
        weight: what its change counts, in (0, 1]; 1 unless it is stale.
    """

    client: str
    round: int
    base: str
    digest: str
    weight: float = 1.0

    @property
    def key(self) -> Key:
        """What the update is known by."""
        return self.client, self.round


class Faults(NamedTuple):
    """How often a client failed since it last sent an update, and the round of the last time."""

    in_a_row: int
    round: int


class Times(NamedTuple):
    """In how many rounds a client was asked, and the last of them."""

    rounds: int
    last: int


@dataclass(frozen=True, slots=True)
class Score:
    """How a version did on held-back data."""

    round: int
    version: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Open:
    """A round that began and is not committed.

    Attributes:
        round: >= 1.
        base: the version it starts from.
        cohort: who is to be asked at its start.
        goal: with how many updates it closes.
        quorum: with how many it makes do at its deadline.
        assigned: who was asked in it.
        refused: who was asked in it, and failed.
        closed: what is aggregated, in order; None while the round takes updates.
        reading: which reading this is, or None for a round in which clients train.
    """

    round: int
    base: str
    cohort: tuple[str, ...]
    goal: int
    quorum: int
    assigned: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    closed: tuple[Taken, ...] | None = None
    reading: When | None = None


@dataclass(frozen=True, slots=True)
class History:
    """Where a run stands, by its log.

    Attributes:
        seq: number of the last event that is folded in.
        round: the last committed round, 0 before the first.
        version: its version; None before the start is committed.
        open: the round after it, if it began.
        pending: by client: what was asked and has neither answer nor end.
        taken: accepted and not aggregated yet.
        asked: how often each client was asked.
        held: by client: what its newest accepted update was trained from.
        faults: of the clients whose last answer was none.
        scores: oldest first.
        losses: of the updates that are taken and not aggregated yet, where clients tell them.
        told: what the clients of each round told on average, oldest first.
        judged: the last round that was evaluated, or whose evaluation failed.
        stopped: why the run stops early, or None.
        consolidated: by version: the one that has, besides, the memory of the task.
    """

    seq: int = 0
    round: int = 0
    version: str | None = None
    open: Open | None = None
    pending: Mapping[str, Asked] = field(default_factory=dict)
    taken: Mapping[Key, Taken] = field(default_factory=dict)
    asked: Mapping[str, Times] = field(default_factory=dict)
    held: Mapping[str, Asked] = field(default_factory=dict)
    faults: Mapping[str, Faults] = field(default_factory=dict)
    scores: tuple[Score, ...] = ()
    losses: Mapping[Key, float] = field(default_factory=dict)
    told: tuple[Score, ...] = ()
    judged: int = 0
    stopped: str | None = None
    consolidated: Mapping[str, str] = field(default_factory=dict)

    def scored(self, metric: str) -> tuple[Score, ...]:
        """Return the scores that have a metric, or may have: of evaluations, or of rounds."""
        return self.told if metric == TRAIN_LOSS else self.scores

    @staticmethod
    def at_commit(event: Event) -> History:
        """Return the history as a ``committed`` event alone tells it: no more than the faults."""
        faults = {client: Faults(*fault) for client, fault in event.data["faults"].items()}
        data = event.data
        return History(event.seq, round=data["round"], version=data["version"], faults=faults)

    def after(self, event: Event) -> History:
        """Return the history with one more event; one that it knows already changes nothing.

        Costs as much as the open round is large; what grows with the run is touched once a round.
        """
        if event.seq <= self.seq:
            return self
        fold = _FOLDS.get(event.kind)
        now = self if fold is None else fold(self, event.data)
        return replace(now, seq=event.seq)

    def after_all(self, events: Iterable[Event]) -> History:
        """Return the history with more events."""
        now = self
        for event in events:
            now = now.after(event)
        return now


def _started(h: History, data: Mapping[str, Any]) -> History:
    return replace(h, version=data["version"])


def _round(h: History, data: Mapping[str, Any]) -> History:
    cohort = tuple(data["cohort"])
    opened = Open(data["round"], data["base"], cohort, data["goal"], data["quorum"])
    return replace(h, open=opened)


def _reading(h: History, data: Mapping[str, Any]) -> History:
    """Nobody trains meanwhile: who still owes an update is not waited for any more."""
    opened = _round(h, data).open
    assert opened is not None
    return replace(
        h, open=replace(opened, reading=data["reading"]), pending={}, taken={}, losses={}
    )


def _assigned(h: History, data: Mapping[str, Any]) -> History:
    round_, names = data["round"], data["assigned"]
    fresh = [name for name in names if h.asked.get(name, Times(0, 0)).last != round_]
    pending = {name: Asked(name, round_, data["base"]) for name in names}
    if h.open is not None and h.open.reading:
        fresh = []  # that it is read with is no participation
    counted = {name: Times(h.asked.get(name, Times(0, 0)).rounds + 1, round_) for name in fresh}
    opened = h.open
    if opened is not None and opened.round == round_:
        opened = replace(opened, assigned=opened.assigned | set(names))
    return replace(
        h,
        open=opened,
        pending={**h.pending, **pending},
        asked={**h.asked, **counted} if counted else h.asked,
    )


def _accepted(h: History, data: Mapping[str, Any]) -> History:
    one = Taken(data["client"], data["round"], data["base"], data["digest"])
    held = h.held.get(one.client)
    trained = h.open is None or not h.open.reading
    newer = trained and (held is None or held.round <= one.round)
    asked = Asked(one.client, one.round, one.base)
    return replace(
        h,
        pending=_without(h.pending, [one.client]),
        taken={**h.taken, one.key: one},
        held={**h.held, one.client: asked} if newer else h.held,
        losses={**h.losses, one.key: data["loss"]} if "loss" in data else h.losses,
        faults=_without(h.faults, [one.client]),
    )


def _refused(h: History, data: Mapping[str, Any]) -> History:
    client, opened = data["client"], h.open
    if opened is not None and opened.round == data["round"]:
        opened = replace(opened, refused=opened.refused | {client})
    now = replace(h, open=opened, pending=_without(h.pending, [client]))
    return _faulty(now, [client]) if data["fault"] else now


def _closed(h: History, data: Mapping[str, Any]) -> History:
    assert h.open is not None
    updates = tuple(Taken(**one) for one in data["updates"])
    given_up = [*data["missed"], *data["spare"]]
    now = replace(h, open=replace(h.open, closed=updates), pending=_without(h.pending, given_up))
    return _faulty(now, data["missed"])


def _below_quorum(h: History, data: Mapping[str, Any]) -> History:
    """When the run goes on, the round is drawn anew; what it has taken it keeps."""
    now = _faulty(h, data["missed"])
    pending = {c: asked for c, asked in h.pending.items() if asked.round != data["round"]}
    return replace(now, open=None, pending=pending)


def _committed(h: History, data: Mapping[str, Any]) -> History:
    closed = (h.open and h.open.closed) or ()
    losses = [h.losses[one.key] for one in closed if one.key in h.losses]
    told = h.told
    if losses:
        told = (*told, Score(data["round"], data["version"], {TRAIN_LOSS: fmean(losses)}))
    now = replace(h, round=data["round"], version=data["version"], open=None, taken={})
    return replace(now, losses={}, told=told)


def _prepared(h: History, data: Mapping[str, Any]) -> History:
    return replace(h, version=data["version"], open=None, taken={})


def _consolidated(h: History, data: Mapping[str, Any]) -> History:
    known = {**h.consolidated, data["base"]: data["version"]}
    return replace(h, consolidated=known, open=None, taken={})


def _evaluated(h: History, data: Mapping[str, Any]) -> History:
    assert h.version is not None
    score = Score(data["round"], h.version, {k: v for k, v in data.items() if k != "round"})
    return replace(h, scores=(*h.scores, score), judged=data["round"])


def _not_evaluated(h: History, data: Mapping[str, Any]) -> History:
    return replace(h, judged=data["round"])


def _stopped(h: History, data: Mapping[str, Any]) -> History:
    return replace(h, stopped=data["reason"])


def _forgiven(h: History, data: Mapping[str, Any]) -> History:
    return replace(h, faults=_without(h.faults, [data["client"]]))


_FOLDS = {
    "started": _started,
    "round": _round,
    "reading": _reading,
    "prepared": _prepared,
    "consolidated": _consolidated,
    "assigned": _assigned,
    "accepted": _accepted,
    "refused": _refused,
    "closed": _closed,
    "below quorum": _below_quorum,
    "committed": _committed,
    "evaluated": _evaluated,
    "evaluation failed": _not_evaluated,
    "stopped": _stopped,
    "forgiven": _forgiven,
}


def _faulty(h: History, clients: Iterable[str]) -> History:
    round_ = h.round + 1
    more = {c: Faults(h.faults.get(c, Faults(0, 0)).in_a_row + 1, round_) for c in clients}
    return replace(h, faults={**h.faults, **more}) if more else h


def _without(mapping: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """Return the mapping without some names; itself where it has none of them."""
    gone = {name for name in names if name in mapping}
    return {k: v for k, v in mapping.items() if k not in gone} if gone else mapping
