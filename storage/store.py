"""The adapter store: versions are commits, names are numbered, aliases move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, insert, select

from storage import schema
from storage.aliases import (
    Aliases,
    AliasMove,
    AliasMoved,
    NoReason,
    NothingToRollBack,
    Yank,
    YankedVersion,
)
from storage.blobs import BlobStore
from storage.canonical import canonical_json
from storage.contributions import Deployment, contributed, deployed_with, record_contributions
from storage.database import insert_missing, insert_or_update, writing
from storage.lineage import (
    PARENT_KINDS,
    Content,
    Edge,
    Lineage,
    Parent,
    Towards,
    Version,
    load_content,
    load_versions,
    trace,
    version_id,
    walk,
)
from storage.listing import (
    NameRow,
    page_of_names,
    page_of_versions,
)
from storage.references import claim
from storage.refs import AmbiguousRef, BadName, UnknownVersion, check_name, newest_of, resolve
from storage.schema import named_versions
from storage.updates import Updates

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AdapterStore",
    "AliasMove",
    "AliasMoved",
    "AmbiguousRef",
    "BadMetric",
    "BadName",
    "BadParents",
    "Deployment",
    "Edge",
    "Lineage",
    "NameRow",
    "NoReason",
    "NothingToRollBack",
    "Parent",
    "UnknownContributor",
    "UnknownVersion",
    "Version",
    "Yank",
    "YankedVersion",
]


class BadParents(ValueError):
    """A parent's kind that lineage does not know."""


class UnknownContributor(LookupError):
    """No version was made with an update of this client."""


class BadMetric(ValueError):
    """A metric that is not a finite number."""


class AdapterStore(Aliases):
    """Versions, their names and their lineage.

    Every ``ref`` is a version's id, a prefix of it that no other has (at least 4 digits), a name
    (its newest version that is not yanked), ``name:vN`` or ``name@alias``. A name wins over a
    prefix.

    Args:
        engine: from :func:`storage.database.open_database`.
        blobs: where the tensors are.

    Attributes:
        updates: the client updates that are kept.
    """

    def __init__(self, engine: Engine, blobs: BlobStore) -> None:
        super().__init__(engine)
        self._blobs = blobs
        self.updates = Updates(engine, blobs)

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
        """Store a version, durably, and return its id: the hash of all arguments but ``metrics``.

        Idempotent: the same content has the same id and is stored once. Empty ``auxiliary`` or
        ``memory`` counts as none. A crash leaves at most blobs that no version names.

        Args:
            tensors: the adapter's.
            auxiliary: the rest of the strategy's state.
            memory: the regularisers' memory.
            parents: kind by full id, or (id, kind) pairs; empty for a first version.
            recipe: JSON; what besides tensors and parents determined the bytes.
            metrics: finite numbers; added to those that the version has.

        Raises:
            UnknownVersion: if a parent is not in the store.
            BadParents: if a kind is none of :data:`storage.lineage.PARENT_KINDS`.
            BadTensor: if a tensor holds a value that is not finite.
            NotJson: if the recipe is not JSON.
            BadMetric: if a metric is not finite.
        """
        lineage = _parents(parents)
        recipe_text = canonical_json(recipe, "recipe")
        measured = _metrics(metrics or {})
        with self._engine.connect() as connection:  # versions stay: what is there now stays there
            _require(connection, [parent.id for parent in lineage])

        while True:
            digests = (
                self._blobs.put(tensors),
                self._blobs.put(auxiliary) if auxiliary else None,
                self._blobs.put(memory) if memory else None,
            )
            content = version_id(*digests, lineage, recipe)
            row = {
                "id": content,
                "tensors": digests[0],
                "auxiliary": digests[1],
                "memory": digests[2],
                "recipe": recipe_text,
                "created_at": _now(),
            }
            with writing(self._engine) as connection:
                if claim(connection, self._blobs, digests):
                    continue  # removed since they were put, so they are put again
                insert_missing(connection, schema.versions, [row])
                _insert_parents(connection, content, lineage)
                record_contributions(connection, {content: recipe})
                _write_metrics(connection, content, measured)
            return content

    def identify(
        self,
        tensors: Mapping[str, Tensor],
        *,
        auxiliary: Mapping[str, Tensor] | None = None,
        memory: Mapping[str, Tensor] | None = None,
        parents: Mapping[str, str] | Sequence[Parent],
        recipe: Mapping[str, object],
    ) -> str:
        """Return the id that :meth:`commit` would, without writing.

        Raises:
            BadParents, BadTensor, NotJson: as :meth:`commit`.
        """
        blobs = (
            self._blobs.digest(tensors),
            self._blobs.digest(auxiliary) if auxiliary else None,
            self._blobs.digest(memory) if memory else None,
        )
        return version_id(*blobs, _parents(parents), recipe)

    def resolve(self, ref: str) -> str:
        """Return the id of the version that ``ref`` names.

        Raises:
            UnknownVersion: if there is none, with what was perhaps meant.
            AmbiguousRef: if several ids begin with it.
        """
        with self._engine.connect() as connection:
            return resolve(connection, ref)

    def version(self, ref: str) -> Version:
        """Return the version that ``ref`` names, its content checked against its id.

        Raises:
            UnknownVersion, AmbiguousRef: as :meth:`resolve`.
            VersionCorrupt: if its row was changed behind weft's back.
        """
        with self._engine.connect() as connection:
            found = resolve(connection, ref)
            return load_versions(connection, [found])[found]

    def tensors(self, ref: str) -> dict[str, Tensor]:
        """Return the adapter's tensors, with those of its basis that it has not itself.

        A basis is a parent of that kind: versions that share it have it stored once.

        Raises:
            UnknownVersion, AmbiguousRef, VersionCorrupt: as :meth:`version`.
            BlobMissing, BlobCorrupt: if they are not on the disk as they were committed.
        """
        content, came_from = self._content(ref)
        return self._with_bases(self._blobs.get(content.tensors), came_from)

    def _with_bases(
        self, own: Mapping[str, Tensor], came_from: Sequence[Parent]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for parent in came_from:
            if parent.kind == "basis":
                found |= self.tensors(parent.id)
        return {**found, **own}

    def auxiliary(self, ref: str) -> dict[str, Tensor]:
        """Return the rest of the strategy's state; empty if none. Raises as :meth:`tensors`."""
        digest = self._content(ref)[0].auxiliary
        return self._blobs.get(digest) if digest else {}

    def memory(self, ref: str) -> dict[str, Tensor]:
        """Return the regularisers' memory; empty if none. Raises as :meth:`tensors`."""
        digest = self._content(ref)[0].memory
        return self._blobs.get(digest) if digest else {}

    def _content(self, ref: str) -> tuple[Content, list[Parent]]:
        with self._engine.connect() as connection:
            return load_content(connection, resolve(connection, ref))

    def name(self, name: str, ref: str) -> str:
        """Make a version the newest of ``name`` and return its new name, ``name:vN``.

        Numbers start at 1 and have no gaps, however many write at once. Idempotent: what is the
        newest of ``name`` already keeps its number.

        Raises:
            BadName: if the name could be taken for an id, a number or an alias.
            UnknownVersion, AmbiguousRef: as :meth:`resolve`.
        """
        check_name("name", name)
        with writing(self._engine) as connection:
            version = resolve(connection, ref)
            insert_missing(connection, schema.names, [{"name": name, "created_at": _now()}])
            connection.execute(
                select(schema.names).where(schema.names.c.name == name).with_for_update()
            )
            newest = newest_of(connection, name)
            if newest is not None and newest[1] == version:
                return f"{name}:v{newest[0]}"
            number = newest[0] + 1 if newest else 1
            connection.execute(
                insert(named_versions).values(
                    name=name, number=number, version=version, created_at=_now()
                )
            )
        return f"{name}:v{number}"

    def names(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> list[NameRow]:
        """Return names in the order of their bytes.

        Args:
            prefix: with which they begin.
            after: the name that the last page ended with; "" for the first page.
            limit: most names, >= 1.
        """
        with self._engine.connect() as connection:
            return page_of_names(connection, prefix, after, limit)

    def versions(
        self,
        *,
        name: str | None = None,
        client: str | None = None,
        before: str | None = None,
        limit: int = 100,
    ) -> list[Version]:
        """Return versions, newest first; those of ``name`` by the highest number they have there.

        A name that does not exist has no versions.

        Args:
            name: only its versions.
            client: only versions that a round with an update of this client made.
            before: the version that the last page ended with; None for the first page.
            limit: most versions, >= 1.

        Raises:
            UnknownVersion, AmbiguousRef: as :meth:`resolve`, of ``before``.
        """
        with self._engine.connect() as connection:
            last = resolve(connection, before) if before else None
            ids = page_of_versions(connection, name, client, last, limit)
            loaded = load_versions(connection, ids)
        return [loaded[version] for version in ids]

    def lineage(self, ref: str, *, depth: int | None = None) -> Lineage:
        """Return what a version came from, itself included.

        Args:
            ref: the version.
            depth: most steps to go back, >= 0; None for all of them.

        Raises:
            UnknownVersion, AmbiguousRef, VersionCorrupt: as :meth:`version`.
        """
        with self._engine.connect() as connection:
            return trace(connection, resolve(connection, ref), "parents", depth)

    def descendants(self, ref: str, *, depth: int | None = None) -> Lineage:
        """Return what came from a version, itself included. Arguments as :meth:`lineage`."""
        with self._engine.connect() as connection:
            return trace(connection, resolve(connection, ref), "children", depth)

    def edges(
        self, ref: str, towards: Towards = "parents", *, depth: int | None = None
    ) -> list[Edge]:
        """Return the edges of :meth:`lineage` or :meth:`descendants` without reading a version.

        Raises:
            UnknownVersion, AmbiguousRef: as :meth:`resolve`.
        """
        with self._engine.connect() as connection:
            return walk(connection, resolve(connection, ref), towards, depth)

    def deployed_with(self, client: str) -> list[Deployment]:
        """Return the deployed versions that an update of ``client`` went into, sorted by alias.

        Raises:
            UnknownContributor: if no version at all was made with one.
        """
        with self._engine.connect() as connection:
            if not contributed(connection, client):
                raise UnknownContributor(
                    f"no version was made with an update of {client!r}; weft clients list and "
                    "weft lineage show who took part"
                )
            return deployed_with(connection, client)

    def record_metrics(self, ref: str, metrics: Mapping[str, float]) -> None:
        """Add measured values to a version; a key that it has gets the new value.

        Raises:
            BadMetric: if a value is not finite.
            UnknownVersion, AmbiguousRef: as :meth:`resolve`.
        """
        measured = _metrics(metrics)
        with writing(self._engine) as connection:
            _write_metrics(connection, resolve(connection, ref), measured)


def _now() -> datetime:
    return datetime.now(UTC)


def _parents(given: Mapping[str, str] | Sequence[Parent]) -> list[Parent]:
    pairs = given.items() if isinstance(given, Mapping) else given
    found = sorted({Parent(*pair) for pair in pairs})
    for parent in found:
        if parent.kind not in PARENT_KINDS:
            allowed = ", ".join(PARENT_KINDS)
            raise BadParents(f"a parent is one of {allowed}; got {parent.kind!r}")
    return found


def _metrics(given: Mapping[str, float]) -> dict[str, float]:
    for key, value in given.items():
        if not math.isfinite(value):
            raise BadMetric(f"metric {key!r} must be a finite number, got {value}; leave it out")
    return {key: float(value) for key, value in given.items()}


def _insert_parents(connection: Connection, child: str, lineage: Sequence[Parent]) -> None:
    if not lineage:
        return
    ids = {child, *(parent.id for parent in lineage)}
    query = select(schema.versions.c.id, schema.versions.c.number)
    found = connection.execute(query.where(schema.versions.c.id.in_(ids)))
    numbers = {row.id: row.number for row in found}
    rows = [
        {"child": numbers[child], "parent": numbers[parent.id], "kind": parent.kind}
        for parent in lineage
    ]
    insert_missing(connection, schema.parents, rows)


def _write_metrics(connection: Connection, version: str, measured: Mapping[str, float]) -> None:
    rows = [{"version": version, "key": key, "value": value} for key, value in measured.items()]
    insert_or_update(connection, schema.metrics, rows)


def _require(connection: Connection, ids: Sequence[str]) -> None:
    if not ids:
        return
    found = set(
        connection.scalars(select(schema.versions.c.id).where(schema.versions.c.id.in_(ids)))
    )
    for version in ids:
        if version not in found:
            raise UnknownVersion(
                f"no version has the id {version!r}, and a parent must be in the store; "
                "commit it first, or give its full id"
            )
