"""What is deployed where: one small file of the home for each alias at each server."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from clients.files import write_durably


class BadUrl(ValueError):
    """What should be a server's url is not."""


class NotDeployed(LookupError):
    """Nothing is known of this alias at this server."""


def plain_url(url: str) -> str:
    """Return a server's url in the one way that it is written down.

    Raises:
        BadUrl: if it is none, or has more than a host, a port and a path: what is written down and
            told to others must hold no secret.
    """
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise _bad_url("what was given cannot be read as a url") from None
    if parts.username is not None or parts.password is not None:
        raise _bad_url("it names a user or password, which keys in files are for")
    if not whole or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise _bad_url(f"got {url[:200]!r}")
    return url.rstrip("/")


def _bad_url(why: str) -> BadUrl:
    return BadUrl(f"a server's url is written http://HOST:PORT or https://HOST:PORT; {why}")


@dataclass(frozen=True, slots=True)
class Deployment:
    """An alias at a server.

    Attributes:
        pointer: ``NAME@ALIAS``.
        url: the server's.
        adapters: folder here that adapters are written into.
        mounted: where the server sees that folder; None where it sees it under the same path.
        gateways: urls of the gateways that lead to the server.
        rank: that what is not plain LoRA is converted to, or None.
        base: what the server calls the base model, if not what the version does.
        model: what answers for the alias at the server since the last rollout that ended, or None.
        version: id of the version that it is, or None.
    """

    pointer: str
    url: str
    adapters: str
    mounted: str | None = None
    gateways: tuple[str, ...] = ()
    rank: int | None = None
    base: str | None = None
    model: str | None = None
    version: str | None = None

    @property
    def key(self) -> str:
        """What tells this deployment from all others of a home."""
        return hashlib.sha256(f"{self.pointer} {self.url}".encode()).hexdigest()[:16]

    def folder_of(self, version: str) -> str:
        """Return the name of a version's folder: another version or rank has another."""
        return version[:16] + (f"-rank-{self.rank}" if self.rank else "")

    def model_of(self, version: str) -> str:
        """Return what a version is called at the server: what is another adapter has another."""
        return f"{self.pointer}:{self.folder_of(version)}"

    def seen_at(self, folder: Path) -> str:
        """Return where the server sees a folder of :attr:`adapters`."""
        return f"{(self.mounted or self.adapters).rstrip('/')}/{folder.name}"


def deployments(home: Path) -> list[Deployment]:
    """Return what was deployed from a home, by alias and url."""
    found = [_read(path) for path in (home / "deployments").glob("*.json")]
    return sorted(found, key=lambda one: (one.pointer, one.url))


def remember(home: Path, deployment: Deployment) -> None:
    """Write a deployment down, in place of what was known of it.

    What answers for it is still what did, where ``deployment`` does not say.
    """
    folder = home / "deployments"
    folder.mkdir(exist_ok=True)
    path = folder / f"{deployment.key}.json"
    if deployment.model is None and path.exists():
        known = _read(path)
        deployment = replace(deployment, model=known.model, version=known.version)
    write_durably(path, json.dumps(asdict(deployment)).encode())


def forget(home: Path, pointer: str, url: str) -> None:
    """Remove what is known of a deployment."""
    (home / "deployments" / f"{Deployment(pointer, url, '').key}.json").unlink(missing_ok=True)


def deployed(home: Path, pointer: str, url: str) -> Deployment:
    """Return what was deployed.

    Raises:
        NotDeployed: if it was not, from this home.
    """
    found = deployments(home)
    for one in found:
        if (one.pointer, one.url) == (pointer, plain_url(url)):
            return one
    known = ", ".join(f"{one.pointer} at {one.url}" for one in found) or "none"
    raise NotDeployed(f"{pointer} was not deployed to {url} from here; deployed are: {known}")


@contextmanager
def alone(home: Path, deployment: Deployment) -> Iterator[None]:
    """Let no other process roll out the same alias at the same server while the block lasts."""
    folder = home / "deployments"
    folder.mkdir(exist_ok=True)
    with (folder / f"{deployment.key}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> Deployment:
    found = json.loads(path.read_bytes())
    return Deployment(**{**found, "gateways": tuple(found["gateways"])})
