"""Where a home keeps its SuperLink, and how the SuperLink that a coordinator uses is found."""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.backends.superlink import SuperLink
    from orchestrator.sections import BackendConfig

PORT = 9092
PLAIN = "http://"


class NoSuperLink(ValueError):
    """There is no SuperLink to use, or not all that its use needs."""


@dataclass(frozen=True, slots=True)
class SuperLinkHome:
    """The files of a home's SuperLink.

    Attributes:
        folder: that has them all.
    """

    folder: Path

    @classmethod
    def of(cls, home: Path) -> SuperLinkHome:
        """Return those of a weft home."""
        return cls(home / "superlink")

    @property
    def secret(self) -> Path:
        """Against which runs are handed out."""
        return self.folder / "secret"

    @property
    def database(self) -> Path:
        """Flower's own, SQLite."""
        return self.folder / "state.db"

    @property
    def authority(self) -> Path:
        """The certificate of who signed the SuperLink's own."""
        return self.folder / "tls" / "ca.crt"

    @property
    def address(self) -> Path:
        """Holds the host and port where it was started last."""
        return self.folder / "address"

    def last(self) -> str:
        """Return the host and port where it was started last; empty if it never was."""
        return self.address.read_text("ascii").strip() if self.address.exists() else ""


def superlink_of(home: Path, chosen: BackendConfig | None = None) -> SuperLink:
    """Return the SuperLink that a run's config names, or the environment, or that of the home.

    Args:
        home: the weft home.
        chosen: the run's; None to go by environment and home alone.

    Raises:
        NoSuperLink: if there is none, or it cannot be used: the message says what is missing.
    """
    from orchestrator.backends.superlink import Endpoint, SuperLink

    own = SuperLinkHome.of(home)
    local = own.last()
    named = chosen.superlink if chosen else None
    address = named or os.environ.get("WEFT_SUPERLINK") or local
    if not address:
        raise NoSuperLink(
            "no SuperLink is named: start one with weft superlink start, or name one with "
            "backend.superlink: HOST:PORT or in WEFT_SUPERLINK"
        )
    database = own.database if address == local and own.database.exists() else None
    plain, address = address.startswith(PLAIN), address.removeprefix(PLAIN)
    if plain and not is_loopback(address):
        raise NoSuperLink(
            f"the SuperLink {PLAIN}{address} is on another machine, and plain HTTP would show its "
            "secret and all updates to whoever listens; name it without http://, and give it TLS"
        )
    authority = _file(chosen.certificates if chosen else None, "WEFT_SUPERLINK_CA")
    if authority is None and own.authority.exists():
        authority = own.authority
    secret = _file(chosen.secret_file if chosen else None, "WEFT_SUPERLINK_SECRET_FILE")
    roots = None if plain or authority is None else _read(authority)
    return SuperLink(Endpoint(address, roots, plain), _read(secret or own.secret), database)


def is_loopback(address: str) -> bool:
    """Return whether an address, HOST:PORT, is this machine's own and reached by nobody else."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _file(named: str | None, variable: str) -> Path | None:
    place = named or os.environ.get(variable)
    return Path(place) if place else None


def _read(path: Path) -> bytes:
    try:
        found = path.read_bytes()
    except OSError as error:
        raise NoSuperLink(
            f"{path} cannot be read ({error.strerror}); it is made by weft superlink start, and "
            "named by backend.secret_file and backend.certificates, or WEFT_SUPERLINK_SECRET_FILE "
            "and WEFT_SUPERLINK_CA"
        ) from error
    if not found:
        raise NoSuperLink(f"{path} is empty; start the SuperLink anew with: weft superlink start")
    return found
