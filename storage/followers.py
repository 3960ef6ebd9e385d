"""Servers that follow aliases: who serves which version, and who was heard of lately.

The contract of a server, whatever it serves with:

1. When it starts, :meth:`Followers.register` under an id of its own, once for all aliases that it
   follows, with how long a word from it counts (``lease_s``).
2. At least three times in every ``lease_s``, :meth:`Followers.heartbeat`. If that raises
   :class:`UnknownFollower`, register again: people may have forgotten it.
3. Once *no request can be answered by another version any more* (the new one is loaded, switched
   to, and the old one drained), :meth:`Followers.confirm` that version; with ``problem`` where it
   cannot serve the version that the alias points at, and which one it goes on with. While several
   answer, confirm None. Say it again with every few heartbeats: when an alias is moved back to a
   version, what was said of that version before counts no more.
4. When it ends by itself, :meth:`Followers.forget`.

What it serves is its own decision: ``AdapterStore.pointing(name, alias)`` says where the alias
points, and the signing policy is asked before anything is loaded. If the store is down all of these
raise :class:`storage.database.DatabaseUnavailable`; go on serving, and try again.

A promotion or rollback waits for the followers that are live. One that fell silent may be dead, or
may be serving the old version beyond our reach: it has not confirmed until it says so, or somebody
forgets it. After :data:`FORGOTTEN_AFTER` it is forgotten by itself. All times are the database's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine, delete, select, tuple_, update

from storage.database import insert_or_update, writing
from storage.refs import check_name, quoted
from storage.runs import clock
from storage.schema import followers

FORGOTTEN_AFTER = timedelta(days=1)
"""A server that was silent for so long is gone."""

_MAX_TEXT = 300


class UnknownFollower(LookupError):
    """No server is registered under this id."""


class BadFollower(ValueError):
    """What a server says of itself cannot be."""


@dataclass(frozen=True, slots=True)
class Follower:
    """A server, and one alias that it follows.

    Attributes:
        server: its id, unique to the process.
        name: whose alias.
        alias: which.
        url: where it answers.
        version: id of the version that alone it answers with since it said so; None before that,
            while it changes, and since the alias was moved back to that version.
        problem: why it does not serve what the alias points at, as it last said, or None.
        lease_s: seconds for which a word from it counts.
        registered_at: when it registered, UTC.
        seen_at: when it was last heard of, UTC.
        is_live: whether that is at most ``lease_s`` ago.
    """

    server: str
    name: str
    alias: str
    url: str
    version: str | None
    problem: str | None
    lease_s: float
    registered_at: datetime
    seen_at: datetime
    is_live: bool


class Followers:
    """Which servers follow which alias.

    Args:
        engine: from :func:`storage.database.open_database`; shared with the adapter store.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def register(
        self, server: str, url: str, pointers: Sequence[tuple[str, str]], lease_s: float = 15.0
    ) -> None:
        """Record that a server follows these aliases, and no others; it serves nothing yet.

        A silent server that was at the same url is forgotten: this one took its place.

        Args:
            server: its id, unique to the process, such as ``orchestrator.lease.driver_name()``.
            url: where it answers, without a secret.
            pointers: (name, alias) pairs; the alias need not be there yet.
            lease_s: seconds for which a word from it counts, > 0.

        Raises:
            BadFollower: if the id or url is empty or long, the lease not above 0, or there is no
                pointer.
            BadName: if a name or alias cannot be one.
        """
        _check(server, url, pointers, lease_s)
        with writing(self._engine) as connection:
            moment = clock(connection)
            _bury(connection, moment, server, url)
            insert_or_update(
                connection,
                followers,
                [
                    {
                        "server": server,
                        "name": name,
                        "alias": alias,
                        "url": url,
                        "version": None,
                        "problem": None,
                        "lease_s": lease_s,
                        "registered_at": moment,
                        "seen_at": moment,
                    }
                    for name, alias in sorted(set(pointers))
                ],
            )

    def heartbeat(self, server: str) -> None:
        """Record that a server was heard of now.

        Raises:
            UnknownFollower: if it is not registered (any more).
        """
        with writing(self._engine) as connection:
            own = followers.c.server == server
            seen = update(followers).where(own).values(seen_at=clock(connection))
            if not connection.execute(seen).rowcount:
                raise _unknown(server)

    def confirm(
        self, server: str, name: str, alias: str, version: str | None, problem: str | None = None
    ) -> None:
        """Record that a server answers for ``name@alias`` with this version and no other.

        It counts as a heartbeat.

        Args:
            server: its id.
            name: whose alias.
            alias: which.
            version: full id; None if it answers with none.
            problem: why it cannot serve what the alias points at; None if it does.

        Raises:
            UnknownFollower: if it is not registered (any more), or follows another alias.
        """
        own = (
            followers.c.server == server,
            followers.c.name == name,
            followers.c.alias == alias,
        )
        with writing(self._engine) as connection:
            said = {"version": version, "problem": problem, "seen_at": clock(connection)}
            if not connection.execute(update(followers).where(*own).values(said)).rowcount:
                raise _unknown(server, f"{name}@{alias}")

    def forget(self, server: str) -> bool:
        """Remove a server and all that it follows; return whether it was registered."""
        with writing(self._engine) as connection:
            gone = connection.execute(delete(followers).where(followers.c.server == server))
            return gone.rowcount > 0

    def following(self, name: str | None = None, alias: str | None = None) -> list[Follower]:
        """Return who follows, by name, alias and url; of one name or one alias if they are given.

        Those that are silent since :data:`FORGOTTEN_AFTER` are left out.
        """
        with self._engine.connect() as connection:
            moment = clock(connection)
            query = select(followers).where(followers.c.seen_at > moment - FORGOTTEN_AFTER)
            if name is not None:
                query = query.where(followers.c.name == name)
            if alias is not None:
                query = query.where(followers.c.alias == alias)
            rows = connection.execute(query).all()
        found = [Follower(**row._asdict(), is_live=_is_live(row, moment)) for row in rows]
        return sorted(found, key=lambda one: (one.name, one.alias, one.url, one.server))


def _check(server: str, url: str, pointers: Sequence[tuple[str, str]], lease_s: float) -> None:
    for what, text in (("id", server), ("url", url)):
        if not text.strip() or len(text) > _MAX_TEXT:
            raise BadFollower(
                f"the {what} of a server has 1 to {_MAX_TEXT} characters, got {quoted(text)}"
            )
    if not 0 < lease_s < float("inf"):
        raise BadFollower(f"a word from a server counts for some seconds, got {lease_s}")
    if not pointers:
        raise BadFollower(f"server {quoted(server)} follows at least one NAME@ALIAS, got none")
    for name, alias in pointers:
        check_name("name", name)
        check_name("alias", alias)


def _bury(connection: Connection, moment: datetime, server: str, url: str) -> None:
    """Forget what this server said before, who was silent too long, and whose place it takes."""
    rows = connection.execute(select(followers)).all()
    gone = [
        (row.server, row.name, row.alias)
        for row in rows
        if row.server == server
        or row.seen_at <= moment - FORGOTTEN_AFTER
        or (row.url == url and not _is_live(row, moment))
    ]
    keys = tuple_(followers.c.server, followers.c.name, followers.c.alias)
    if gone:
        connection.execute(delete(followers).where(keys.in_(gone)))


def _is_live(row: object, moment: datetime) -> bool:
    seen: datetime = row.seen_at  # type: ignore[attr-defined]  # a row
    lease: float = row.lease_s  # type: ignore[attr-defined]  # a row
    return moment - seen <= timedelta(seconds=lease)


def _unknown(server: str, pointer: str = "") -> UnknownFollower:
    follows = f" that follows {pointer}" if pointer else ""
    return UnknownFollower(
        f"no server{follows} is registered as {quoted(server)}; it was forgotten, or never "
        "registered: register it again"
    )
