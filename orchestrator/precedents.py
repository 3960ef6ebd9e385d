"""What runs of this home reached at the same task, with more privacy or less: what noise cost.

Nothing is predicted. Somebody who plans a run sees how those went that had the same base model,
labels, adapter, strategy and held-back data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.workspace import Workspace

_ALIKE = ("model", "task", "labels", "task_labels", "adapter", "strategy", "evaluate")
_MOST = 200  # of the newest completed runs are looked at


@dataclass(frozen=True, slots=True)
class Precedent:
    """A completed run of the same task.

    Attributes:
        run: its id.
        name: what people call it.
        privacy: its privacy section, or None where it had no DP.
        metrics: of its version, on the same held-back data.
    """

    run: str
    name: str
    privacy: Mapping[str, Any] | None
    metrics: Mapping[str, float]

    def __str__(self) -> str:
        """Return it as people read it."""
        reached = ", ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())
        return f"{self.name} (run {self.run}), {_guarantee(self.privacy)}: {reached}"


def precedents(workspace: Workspace, config: RunConfig, most: int = 5) -> tuple[Precedent, ...]:
    """Return the newest completed runs that were scored as a run of ``config`` would be.

    Args:
        workspace: where.
        config: of the run, with absolute paths; one without ``evaluate`` has no precedent.
        most: how many at most.
    """
    wanted = config.model_dump(mode="json", include=set(_ALIKE))
    if wanted["evaluate"] is None:
        return ()
    found: list[Precedent] = []
    for record in workspace.ledger.runs(limit=_MOST, status="completed"):
        theirs = {key: record.config.get(key) for key in _ALIKE}
        if theirs != wanted or record.version is None:
            continue
        metrics = workspace.store.version(record.version).metrics
        scored = {name: metrics[name] for name in config.metrics if name in metrics}
        if scored:
            found.append(Precedent(record.id, record.name, record.config.get("privacy"), scored))
        if len(found) == most:
            break
    return tuple(found)


def _guarantee(privacy: Mapping[str, Any] | None) -> str:
    if privacy is None:
        return "without DP"
    if privacy.get("insecure_seed") is not None:
        return "with noise that anybody can compute"
    whose = "client" if privacy.get("level") == "client" else privacy.get("unit", "example")
    asked = privacy.get("epsilon")
    bound = f"ε = {asked:g}" if asked else f"noise multiplier {privacy['noise_multiplier']:g}"
    return f"{bound} (δ = {privacy['delta']:g}, unit {whose})"
