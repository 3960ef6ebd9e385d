"""Refs: the ways in which people name a version."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence

from sqlalchemy import Connection, select, true

from storage.lineage import current_aliases, yank_standing, yanked_now
from storage.schema import named_versions, names, promotions, versions

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_LIKE_AN_ID = re.compile(r"[0-9a-f]{8,}")
_ID_PREFIX = re.compile(r"[0-9a-f]{4,64}")
_NUMBERED = re.compile(r"(?P<name>.+):v(?P<number>[1-9]\d{0,8})")
_QUOTED = reprlib.Repr()
_QUOTED.maxstring = 140
_CANDIDATES = 5
_HINTS = 10_000  # names that are compared with a wrong one


class UnknownVersion(LookupError):
    """No version is called this."""


class AmbiguousRef(LookupError):
    """More than one version is called this."""


class BadName(ValueError):
    """A name or alias that the grammar of refs cannot tell apart."""


def quoted(text: str) -> str:
    """Return a text in quotes for a message; of a long one, its beginning and its end."""
    return _QUOTED.repr(text)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"`` where a known name is near, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_name(what: str, name: str) -> None:
    """Check a name or alias before it is given.

    Args:
        what: ``"name"`` or ``"alias"``, for the error message.
        name: as somebody chose it.

    Raises:
        BadName: if it breaks the grammar, or could be taken for an id.
    """
    if not _NAME.fullmatch(name) or _LIKE_AN_ID.fullmatch(name):
        raise BadName(
            f"{what} {quoted(name)} must be 1 to 128 of a-z, 0-9, '.', '_' and '-', begin with a "
            "letter or digit, and not look like an id (8 or more hex digits)"
        )


def resolve(connection: Connection, ref: str) -> str:
    """Return the id of the version that ``ref`` names.

    ``name:vN`` and ``name@alias`` go by their signs; a name wins over the prefix of an id, because
    a new version must not change what a name means. A name alone passes over yanked versions.

    Raises:
        UnknownVersion: if there is none, or only yanked ones, with what was perhaps meant.
        AmbiguousRef: if several ids begin with it.
    """
    found: str | None
    if match := _NUMBERED.fullmatch(ref):
        column, table = named_versions.c.version, named_versions.c
        query = select(column).where(
            table.name == match["name"], table.number == int(match["number"])
        )
        found = connection.scalar(query)
    elif "@" in ref:
        name, _, alias = ref.partition("@")
        found = pointed_at(connection, name, alias)
    else:
        named = None if _LIKE_AN_ID.fullmatch(ref) else _by_name(connection, ref)
        found = named or _by_prefix(connection, ref)
    if found is None:
        raise UnknownVersion(_unknown(connection, ref))
    return found


def pointed_at(connection: Connection, name: str, alias: str) -> str | None:
    """Return the id of the version that ``name@alias`` points at, or None."""
    moves = select(promotions.c.version).where(
        promotions.c.name == name, promotions.c.alias == alias
    )
    return connection.scalar(moves.order_by(promotions.c.number.desc()).limit(1))


def newest_of(connection: Connection, name: str) -> tuple[int, str] | None:
    """Return number and id of the newest version of ``name``, yanked or not, or None."""
    query = (
        select(named_versions.c.number, named_versions.c.version)
        .where(named_versions.c.name == name)
        .order_by(named_versions.c.number.desc())
        .limit(1)
    )
    row = connection.execute(query).first()
    return (row.number, row.version) if row else None


def _by_name(connection: Connection, name: str) -> str | None:
    usable = (
        select(named_versions.c.version)
        .where(named_versions.c.name == name)
        .where(yank_standing(named_versions.c.version).is_not(true()))
        .order_by(named_versions.c.number.desc())
        .limit(1)
    )
    return connection.scalar(usable)


def _by_prefix(connection: Connection, prefix: str) -> str | None:
    if not _ID_PREFIX.fullmatch(prefix):
        return None
    # A range, which an index serves; LIKE would not under most of PostgreSQL's locales.
    query = select(versions.c.id).where(versions.c.id.between(prefix, prefix + "g"))
    found = connection.scalars(query.order_by(versions.c.number).limit(_CANDIDATES + 1)).all()
    if len(found) > 1:
        called = _names_of(connection, found)
        listed = ", ".join(
            version[:16] + called.get(version, "") for version in found[:_CANDIDATES]
        )
        more = " and more" if len(found) > _CANDIDATES else ""
        raise AmbiguousRef(f"{prefix!r} begins {listed}{more}; give more digits")
    return found[0] if found else None


def _names_of(connection: Connection, ids: Sequence[str]) -> dict[str, str]:
    """Return such as ``" (bot:v3)"`` by id, of those that have a name."""
    query = (
        select(named_versions.c.version, named_versions.c.name, named_versions.c.number)
        .where(named_versions.c.version.in_(ids))
        .order_by(named_versions.c.created_at)
    )
    return {version: f" ({name}:v{number})" for version, name, number in connection.execute(query)}


def _unknown(connection: Connection, ref: str) -> str:
    name = re.split("[:@]", ref, maxsplit=1)[0]
    newest = newest_of(connection, name)
    if newest and ref == name:
        reason = yanked_now(connection, [newest[1]])[newest[1]]
        return (
            f"every version of {name!r} is yanked ({name}:v{newest[0]}: {reason}); "
            f"name one with its number, or take it back into use with weft yank REF --undo"
        )
    current = current_aliases().limit(_HINTS)
    if newest:
        own = sorted(
            f"{n}@{a}" for n, a, _ in connection.execute(current.where(promotions.c.name == name))
        )
        has = " and ".join([f"v1 to v{newest[0]}" if newest[0] > 1 else "v1", *own])
        return f"no version is called {quoted(ref)}; {name!r} has {has}"
    aliased = [f"{n}@{a}" for n, a, _ in connection.execute(current)]
    known = connection.scalars(select(names.c.name).limit(_HINTS)).all()
    return (
        f"no version is called {quoted(ref)}{did_you_mean(ref, [*known, *aliased])} "
        "(a ref is an id, 4 or more of its first digits, NAME, NAME:vN or NAME@ALIAS)"
    )
