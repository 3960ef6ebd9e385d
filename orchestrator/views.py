"""What people may ask to see, as JSON: plug-ins, runs, versions, lineages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from orchestrator.config import FAMILIES
from orchestrator.service import Ancestry
from storage.aliases import AliasMove
from storage.ledger import ClientRecord, Event, RunRecord
from storage.lineage import Version
from strategies.plugins import UnknownPlugin


def plugin_table(kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield every plug-in of one kind, or of all, as JSON.

    Raises:
        UnknownPlugin: if there is no such kind.
    """
    if kind is not None and kind not in FAMILIES:
        raise UnknownPlugin(f"no kind of plug-in is called {kind!r} ({', '.join(FAMILIES)})")
    for family_kind, family in FAMILIES.items():
        if kind in (None, family_kind):
            for name in family.names():
                plugin = family.get(name)
                yield {
                    "kind": family_kind,
                    "name": name,
                    "summary": plugin.summary,
                    "source": plugin.source,
                    "options": {
                        o.name: {
                            "type": o.describe_type(),
                            **({} if o.required else {"default": o.default}),
                        }
                        for o in plugin.options.values()
                    },
                }


def run_json(record: RunRecord) -> dict[str, Any]:
    """Return a run's record as JSON."""
    document = asdict(record)
    return {k: v.isoformat() if hasattr(v, "isoformat") else v for k, v in document.items()}


def event_json(event: Event) -> dict[str, Any]:
    """Return a line of a run's log as JSON."""
    row = {"seq": event.seq, "at": event.at.isoformat(), "kind": event.kind}
    return {**row, "data": event.data, "changes": event.changes}


def version_json(version: Version) -> dict[str, Any]:
    """Return a version as JSON."""
    return {
        "id": version.id,
        "names": list(version.names),
        "aliases": list(version.aliases),
        "yanked": version.yanked,
        "tensors": version.tensors,
        "auxiliary": version.auxiliary,
        "memory": version.memory,
        "parents": [{"id": p.id, "kind": p.kind} for p in version.parents],
        "recipe": version.recipe,
        "metrics": dict(version.metrics),
        "created_at": version.created_at.isoformat(),
    }


def move_json(move: AliasMove) -> dict[str, Any]:
    """Return a move of an alias as JSON."""
    return {
        "number": move.number,
        "kind": move.kind,
        "from": move.before,
        "to": move.version,
        "who": move.who,
        "why": move.why,
        "at": move.created_at.isoformat(),
    }


def lineage_json(ancestry: Ancestry) -> dict[str, Any]:
    """Return an ancestry as JSON."""
    found = ancestry.lineage
    return {
        "root": found.root,
        "versions": {key: version_json(v) for key, v in found.nodes.items()},
        "edges": [{"child": c, "parent": p, "kind": k} for c, p, k in found.edges],
        "epsilon": [asdict(e) for e in ancestry.epsilons],
    }


def client_json(record: ClientRecord) -> dict[str, Any]:
    """Return a registered client as JSON."""
    return {**asdict(record), "created_at": record.created_at.isoformat()}
