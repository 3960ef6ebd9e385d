"""How scores on a suite are called among a version's metrics: ``suite/TASK@DIGEST/METRIC``."""

from __future__ import annotations

from collections.abc import Mapping

SUITE = "suite/"


def measured(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a version's metrics without those of suites, which are many."""
    return {key: value for key, value in metrics.items() if not key.startswith(SUITE)}


def by_task(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return a version's scores on suites, by task; of a test set that changed, all there are.

    >>> by_task({"loss": 0.5, "suite/mail@0a/accuracy": 0.9})
    {'mail@0a': {'accuracy': 0.9}}
    """
    found: dict[str, dict[str, float]] = {}
    for key in sorted(metrics):
        if key.startswith(SUITE):
            task, _, metric = key.removeprefix(SUITE).rpartition("/")
            found.setdefault(task, {})[metric] = metrics[key]
    return found
