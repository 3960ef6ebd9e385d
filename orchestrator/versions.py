"""What people do with a version: score it, use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from clients.assignment import Assignment, DataSpec, PluginChoice
from clients.evaluate import Evaluation
from orchestrator.backends.base import Backend, Failure, complete
from orchestrator.backends.inline import InlineBackend
from orchestrator.bases import base_of
from orchestrator.merging import (
    adapter_of,
    effective,
    refuse_kept,
    refuse_offset,
    refuse_personal,
)
from orchestrator.signing import admitted
from orchestrator.workspace import Workspace
from storage.lineage import Version
from strategies.base import Broadcast, Tensors


class EvaluationFailed(RuntimeError):
    """A version could not be scored."""


def evaluate(
    workspace: Workspace,
    ref: str,
    dataset: DataSpec,
    model: str | None = None,
    backend: Backend | None = None,
) -> Evaluation:
    """Score a version on a data set, among all labels that the version has seen.

    Args:
        workspace: where the version is.
        ref: the version.
        dataset: what to score it on; its ``labels`` choose examples.
        model: where its base model lies now, if not where it was last seen.
        backend: where to run; by default in this process.

    Raises:
        UnknownVersion, models.ModelNotFound, data.DataNotFound: if one is not there.
        EvaluationFailed: if a worker failed, with its reason.
        Unsigned: if the signature policy does not let it be loaded.
    """
    version = admitted(workspace, ref)
    return _scored(workspace, [(version, dataset)], model, backend)[0]


def evaluate_many(
    workspace: Workspace,
    wanted: Sequence[tuple[Version, DataSpec]],
    model: str | None = None,
    backend: Backend | None = None,
) -> list[Evaluation]:
    """Score several versions, on several workers where the backend has them.

    Raises:
        EvaluationFailed: if one could not be scored.
        Unsigned: if the signature policy does not let one be loaded.
    """
    for version, _ in wanted:
        admitted(workspace, version.id)
    return _scored(workspace, wanted, model, backend)


def _scored(
    workspace: Workspace,
    wanted: Sequence[tuple[Version, DataSpec]],
    model: str | None,
    backend: Backend | None,
) -> list[Evaluation]:
    assignments = [
        replace(use(workspace, version, dataset, model), client=str(number))
        for number, (version, dataset) in enumerate(wanted)
    ]
    used = backend or InlineBackend()
    found: dict[str, Evaluation] = {}
    for result in complete(used, assignments, 3600.0, lambda a: None):
        if isinstance(result, Failure):
            raise EvaluationFailed(f"the version cannot be scored: {result.reason}")
        if isinstance(result, Evaluation):
            found[result.client] = result
    return [found[a.client] for a in assignments]


def use(
    workspace: Workspace, version: Version, dataset: DataSpec, model: str | None = None
) -> Assignment:
    """Return the assignment that uses a version, stack and all, on a data set.

    Raises:
        EvaluationFailed: if its heads are personal.
        NotAModel: if it is only part of others.
        models.ModelNotFound: if nobody says where its base model is.
    """
    refuse_unusable(version)
    return using(workspace, version, effective(workspace.store, version), dataset, model)


def using(
    workspace: Workspace,
    version: Version,
    tensors: Tensors,
    dataset: DataSpec,
    model: str | None = None,
) -> Assignment:
    """Return the assignment that uses all that a version does, as one adapter, on a data set.

    Args:
        workspace: where.
        version: whose base model and labels; it need not be in the store.
        tensors: what it does, stack and all, as :func:`orchestrator.merging.effective` has it.
        dataset: what on.
        model: where its base model lies now, if not where it was last seen.

    Raises:
        models.ModelNotFound: if nobody says where its base model is.
    """
    return Assignment(
        action="evaluate",
        run="",
        client="",
        round=0,
        base=version.id,
        model=base_of(workspace, version, model),
        adapter=as_it_is(version, tensors),
        broadcast=Broadcast(tensors),
        data=dataset,
        optimizer=PluginChoice(""),
        site=str(workspace.home / "sites"),
        head="freeze",
        labels=tuple(version.recipe["seen_labels"]),
    )


def refuse_unusable(version: Version) -> None:
    """Refuse a version that computes nothing by itself.

    Raises:
        NotAModel: if it is only part of others, stays in PEFT's own format, or a part of its
            adapter stays at the clients.
        EvaluationFailed: if its heads are personal.
    """
    refuse_offset(version)
    refuse_kept(version)
    refuse_personal(version)
    if version.recipe.get("training", {}).get("head") == "personal":
        raise EvaluationFailed(
            f"{version.id[:12]} has personal heads, which stay at the clients that trained them; "
            "it cannot be used without one: train with head: train or freeze"
        )


def as_it_is(version: Version, tensors: Tensors) -> PluginChoice:
    """Return the adapter that holds exactly ``tensors``: a merge may cover more layers."""
    choice = version.recipe["adapter"]
    layers = sorted({k.removesuffix(".scaling") for k in tensors if k.endswith(".scaling")})
    if "low-rank" in adapter_of(version).capabilities:
        # plain factors, whatever method trained them; ranks and scalings come with them
        return PluginChoice("lora", {"r": 1, "target_modules": layers})
    reset: dict[str, Any] = {
        "layers": None,
        "exclude_modules": [],
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return PluginChoice(choice["name"], {**choice["options"], **reset, "target_modules": layers})
