"""A version as what a server needs of it: what it does to each layer, and its head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clients.assignment import ModelSpec
from clients.base_columns import spelled_out
from clients.serving.changes import Change, Unservable, changes_of
from clients.serving.classifying import Head
from clients.task_model import pooling
from orchestrator.bases import base_of
from orchestrator.merging import effective, split_head
from orchestrator.signing import admitted
from orchestrator.versions import refuse_unusable
from orchestrator.workspace import Workspace


class OtherBase(ValueError):
    """A version belongs to another base model than the one that is served."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A version that was read, and is not on the model yet.

    Attributes:
        version: its id.
        spec: base model and task.
        changes: what it does, by layer.
        head: of a classifier, else None.
    """

    version: str
    spec: ModelSpec
    changes: Mapping[str, Change] = field(repr=False)
    head: Head | None = field(default=None, repr=False)


def spec_of(workspace: Workspace, ref: str, base: str | None) -> ModelSpec:
    """Return the base model and task of the version that ``ref`` names, if it may be loaded.

    Args:
        workspace: where it is.
        ref: the version.
        base: where the base model is; None if weft knows.

    Raises:
        UnknownVersion: if there is no such version.
        Unsigned: if the signature policy does not let it be loaded.
        clients.models.ModelNotFound: if nobody says where its base model is.
        NotAModel, EvaluationFailed: if it computes nothing by itself.
    """
    version = admitted(workspace, ref)
    refuse_unusable(version)
    return base_of(workspace, version, base)


def load(workspace: Workspace, ref: str, spec: ModelSpec, backbone: Any) -> Loaded:
    """Read the version that ``ref`` names.

    Args:
        workspace: where it is.
        ref: mostly an alias, whose last move the signature policy asks about too.
        spec: the base model that is served.
        backbone: that model.

    Raises:
        UnknownVersion: if there is no such version.
        Unsigned: if the signature policy does not let it be loaded.
        NotAModel, EvaluationFailed: if it computes nothing by itself.
        OtherBase: if it belongs to another base model or kind of task.
        Unservable: if it cannot be in one batch with others.
        ConnectionError: if the store is out of reach.
    """
    version = admitted(workspace, ref)
    refuse_unusable(version)
    own = base_of(workspace, version, spec.id)
    _check_base(version.id, own, spec)
    adapter, head = split_head(effective(workspace.store, version))
    changes = changes_of(backbone, spelled_out(adapter, own))
    if own.kind == "causal-lm":
        return Loaded(version.id, own, changes)
    if set(head) != {"head.weight", "head.bias"}:
        raise Unservable(f"version {version.id[:12]} has no head to label with")
    how = "none" if own.kind == "token-classification" else pooling(own, backbone.config)
    seen = set(version.recipe["seen_labels"]) or set(own.labels)
    allowed = tuple(label in seen for label in own.labels)
    return Loaded(
        version.id, own, changes, Head(head["head.weight"], head["head.bias"], allowed, how)
    )


def _check_base(version: str, own: ModelSpec, spec: ModelSpec) -> None:
    if own.hash != spec.hash:
        raise OtherBase(
            f"version {version[:12]} belongs to the base model {own.hash[:12]}, and "
            f"{spec.hash[:12]} is served; serve it by a server of its own"
        )
    if (own.kind == "causal-lm") != (spec.kind == "causal-lm"):
        raise OtherBase(
            f"version {version[:12]} is for {own.kind}, and the base model is served for "
            f"{spec.kind}; serve it by a server of its own"
        )
