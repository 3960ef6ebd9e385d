"""Aliases that move, and versions that are yanked: who did it, when and why stays for ever."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, Engine, func, insert, select, update

from storage import schema
from storage.canonical import RecordCorrupt, canonical_json, read_json
from storage.database import writing
from storage.lineage import yanked_now
from storage.refs import UnknownVersion, check_name, pointed_at, quoted, resolve
from storage.schema import followers, named_versions, promotions, yanks

ANYWHERE = "*"
"""As what an alias is expected to point at: whatever it does."""

Kind = Literal["promote", "rollback"]


class AliasMoved(RuntimeError):
    """An alias does not point where its mover believed: somebody else was faster."""


class YankedVersion(ValueError):
    """A version was taken out of use, and no alias may be pointed at it."""


class NothingToRollBack(LookupError):
    """An alias never pointed at another version that may still be used."""


class NoReason(ValueError):
    """A version is yanked for a reason, and none was given."""


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One move of an alias.

    Attributes:
        number: of the move, from 1.
        kind: ``promote`` or ``rollback``.
        before: id of the version that it pointed at until then, or None for the first move.
        version: id of the version that it points at from then on.
        who: the mover.
        why: as the mover says; may be empty.
        created_at: when, UTC.
        evidence: what a gate found of the version, and who overrode it, JSON; None without a gate.
            Only ``damaged``, a sentence, where it cannot be read any more.
    """

    number: int
    kind: Kind
    before: str | None
    version: str
    who: str
    why: str
    created_at: datetime
    evidence: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Yank:
    """One time that a version was yanked, or taken back into use (``yanked`` False)."""

    version: str
    yanked: bool
    who: str
    why: str
    created_at: datetime


class Aliases:
    """The aliases and the yanked versions; part of :class:`storage.store.AdapterStore`.

    Args:
        engine: from :func:`storage.database.open_database`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def promote(  # noqa: PLR0913  (what is moved, and each fact about it)
        self,
        name: str,
        alias: str,
        ref: str,
        *,
        who: str,
        why: str,
        expected: str | None = ANYWHERE,
        evidence: Mapping[str, Any] | None = None,
    ) -> AliasMove:
        """Point ``name@alias`` at one of the name's versions, and return the move.

        Compare-and-set: of several who expect the same, one moves the alias.

        Args:
            name: a name.
            alias: any; a new one is made.
            ref: one of the name's versions.
            who: the mover.
            why: may be empty.
            expected: id of the version that it points at now, None for none, or :data:`ANYWHERE`.
            evidence: what a gate found, JSON; kept with the move.

        Raises:
            NotJson: if the evidence is not JSON.
            BadName: if the alias breaks the grammar of names.
            UnknownVersion: if ``ref`` is no version, or none of ``name``.
            AmbiguousRef: as :meth:`storage.store.AdapterStore.resolve`.
            YankedVersion: if the version is yanked.
            AliasMoved: if the alias points elsewhere than expected.
        """
        check_name("alias", alias)
        with writing(self._engine) as connection:
            version = resolve(connection, ref)
            _hold(connection, name)
            _check_usable(connection, name, version)
            log = _log(connection, name, alias, newest=1)
            _check_expected(f"{name}@{alias}", log, expected)
            return _append(
                connection, name, alias, _Next("promote", version, who, why, evidence), log
            )

    def rollback(
        self,
        name: str,
        alias: str,
        *,
        who: str,
        why: str,
        to: str | None = None,
        expected: str | None = ANYWHERE,
    ) -> AliasMove:
        """Point ``name@alias`` at the version before, and return the move.

        Versions that were rolled back from are passed over until they are promoted again, and so
        are yanked ones: rolling back twice goes back twice.

        Args:
            name: a name.
            alias: one of its aliases.
            who: the mover.
            why: may be empty.
            to: the version to go back to, by default the one before.
            expected: as :meth:`promote`.

        Raises:
            UnknownVersion: if there is no such alias, or ``to`` is none of the name's versions.
            NothingToRollBack: if nothing is left to go back to, or ``to`` is where it points.
            YankedVersion: if ``to`` is yanked.
            AliasMoved: as :meth:`promote`.
        """
        pointer = f"{name}@{alias}"
        with writing(self._engine) as connection:
            resolve(connection, pointer)
            _hold(connection, name)
            log = _log(connection, name, alias)
            _check_expected(pointer, log, expected)
            if to is None:
                version = _before(connection, pointer, log)
            else:
                version = resolve(connection, to)
                _check_usable(connection, name, version)
                if version == log[-1].version:
                    raise NothingToRollBack(f"{pointer} points at {version[:12]} already")
            return _append(connection, name, alias, _Next("rollback", version, who, why), log)

    def promotions(self, name: str, alias: str) -> list[AliasMove]:
        """Return the moves of ``name@alias``, newest first; empty if it never was."""
        with self._engine.connect() as connection:
            return _log(connection, name, alias)[::-1]

    def usable(self, name: str, ref: str) -> str:
        """Return the id of a version that an alias of ``name`` may be pointed at.

        Raises:
            UnknownVersion: if ``ref`` is no version, or none of ``name``.
            AmbiguousRef: as :meth:`storage.store.AdapterStore.resolve`.
            YankedVersion: if it is yanked.
        """
        with self._engine.connect() as connection:
            version = resolve(connection, ref)
            _check_usable(connection, name, version)
        return version

    def pointing(self, name: str, alias: str) -> str | None:
        """Return the id of the version that ``name@alias`` points at, or None."""
        with self._engine.connect() as connection:
            return pointed_at(connection, name, alias)

    def yank(self, ref: str, *, who: str, why: str) -> Yank:
        """Take a version out of use: bare names pass it over and no alias may be pointed at it.

        It stays in the store, in every lineage, and where aliases point at it already. Yanking it
        again adds to its history.

        Raises:
            UnknownVersion, AmbiguousRef: as :meth:`storage.store.AdapterStore.resolve`.
            NoReason: if ``why`` is blank.
        """
        if not why.strip():
            raise NoReason(f"{ref} is yanked for a reason, got none; say it with --reason")
        return self._set_yanked(ref, True, who, why)

    def unyank(self, ref: str, *, who: str, why: str) -> Yank:
        """Take a yanked version back into use. Raises as :meth:`yank`, but needs no reason."""
        return self._set_yanked(ref, False, who, why)

    def yanks(self, ref: str) -> list[Yank]:
        """Return when a version was yanked or taken back, newest first."""
        with self._engine.connect() as connection:
            query = select(
                yanks.c.version, yanks.c.yanked, yanks.c.who, yanks.c.why, yanks.c.created_at
            ).where(yanks.c.version == resolve(connection, ref))
            return [Yank(*row) for row in connection.execute(query.order_by(yanks.c.number.desc()))]

    def _set_yanked(self, ref: str, yanked: bool, who: str, why: str) -> Yank:
        with writing(self._engine) as connection:
            version = resolve(connection, ref)
            own = schema.versions.c.id == version
            connection.execute(select(schema.versions.c.id).where(own).with_for_update())
            last = select(func.max(yanks.c.number)).where(yanks.c.version == version)
            number = (connection.scalar(last) or 0) + 1
            made = Yank(version, yanked, who, why, datetime.now(UTC))
            connection.execute(
                insert(yanks).values(
                    version=version,
                    number=number,
                    yanked=yanked,
                    who=who,
                    why=why,
                    created_at=made.created_at,
                )
            )
            return made


def rollback_target(moves: Iterable[AliasMove], unusable: Collection[str]) -> str | None:
    """Return the version to roll back to, or None: the last one that nobody rolled back from.

    Pure. A rollback takes off everything above its target, as from a stack. What was taken off
    stays out, however often it lies further down, until it is promoted again.

    Args:
        moves: of one alias, oldest first.
        unusable: ids that are passed over.
    """
    stack: list[str] = []
    left: set[str] = set()
    for move in moves:
        if move.kind == "rollback":
            below = move.version in stack
            while below and stack[-1] != move.version:
                left.add(stack.pop())
            left.add(stack.pop())
        left.discard(move.version)
        stack.append(move.version)
    current = stack[-1] if stack else None
    return next((v for v in reversed(stack) if v != current and v not in left | {*unusable}), None)


@dataclass(frozen=True, slots=True)
class _Next:
    kind: Kind
    version: str
    who: str
    why: str
    evidence: Mapping[str, Any] | None = None


def _hold(connection: Connection, name: str) -> None:
    """Let nobody else move aliases of ``name``, or number its versions, until this is done."""
    own = select(schema.names).where(schema.names.c.name == name)
    connection.execute(own.with_for_update())


def _check_usable(connection: Connection, name: str, version: str) -> None:
    numbers = select(func.max(named_versions.c.number)).where(
        named_versions.c.name == name, named_versions.c.version == version
    )
    number = connection.scalar(numbers)
    if number is None:
        raise UnknownVersion(
            f"{version[:12]} is not a version of {quoted(name)}, and an alias points at one; "
            "give it that name first"
        )
    reason = yanked_now(connection, [version]).get(version)
    if reason is not None:
        raise YankedVersion(
            f"{name}:v{number} ({version[:12]}) is yanked ({reason}); point the alias at another "
            f"version, or take it back into use with: weft yank {name}:v{number} --undo"
        )


def _check_expected(pointer: str, log: Sequence[AliasMove], expected: str | None) -> None:
    found = log[-1].version if log else None
    if expected in (ANYWHERE, found):
        return
    believed = "nowhere" if expected is None else f"at {expected[:12]}"
    if not log:
        raise AliasMoved(f"{pointer} points nowhere yet, and was expected to point {believed}")
    last = log[-1]
    raise AliasMoved(
        f"{pointer} points at {last.version[:12]} since {last.who} moved it "
        f"({last.created_at:%Y-%m-%d %H:%M:%S} UTC), and was expected to point {believed}; "
        f"look at weft alias log {pointer}, and decide again"
    )


def _before(connection: Connection, pointer: str, log: Sequence[AliasMove]) -> str:
    unusable = yanked_now(connection, {move.version for move in log})
    version = rollback_target(log, unusable)
    if version is None:
        raise NothingToRollBack(
            f"{pointer} points at {log[-1].version[:12]}, and every version before it was rolled "
            "back from or is yanked; choose one with --to REF"
        )
    return version


def _log(
    connection: Connection, name: str, alias: str, newest: int | None = None
) -> list[AliasMove]:
    """Return the moves of an alias, oldest first.

    Args:
        connection: to the database.
        name: whose alias.
        alias: which.
        newest: how many of the last ones, the first of which then has no ``before``; None for all.
    """
    query = (
        select(promotions)
        .where(promotions.c.name == name, promotions.c.alias == alias)
        .order_by(promotions.c.number.desc())
        .limit(newest)
    )
    found: list[AliasMove] = []
    for row in reversed(connection.execute(query).all()):
        before = found[-1].version if found else None
        facts = (row.version, row.who, row.why, row.created_at, _evidence(row.evidence))
        found.append(AliasMove(row.number, row.kind, before, *facts))
    return found


def _evidence(text: str | None) -> dict[str, Any] | None:
    """Return what is kept of a gate; where it is damaged that, since a rollback must not fail."""
    try:
        return None if text is None else read_json(text, "a gate's evidence")
    except RecordCorrupt as error:
        return {"damaged": str(error)}


def _append(
    connection: Connection, name: str, alias: str, made: _Next, log: Sequence[AliasMove]
) -> AliasMove:
    number, before = (log[-1].number + 1, log[-1].version) if log else (1, None)
    moment = datetime.now(UTC)
    facts = (made.version, made.who, made.why, moment, made.evidence)
    move = AliasMove(number, made.kind, before, *facts)
    if before != made.version:
        # who said so before may have gone on to another version since, and must say it again
        stale = (
            followers.c.name == name,
            followers.c.alias == alias,
            followers.c.version == made.version,
        )
        connection.execute(update(followers).where(*stale).values(version=None))
    evidence = None if made.evidence is None else canonical_json(made.evidence, "evidence")
    connection.execute(
        insert(promotions).values(
            name=name,
            alias=alias,
            number=number,
            version=made.version,
            who=made.who,
            why=made.why,
            created_at=moment,
            kind=made.kind,
            evidence=evidence,
        )
    )
    return move
