"""What was spent, as an ε that can be read alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from clients.accounting import Accountant, epsilon
from orchestrator.workspace import Workspace
from storage.ledger import SpendRow
from strategies.spends import PrivacySpend, of_a_share

DELTA = 1e-5
"""δ of an ε where no budget says which."""


@dataclass(frozen=True, slots=True)
class Epsilon:
    """An ε that can be read alone.

    Attributes:
        population: whose privacy.
        epsilon: spent.
        delta: at this δ.
        unit: whose presence is hidden.
        adjacency: in which sense.
        public: whether the data are public, so that nothing is at stake.
    """

    population: str
    epsilon: float
    delta: float
    unit: str
    adjacency: str
    public: bool = False

    def __str__(self) -> str:
        return f"ε = {self.epsilon:.2f} (δ = {self.delta:g}, unit {self.unit}, {self.adjacency})"


Composed: TypeAlias = dict[tuple[str, float, frozenset[str]], Epsilon]
"""ε by population, δ and the digests of the updates that cost it."""


def composed(
    population: str,
    spends: Sequence[PrivacySpend],
    delta: float,
    accountant: Accountant = "prv",
    public: bool = False,
) -> Epsilon:
    """Return the ε of all ``spends`` together."""
    first = spends[0]
    value = epsilon(spends, delta, accountant)
    return Epsilon(population, value, delta, first.unit, first.adjacency, public)


def against_coordinator(
    population: str, spends: Sequence[PrivacySpend], shares: Sequence[int], delta: float
) -> Epsilon:
    """Return the ε of clients' single updates, each with its own share of a sum's noise alone.

    It is what holds against whoever sees them, as the coordinator does: by ``rdp``, which is
    cheap where ε is large.

    Args:
        population: whose.
        spends: of the sums.
        shares: of each, how many make its noise whole.
        delta: at this δ.
    """
    alone = [of_a_share(spend, of) for spend, of in zip(spends, shares, strict=True)]
    return composed(population, alone, delta, "rdp")


def epsilon_by(
    recipes: Iterable[Mapping[str, Any]],
    key: Callable[[Mapping[str, Any]], tuple[str, ...]],
    known: Composed | None = None,
) -> dict[tuple[str, ...], Epsilon]:
    """Return the ε that a version has inherited, by what ``key`` makes of a leaf, sorted.

    Each event counts once, however many merge parents inherit it. Unit and adjacency are added to
    the key: what hides something else is no part of one ε.

    Args:
        recipes: of the version and all its ancestors.
        key: of a leaf; leaves of one key are of one population.
        known: what was composed before, to which this adds: composing takes its time.
    """
    events: dict[tuple[str, ...], dict[str, list[PrivacySpend]]] = {}
    facts: dict[tuple[str, ...], tuple[str, float, bool]] = {}
    for recipe in recipes:
        for leaf in recipe.get("updates", ()):
            if leaf["spends"]:
                spends = [PrivacySpend(**s) for s in leaf["spends"]]
                own = (*key(leaf), spends[0].unit, spends[0].adjacency)
                events.setdefault(own, {})[leaf["digest"]] = spends
                delta = min(recipe["privacy"]["delta"], facts[own][1] if own in facts else 1.0)
                facts[own] = (leaf["population"], delta, leaf["public"])
    composed_before = {} if known is None else known
    found = {}
    for own, (population, delta, public) in sorted(facts.items()):
        same = (population, delta, frozenset(events[own]))
        if same not in composed_before:
            spends = [spend for spends in events[own].values() for spend in spends]
            composed_before[same] = composed(population, spends, delta, public=public)
        found[own] = composed_before[same]
    return found


def spent_by_population(workspace: Workspace, population: str) -> dict[str, Any]:
    """Return what a population has spent in all, as JSON; ``text`` says it in words.

    Of a population with spends that hide different things, the first kind; ``others`` has the rest.
    """
    rows = workspace.ledger.spends(population)
    budget = workspace.ledger.budget(population)
    if not rows:
        return {"epsilon": 0.0, "text": "nothing"}
    delta = budget[1] if budget else DELTA
    limit = f" of {budget[0]:g}" if budget else ""
    kinds: dict[tuple[str, str], list[PrivacySpend]] = {}
    for row in rows:
        kinds.setdefault((row.unit, row.adjacency), []).append(spend_from_row(row))
    found = []
    for spends in kinds.values():
        spent = composed(population, spends, delta)
        found.append({**asdict(spent), "text": f"{spent}{limit}, in {len(spends)} rounds"})
    text = " and ".join(str(one["text"]) for one in found)
    others = {"others": found[1:]} if found[1:] else {}
    return {**found[0], **others, "text": text}


def spend_from_row(row: SpendRow) -> PrivacySpend:
    """Return the composable part of a ledger row."""
    return PrivacySpend(row.mechanism, row.unit, row.adjacency, row.parameters)
