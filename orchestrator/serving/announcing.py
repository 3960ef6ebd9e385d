"""Tells the store which versions a server answers with, so that a rollback can wait for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from storage.database import DatabaseUnavailable
from storage.followers import Followers, UnknownFollower

LEASE_S = 15.0
"""Seconds for which a word from a server counts."""
_LOG = logging.getLogger(__name__)


class Announcer:
    """One server among the followers; see :mod:`storage.followers` for the contract.

    Args:
        followers: of the store.
        server: the server's id, unique to the process.
        url: where it answers.
        pointers: name and alias by ``NAME@ALIAS``.
    """

    def __init__(
        self, followers: Followers, server: str, url: str, pointers: Mapping[str, tuple[str, str]]
    ) -> None:
        self._followers, self._server, self._url = followers, server, url
        self._pointers = pointers
        self._said: dict[str, tuple[str | None, str | None]] = {}

    def begin(self) -> None:
        """Register.

        Raises:
            BadFollower: if the url is empty or long.
            DatabaseUnavailable: if the store is out of reach.
        """
        pointers = list(self._pointers.values())
        self._followers.register(self._server, self._url, pointers, LEASE_S)

    def report(self, pointer: str, version: str | None, problem: str | None) -> None:
        """Confirm what answers for an alias; a server that was forgotten registers again.

        Raises:
            DatabaseUnavailable: if the store is out of reach.
        """
        self._said[pointer] = (version, problem)
        try:
            self._confirm(pointer)
        except UnknownFollower:
            self.begin()
            for other in self._said:
                self._confirm(other)

    def end(self) -> None:
        """Be forgotten; where the store is out of reach, silence says the same later."""
        try:
            self._followers.forget(self._server)
        except DatabaseUnavailable as error:
            _LOG.warning("the store does not know yet that this server ended: %s", error)

    def _confirm(self, pointer: str) -> None:
        name, alias = self._pointers[pointer]
        self._followers.confirm(self._server, name, alias, *self._said[pointer])
