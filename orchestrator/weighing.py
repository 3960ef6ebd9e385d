"""What a client counts by an operator's label, where the strategy weighs updates by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.config import BadConfig
from orchestrator.plan import Participant
from strategies.base import Update
from strategies.tensors import LABEL


def weighing_label(options: Mapping[str, Any]) -> str | None:
    """Return the label by which a strategy, or one inside it, weighs updates; None for none.

    Args:
        options: the strategy's, checked.
    """
    named = options.get("weighting")
    if isinstance(named, str) and named.startswith(LABEL):
        return named.removeprefix(LABEL)
    inner = (weighing_label(value) for value in options.values() if isinstance(value, Mapping))
    return next((label for label in inner if label is not None), None)


def weighed(who: Participant, label: str | None) -> Participant:
    """Return the participant with its declared weight, or as it is where no label counts.

    Raises:
        BadConfig: if it has no such label, or one that is no number > 0.
    """
    if label is None:
        return who
    text = who.labels.get(label)
    try:
        weight = float(text or "")
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        has = f"{label}={text}" if text is not None else "no such label"
        raise BadConfig(
            f"strategy.weighting: updates are weighed by the label {label!r}, a number > 0, and "
            f"{who.name} has {has}; register it with --label {label}=NUMBER"
        )
    return replace(who, declared=weight)


def declared(update: Update, leaf: Mapping[str, Any]) -> Update:
    """Return an update with the weight that its leaf says, if it says one."""
    return replace(update, declared=leaf["declared"]) if "declared" in leaf else update
