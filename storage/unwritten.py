"""A store whose new versions are in memory alone: what would be committed can be tried before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from storage.blobs import BlobStore
from storage.lineage import Parent, Version
from storage.store import AdapterStore

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Held:
    """A version that is not written, and its parts."""

    version: Version
    tensors: Mapping[str, Tensor]
    auxiliary: Mapping[str, Tensor]
    memory: Mapping[str, Tensor]


class UnwrittenStore(AdapterStore):
    """A store over another's: it reads what is there, and holds what is committed to it.

    What is held is found by its whole id, which is the one that :meth:`AdapterStore.commit` would
    return; it has no name and is in no lineage. Metrics of versions that are there are written.

    Args:
        engine: as for :class:`AdapterStore`.
        blobs: likewise.
    """

    def __init__(self, engine: Engine, blobs: BlobStore) -> None:
        super().__init__(engine, blobs)
        self._held: dict[str, _Held] = {}

    def commit(
        self,
        tensors: Mapping[str, Tensor],
        *,
        auxiliary: Mapping[str, Tensor] | None = None,
        memory: Mapping[str, Tensor] | None = None,
        parents: Mapping[str, str] | Sequence[Parent],
        recipe: Mapping[str, object],
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        """Hold a version, and return the id that it would have.

        Raises:
            BadParents, BadTensor, NotJson: as :meth:`AdapterStore.identify`.
        """
        id_ = self.identify(
            tensors, auxiliary=auxiliary, memory=memory, parents=parents, recipe=recipe
        )
        pairs = parents.items() if isinstance(parents, Mapping) else parents
        version = Version(
            id=id_,
            tensors="",
            auxiliary=None,
            memory=None,
            parents=tuple(sorted(Parent(*pair) for pair in pairs)),
            recipe=dict(recipe),
            metrics=dict(metrics or {}),
            created_at=datetime.now(UTC),
            names=(),
            aliases=(),
        )
        self._held[id_] = _Held(version, tensors, auxiliary or {}, memory or {})
        return id_

    def resolve(self, ref: str) -> str:
        """Return the id of a version, held or there; as :meth:`AdapterStore.resolve`."""
        return ref if ref in self._held else super().resolve(ref)

    def version(self, ref: str) -> Version:
        """Return a version, held or there; as :meth:`AdapterStore.version`."""
        return self._held[ref].version if ref in self._held else super().version(ref)

    def tensors(self, ref: str) -> dict[str, Tensor]:
        """Return a version's tensors, held or there; as :meth:`AdapterStore.tensors`."""
        if ref not in self._held:
            return super().tensors(ref)
        held = self._held[ref]
        return self._with_bases(held.tensors, held.version.parents)

    def auxiliary(self, ref: str) -> dict[str, Tensor]:
        """Return the rest of the strategy's state; as :meth:`tensors`."""
        return dict(self._held[ref].auxiliary) if ref in self._held else super().auxiliary(ref)

    def memory(self, ref: str) -> dict[str, Tensor]:
        """Return the regularisers' memory; as :meth:`tensors`."""
        return dict(self._held[ref].memory) if ref in self._held else super().memory(ref)

    def name(self, name: str, ref: str) -> str:
        """Name nothing, and return what the version is called without a name: its id."""
        return self.resolve(ref)

    def record_metrics(self, ref: str, metrics: Mapping[str, float]) -> None:
        """Add measured values to a version; those of what is there are written."""
        if ref not in self._held:
            super().record_metrics(ref, metrics)
            return
        held = self._held[ref]
        measured = {**held.version.metrics, **metrics}
        self._held[ref] = replace(held, version=replace(held.version, metrics=measured))
