"""What people may ask to see, as JSON: runs, versions, lineages, what keeps a store sound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.provenance import Ancestry
from orchestrator.upkeep import HomeCheckup
from storage.aliases import AliasMove
from storage.contributions import Deployment
from storage.garbage import Collection
from storage.ledger import ClientRecord, Event, RunRecord
from storage.lineage import Version
from storage.restoring import Restored

if TYPE_CHECKING:
    from orchestrator.exporting import Exported


def run_json(record: RunRecord) -> dict[str, Any]:
    """Return a run's record as JSON."""
    document = {f.name: getattr(record, f.name) for f in fields(RunRecord)}
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
        "evidence": move.evidence,
    }


def lineage_json(ancestry: Ancestry) -> dict[str, Any]:
    """Return a lineage as JSON."""
    found = ancestry.lineage
    bases = {json.dumps(_base(v), sort_keys=True): _base(v) for v in found.nodes.values()}
    return {
        "root": found.root,
        "towards": ancestry.towards,
        "versions": {key: version_json(v) for key, v in found.nodes.items()},
        "edges": [{"child": c, "parent": p, "kind": k} for c, p, k in found.edges],
        "leaves": [asdict(leaf) for leaf in ancestry.leaves],
        "bases": [bases[key] for key in sorted(bases)],
        "deployed": {alias: key for key, v in found.nodes.items() for alias in v.aliases},
        "decisions": dict(ancestry.decisions),
        "epsilon": [asdict(e) for e in ancestry.epsilons],
        "epsilon_by_data": [
            {"client": client, "fingerprint": data, **asdict(e)}
            for (client, data), e in ancestry.by_data.items()
        ],
    }


def _base(version: Version) -> dict[str, Any]:
    model = version.recipe["model"]
    return {"id": model["id"], "revision": model.get("revision"), "hash": model["hash"]}


def deployments_json(deployed: Sequence[Deployment]) -> list[dict[str, Any]]:
    """Return deployed versions that contain a client's contribution as JSON."""
    return [{"alias": d.pointer, "version": d.version} for d in deployed]


def client_json(record: ClientRecord) -> dict[str, Any]:
    """Return a registered client as JSON."""
    return {**asdict(record), "created_at": record.created_at.isoformat()}


def checkup_json(found: HomeCheckup) -> dict[str, Any]:
    """Return what ``fsck`` found as JSON."""
    document = asdict(found.store)
    document["drafts"] = [entry.name for entry in found.store.drafts]
    return {
        **document,
        "sound": found.store.is_sound,
        "home_drafts": [str(path) for path in found.drafts],
    }


def checkup_line(found: HomeCheckup) -> str:
    """Return what ``fsck`` found in one line."""
    store = found.store
    wrong = sum(1 for problem in store.problems if not problem.repaired)
    mended = len(store.problems) - wrong
    parts = [f"{store.num_blobs} blobs, {store.num_bytes / 2**20:.1f} MiB"]
    parts.append(f"{wrong} problems" if wrong else "sound")
    parts += [f"{mended} repaired"] if mended else []
    garbage = len(store.orphans) + len(store.drafts) + len(found.drafts)
    parts += [f"{garbage} leftovers (weft gc)"] if garbage else []
    return "; ".join(parts)


def collection_json(found: Collection, drafts: Sequence[Path], deleted: bool) -> dict[str, Any]:
    """Return what ``gc`` found as JSON; ``deleted`` says whether it removed anything."""
    rows = {
        kind: [{**asdict(one), "since": one.since.isoformat()} for one in blobs]
        for kind, blobs in (("removed", found.removed), ("waiting", found.waiting))
    }
    unfinished = [entry.name for entry in found.drafts] + [str(path) for path in drafts]
    return {**rows, "drafts": unfinished, "num_reached": found.num_reached, "deleted": deleted}


def collection_line(found: Collection, drafts: Sequence[Path], deleted: bool) -> str:
    """Return what ``gc`` found in one line."""
    verb = "removed" if deleted else "would remove"
    size = found.removed_bytes / 2**20
    count = len(found.drafts) + len(drafts)
    return (
        f"{verb} {len(found.removed)} blobs and {count} drafts ({size:.1f} MiB); "
        f"{len(found.waiting)} condemned; {found.num_reached} in use"
        + ("" if deleted else "; --delete does it")
    )


def restored_json(
    found: Restored, cancelled: Sequence[str], checkup: HomeCheckup
) -> dict[str, Any]:
    """Return what a backup brought back as JSON."""
    return {**asdict(found), "cancelled": list(cancelled), "check": checkup_json(checkup)}


def export_json(made: Exported) -> dict[str, Any]:
    """Return an export: its files, what a conversion kept, and how well a merge agrees."""
    done = made.converted
    return {
        "files": [str(file) for file in made.files],
        "converted": done and done.facts(),
        "merged": made.merged and dict(made.merged),
    }
