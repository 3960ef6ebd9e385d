"""What an assignment costs, known before it is sent: the same event for whoever keeps a ledger.

The coordinator's ledger and a site's hold the same rows for the same assignment, so that each can
tell which of the other's it lacks, and a row that both have counts once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from clients.assignment import Assignment
from strategies.spends import PrivacySpend


@dataclass(frozen=True, slots=True)
class Charge:
    """One row of a ledger: a mechanism applied to one population's data.

    Attributes:
        event: names it; the same event counts once.
        population: whose data.
        client: who trains.
        run: the run's id.
        round: the round, >= 1.
        assignment: digest of the assignment.
        mechanism: as in :class:`strategies.spends.PrivacySpend`, and so are the others.
        unit: whose presence is hidden.
        adjacency: in which sense.
        parameters: of the mechanism.
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
    parameters: Mapping[str, float]

    @property
    def spend(self) -> PrivacySpend:
        """The part that composes."""
        return PrivacySpend(self.mechanism, self.unit, self.adjacency, self.parameters)


def charge_of(assignment: Assignment, population: str, mark: str = "") -> Charge:
    """Return what a private assignment puts on a ledger.

    Args:
        assignment: with privacy.
        population: whose data it trains on.
        mark: which site would make the update (:func:`clients.keys.site_mark`): one that has lost
            its keys would make another, with other noise, and that costs again. Empty where only
            the site itself can know.

    Raises:
        ValueError: if the assignment is not private.
    """
    spend, digest = spend_of(assignment), assignment.digest()
    parts = (assignment.run, assignment.client, str(assignment.round), digest)
    text = "\0".join((*parts, mark) if mark else parts)
    return Charge(
        event=hashlib.sha256(text.encode()).hexdigest(),
        population=population,
        client=assignment.client,
        run=assignment.run,
        round=assignment.round,
        assignment=digest,
        mechanism=spend.mechanism,
        unit=spend.unit,
        adjacency=spend.adjacency,
        parameters=dict(spend.parameters),
    )


def spend_of(assignment: Assignment) -> PrivacySpend:
    """Return what a private assignment spends, known before it is sent.

    Raises:
        ValueError: if the assignment is not private.
    """
    if assignment.central is not None:
        return assignment.central.spend
    privacy = assignment.privacy
    steps = 0 if assignment.action == "evaluate" else assignment.steps  # its report is all it tells
    if privacy is None or steps is None:
        raise ValueError("only an assignment with privacy and a number of steps has a known spend")
    return PrivacySpend(
        mechanism="gaussian",
        unit=privacy.unit,
        adjacency="add-remove",
        parameters={
            "noise_multiplier": privacy.noise_multiplier,
            "sample_rate": privacy.sample_rate,
            "steps": float(steps + (privacy.report.steps if privacy.report else 0)),
        },
    )
