"""Ranks of the clients' own: who trains at which, and the adapter at that rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clients.assignment import PluginChoice
from orchestrator.sections import RankRule


def rank_of(rules: Sequence[RankRule], name: str, labels: Mapping[str, str]) -> int | None:
    """Return the rank of a client by the first rule that it fits, or None for the adapter's."""
    return next((rule.r for rule in rules if rule.fits(name, labels)), None)


def adapter_at(choice: PluginChoice, rank: int | None) -> PluginChoice:
    """Return the adapter with no layer above ``rank``; as it is for None.

    A layer that ``rank_pattern`` gives a lower rank keeps that. Alpha stays: which scaling a layer
    has comes with its tensors, and is the same at every rank.
    """
    if rank is None:
        return choice
    pattern = choice.options.get("rank_pattern") or {}
    capped = {layers: min(r, rank) for layers, r in pattern.items()}
    lower = {"r": min(choice.options["r"], rank)} | ({"rank_pattern": capped} if capped else {})
    return PluginChoice(choice.name, {**choice.options, **lower})
