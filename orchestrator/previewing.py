"""What a merge would be, before anything is committed: conflicts, energy, and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from clients.assignment import PluginChoice
from orchestrator.backends.base import Backend
from orchestrator.gate_file import GateFile, parse_gate
from orchestrator.gate_suite import Scored, scored, scored_draft
from orchestrator.merge_draft import Draft
from orchestrator.merge_file import MergeFile
from orchestrator.staged_merging import merge_in_stages
from orchestrator.workspace import Workspace
from storage.gates import Gates
from storage.unwritten import UnwrittenStore
from strategies.disagreement import LayerConflict, conflicts
from strategies.energy import captured_energy

_OF_A_LAYER = "captured_energy/"


@dataclass(frozen=True, slots=True)
class Preview:
    """A merge that was not committed.

    Attributes:
        parents: ids of the versions, in the order given.
        weights: one for each.
        method: the merge and its options.
        conflicts: of each layer.
        energy: how much of the weighted sum the merge keeps, of all layers together.
        layer_energy: of each layer.
        scores: of each parent on the suite of the name, and of the merge, last; empty where the
            name has none.
        metrics: what the merge measured of itself, such as what a search for weights began with.
    """

    parents: tuple[str, ...]
    weights: tuple[float, ...]
    method: PluginChoice
    conflicts: tuple[LayerConflict, ...]
    energy: float
    layer_energy: Mapping[str, float]
    scores: tuple[Scored, ...]
    metrics: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the preview as JSON."""
        return {
            "parents": list(self.parents),
            "weights": list(self.weights),
            "method": {"name": self.method.name, "options": dict(self.method.options)},
            "layers": [
                {**asdict(one), "captured_energy": self.layer_energy.get(one.layer)}
                for one in self.conflicts
            ],
            "captured_energy": self.energy,
            "scores": [one.to_json() for one in self.scores],
            "metrics": dict(self.metrics),
        }


def preview(
    workspace: Workspace,
    made: Draft,
    into: str,
    backend: Backend | None = None,
) -> Preview:
    """Return what a merge would be; nothing is committed, but the parents' scores are kept.

    Args:
        workspace: where.
        made: the merge.
        into: the name that it would get, whose evaluation suite is asked.
        backend: where to evaluate; by default in this process.

    Raises:
        PrivateData: if the suite has data of a client.
        DataNotFound: if a data set of it is not there.
    """
    measured = captured_energy(made.vectors, made.weights, made.merged)
    gate = suite_of(workspace, into)
    parents = [version.id for version in made.parts]
    scores: Sequence[Scored] = ()
    if gate is not None and gate.suite:
        of_parents = scored(workspace, gate, parents, backend)
        merged = scored_draft(workspace, gate, made, backend)
        scores = [*(of_parents[one] for one in parents), merged]
    choice = made.recipe["merge"]
    return Preview(
        parents=tuple(parents),
        weights=made.weights,
        method=PluginChoice(choice["name"], choice["options"]),
        conflicts=tuple(conflicts(made.vectors, made.weights)),
        energy=measured["captured_energy"],
        layer_energy={
            key.removeprefix(_OF_A_LAYER): value
            for key, value in measured.items()
            if key.startswith(_OF_A_LAYER)
        },
        scores=tuple(scores),
        metrics=made.metrics,
    )


def preview_in_stages(
    workspace: Workspace, file: MergeFile, backend: Backend | None = None
) -> dict[str, Preview]:
    """Return what each stage of a merge's file would be, by name, in order; as :func:`preview`.

    A stage that merges another has it as it would be. Weights are looked for as they would be.

    Args:
        workspace: where.
        file: the stages, and the name whose evaluation suite is asked of each.
        backend: where to evaluate; by default in this process.

    Raises:
        BadConfig, StageFailed: as :func:`orchestrator.staged_merging.merge_in_stages`.
        PrivateData, DataNotFound: as :func:`preview`.
    """
    unwritten = replace(workspace, store=UnwrittenStore(workspace.engine, workspace.blobs))
    made = merge_in_stages(unwritten, file)
    return {one.stage: preview(unwritten, one.made, file.into, backend) for one in made}


def suite_of(workspace: Workspace, name: str) -> GateFile | None:
    """Return the gate of a name, whose suite is its own; None where it has none."""
    row = Gates(workspace.engine).find(name)
    return None if row is None else parse_gate(row.document or {}, f"the gate of {name}")
