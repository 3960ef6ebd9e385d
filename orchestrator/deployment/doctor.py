"""All looks at a deployment, as they are of use at a coordinator or at a site."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.node.settings import BadSettings, Settings, load_settings
from orchestrator.deployment import machine, programs
from orchestrator.deployment.findings import Finding, any_fails, fail, ok, warn
from orchestrator.deployment.reaching import (
    KNOCKS,
    Front,
    answers,
    interfaces,
    reached,
    refuses,
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What of a deployment a coordinator is asked to look at.

    Attributes:
        home: folder of the workspace.
        database: url of its database.
        superlink: as the coordinator dials it; None if there is none.
        proxy: as sites dial it; None if it is not known.
    """

    home: Path
    database: str
    superlink: Front | None
    proxy: Front | None


def at_coordinator(parts: Parts) -> Iterator[Finding]:
    """Look at everything that a coordinator can."""
    # a site has no database driver; what is of the coordinator alone is imported here
    from orchestrator.deployment import fleet, keeping

    yield from machine.versions()
    stored = [*keeping.database(parts.database)]
    yield from stored
    if not any_fails(stored):
        yield from fleet.nodes(parts.database)
    yield from keeping.blobs(parts.home)
    yield from machine.disks({"the workspace": parts.home})
    yield from machine.gpu()
    yield from machine.secrets(_secrets_of(parts.home))
    ends = [end for end in (parts.superlink, parts.proxy) if end is not None]
    found = programs.running("flower-superlink", "flower-supernode")
    yield from programs.flower(programs.of_deployment(found, ends))
    yield from programs.ray(programs.running("gcs_server"))
    yield from _ray_here()
    paths: list[str] = []
    if parts.superlink is not None:
        yield from _front(parts.superlink, "the SuperLink")
        version, paths = interfaces(parts.superlink)
        yield from machine.same_versions("versions", "the SuperLink", {"flwr": version})
    if parts.proxy is not None:
        yield from _front(parts.proxy, "the SuperLink", [*KNOCKS, *paths])
    elif parts.superlink is not None:
        says = "what the world reaches of the SuperLink was not looked at"
        yield warn("exposure", says, "say how sites dial it, by --proxy HOST:PORT --proxy-ca FILE")


def at_site(file: Path) -> Iterator[Finding]:
    """Look at everything that a site can."""
    yield from machine.versions()
    try:
        settings = load_settings(file)
    except BadSettings as error:
        for line in str(error).splitlines():
            yield fail("node.yaml", line, "correct it; weft node check says whether it is right")
        return
    yield ok("node.yaml", f"{file} is that of {settings.name}")
    yield from _files(settings)
    yield from machine.secrets([settings.key])
    yield from machine.disks({"the site's state": settings.state})
    yield from machine.gpu()
    front = Front(settings.superlink, settings.root_certificates, settings.insecure)
    nodes = programs.of_deployment(programs.running("flower-supernode"), [front])
    yield from programs.flower(nodes)
    yield from _front(front, "the SuperLink", KNOCKS)


def _front(front: Front, who: str, closed: Sequence[str] = ()) -> Iterator[Finding]:
    """Look at one end; what it must not answer is asked there, if anything."""
    found = [*_told(reached(front))]
    yield from found
    if not any_fails(found):
        yield from answers(front, who)
        if closed:
            yield from refuses(front, closed)


def _told(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings; a file that cannot be read on the way is one of them."""
    try:
        yield from findings
    except OSError as error:
        yield fail("tls", str(error), "name the file of who signed the certificate")


def _files(settings: Settings) -> Iterator[Finding]:
    if not settings.key.is_file():
        yield fail("key", f"there is no {settings.key}", "run: weft node init")
    missing = [
        f"{name[:12]}: {path}" for name, path in settings.models.items() if not path.is_dir()
    ]
    if missing:
        says = f"base models are not where node.yaml says: {', '.join(missing)}"
        yield fail(
            "models", says, "copy them there; weft node models FOLDER prints a folder's hash"
        )
    else:
        yield ok("models", f"{len(settings.models)} base models are here")
    gone = [name for name, data in settings.data.items() if not _there(data.uri)]
    if gone:
        says = f"no file is where node.yaml says that these data sets lie: {', '.join(gone)}"
        yield fail("data", says, "correct their uri in node.yaml, or put them there")
    else:
        yield ok("data", f"{len(settings.data)} data sets are here")


def _there(uri: str) -> bool:
    from clients.sources import is_there

    return is_there(uri)


def _secrets_of(home: Path) -> Iterator[Path]:
    """Yield the files of a coordinator that only its user should read."""
    for pattern in ("*.key", "*.secret", "*secret*", "*.token"):
        yield from (home / "superlink").rglob(pattern)
        yield from (home / "keys").rglob(pattern)
    for name in ("RAY_AUTH_TOKEN_PATH", "PGPASSFILE"):
        if place := os.environ.get(name):
            yield Path(place)


def _ray_here() -> Iterator[Finding]:
    if not os.environ.get("RAY_ADDRESS"):
        return
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_MODE") != "token" or not token:
        says = f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']}, and there is no token to show there"
        do = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, here and at the cluster"
        yield fail("ray", says, do)
