"""Looks at what the ledger knows of sites' nodes: keys that end, versions, nodes not let in."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from orchestrator.deployment.findings import Finding, fail, ok, warn
from orchestrator.deployment.machine import same_versions
from storage.database import connect, revision
from storage.nodes import NodeRecord, Nodes, Sighting
from storage.schema import HEAD

SOON = timedelta(days=30)
AWAY = timedelta(minutes=5)


def nodes(url: str) -> Iterator[Finding]:
    """Look at every node that is let in, or waits to be; of a database of this weft alone."""
    engine = connect(url)
    try:
        if engine.dialect.name == "sqlite" and not _exists(engine.url.database):
            return
        if revision(engine) != HEAD:
            return
        known = Nodes(engine)
        seen, now = known.sightings(), datetime.now(UTC)
        for node in known.all():
            if node.status == "pending":
                says = f"node {node.name} waits to be let in, with key {node.fingerprint}"
                do = f"compare the key with its owner's; then: weft clients approve {node.name}"
                yield warn("nodes", says, do)
            elif node.status == "enabled":
                yield from _enabled(node, seen.get(node.name), now)
    finally:
        engine.dispose()


def _enabled(node: NodeRecord, seen: Sighting | None, now: datetime) -> Iterator[Finding]:
    if node.expires_at <= now:
        says = f"the key of node {node.name} was good until {node.expires_at:%Y-%m-%d}"
        yield fail("nodes", says, "it is not let in; at the site: weft node rotate")
        return
    found = []
    if node.expires_at - now < SOON:
        says = f"the key of node {node.name} is good until {node.expires_at:%Y-%m-%d} only"
        found.append(warn("nodes", says, "at the site: weft node rotate"))
    if seen is not None and seen.problem:
        says = f"node {node.name} cannot be let in: {seen.problem}"
        found.append(fail("nodes", says, "at the site: weft node rotate; or look at its key"))
    elif seen is None or seen.seen_at is None or now - seen.seen_at > AWAY:
        when = f"since {seen.seen_at:%Y-%m-%d %H:%M} UTC" if seen and seen.seen_at else "yet"
        says = f"node {node.name} has not been seen {when}"
        found.append(warn("nodes", says, "at the site: weft doctor --node node.yaml"))
    if seen is not None:
        told = {"weft": seen.weft or "", "flwr": seen.flwr or ""}
        found += same_versions("nodes", f"node {node.name}", told)
    yield from found or [ok("nodes", f"node {node.name} is there")]


def _exists(database: str | None) -> bool:
    return database is not None and Path(database).exists()
