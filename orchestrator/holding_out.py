"""What clients hold out of their data, as planning knows it: without the key by which they do."""

from __future__ import annotations

from dataclasses import replace

from clients.assignment import DataSpec
from clients.holdout import Holdout
from orchestrator.config import BadConfig
from orchestrator.plan import Participant
from storage.ledger import ClientRecord


def holding_out(who: Participant, declared: str | None) -> Participant:
    """Return a participant that trains on what it does not hold out.

    Args:
        who: with the size of all its data; its size is then about that of what is left.
        declared: what it holds out, as :meth:`clients.holdout.Holdout.of` reads it; None for
            nothing.
    """
    if declared is None:
        return who
    chosen = Holdout.of(declared)
    data, held = chosen.parts(who.data)
    return replace(who, data=data, holdout=held, num_examples=left(who.num_examples, chosen.share))


def registered(record: ClientRecord) -> Participant:
    """Return a registered client as one that takes part: it trains on what it does not hold out."""
    who = Participant(
        name=record.name,
        data=DataSpec(record.data, dict(record.fields)),
        population=record.population,
        num_examples=record.num_examples or 0,
        labels=dict(record.labels),
        public=record.public,
    )
    found = holding_out(who, record.holdout)
    # a node's own file says how many it trains on
    return found if record.node is None else replace(found, num_examples=who.num_examples)


def left(size: int, share: float) -> int:
    """Return about how many of so many records, or units, are left when a share is held out.

    As declared sizes are: the exact number is the site's. 0, which declares none, stays 0.
    """
    return max(1, round(size * (1 - share))) if size and share else size


def held(size: int, share: float) -> int:
    """Return about how many of so many are held out, where that is a share of them."""
    return max(1, round(size * share)) if size else 0


def refuse_split_units(who: Participant, column: str) -> None:
    """Refuse units of which some records are trained on and others scored.

    Raises:
        BadConfig: if the client's holdout is not split by the column that says whose each is.
    """
    if who.data.holdout and who.data.holdout_by != column:
        by = who.data.holdout_by or "record"
        raise BadConfig(
            f"{who.name}: its holdout is split by {by}, and privacy.unit: {column} would have "
            f"records of one {column} on both sides; hold out by it: "
            f"{who.data.holdout:g}:{column}"
        )
