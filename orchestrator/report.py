"""Versions, lineages and runs as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from clients.inspection import DataReport
from orchestrator.card import percent
from orchestrator.drawing import epsilon_line
from orchestrator.epsilons import Epsilon
from orchestrator.suite_metrics import by_task, measured
from storage.aliases import AliasMove
from storage.contributions import Deployment
from storage.ledger import RunRecord
from storage.lineage import Version
from storage.listing import NameRow
from storage.records import now

if TYPE_CHECKING:
    from clients.conversion import Conversion


def version_table(version: Version, epsilons: Sequence[Epsilon]) -> Table:
    """Return one version's facts."""
    table = Table(show_header=False, box=None, pad_edge=False)
    recipe = version.recipe
    rows = {
        "id": version.id,
        "names": ", ".join((*version.names, *version.aliases)) or "-",
        "made by": recipe["kind"],
        "base": f"{recipe['model']['id'] or 'local folder'}  {recipe['model']['hash']}",
        "adapter": f"{recipe['adapter']['name']}  {recipe['adapter']['options']}",
        "parents": ", ".join(f"{p.id[:12]} ({p.kind})" for p in version.parents) or "-",
        "stacked on": ", ".join(ref[:12] for ref in recipe["stack"]) or "-",
        "offset": (recipe.get("offset") or "-")[:12],
        "library": ", ".join(ref[:12] for ref in recipe.get("library", ())) or "-",
        "labels": ", ".join(recipe["seen_labels"]) or "-",
        "updates": ", ".join(leaf["client"] for leaf in recipe["updates"]) or "-",
        "reproducible": recipe["reproducible"],
        "private": "yes" if recipe["private"] else "no",
        **({"without DP": f"accepted: {recipe['unbounded']}"} if "unbounded" in recipe else {}),
        "metrics": ", ".join(f"{k} {v:.4f}" for k, v in measured(version.metrics).items()) or "-",
        "yanked": version.yanked or "-",
        "created": version.created_at.strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/]", escape(value))
    for task, scores in by_task(version.metrics).items():
        told = ", ".join(f"{k} {v:.4g}" for k, v in scores.items())
        table.add_row("[bold]on a suite[/]", escape(f"{task.partition('@')[0]}: {told}"))
    for spent in epsilons:
        table.add_row("[bold]ε[/]", epsilon_line(spent))
    return table


def names_table(rows: Sequence[NameRow]) -> Table:
    """Return names, with what they number and where their aliases point."""
    table = Table("name", "versions", "newest", "aliases")
    for row in rows:
        aliases = ", ".join(f"@{alias} {v[:12]}" for alias, v in row.aliases.items()) or "-"
        table.add_row(escape(row.name), str(row.num_versions), row.newest[:12], escape(aliases))
    return table


def versions_table(versions: Sequence[Version]) -> Table:
    """Return versions, a line each, in the order given."""
    table = Table("version", "names", "made by", "created (UTC)", "metrics", "yanked")
    for v in versions:
        names = ", ".join((*v.names, *v.aliases)) or "-"
        scores = ", ".join(f"{k} {value:.4f}" for k, value in measured(v.metrics).items())
        when = v.created_at.strftime("%Y-%m-%d %H:%M:%S")
        facts = (v.id[:12], names, v.recipe["kind"], when, scores, v.yanked or "")
        table.add_row(*(escape(text) for text in facts))
    return table


def deployments_table(deployed: Sequence[Deployment]) -> Table:
    """Return the deployed versions that contain a client's contribution."""
    table = Table("alias", "version")
    for d in deployed:
        table.add_row(escape(d.pointer), d.version[:12])
    return table


def moves_table(moves: Sequence[AliasMove]) -> Table:
    """Return the moves of an alias, in the order given."""
    table = Table("", "when (UTC)", "what", "from", "to", "who", "why", "gate")
    for m in moves:
        when = m.created_at.strftime("%Y-%m-%d %H:%M:%S")
        facts = (str(m.number), when, m.kind, (m.before or "-")[:12], m.version[:12], m.who, m.why)
        table.add_row(*(escape(text) for text in (*facts, gate_line(m.evidence))))
    return table


def gate_line(evidence: Mapping[str, Any] | None) -> str:
    """Return what a gate found of a move, in a line."""
    if evidence is None:
        return "-"
    if "damaged" in evidence:
        return "damaged; look at weft fsck"
    failed = [f"{c['check']} {c['subject']}" for c in evidence["checks"] if not c["passed"]]
    found = f"failed: {', '.join(failed)}" if failed else "passed"
    forced = evidence.get("forced")
    if forced:
        found += f"; forced by {forced['who']} on {forced['host']}: {forced['reason']}"
    return found if evidence["gate"] or forced else "-"


def conversion_table(converted: Conversion) -> Table:
    """Return how much of each layer's change LoRA keeps, and of all."""
    table = Table("layer", "rank", "energy")
    for name, kept in converted.layers.items():
        table.add_row(escape(name), str(kept.rank), percent(kept.energy))
    table.add_row("all", "", percent(converted.energy), style="bold")
    return table


def agreement_line(merged: Mapping[str, Any]) -> str:
    """Return how well a model that the adapter was merged into agrees with the adapter."""
    return (
        f"{merged['dtype']}: its logits differ by {merged['error']:.1g} of their norm from the "
        f"adapter's (allowed {merged['tolerance']:g}), the base model's by {merged['effect']:.1g}"
    )


def runs_table(records: Sequence[RunRecord]) -> Table:
    """Return runs, newest first."""
    table = Table("run", "name", "status", "priority", "owner", "round", "age", "version", "error")
    for r in records:
        owner = ":".join((r.owner or "-").split(":")[:2])  # host and process
        facts = (r.id, r.name, standing(r), str(r.priority), owner, f"{r.round}/{r.rounds}")
        rest = (_age(now() - r.created_at), (r.version or "-")[:12], r.error or "")
        table.add_row(*(escape(text) for text in (*facts, *rest)))
    return table


def standing(record: RunRecord) -> str:
    """Return a run's status, and what it will soon be."""
    soon = {"pause": " (to be paused)", "cancel": " (to be cancelled)"}
    return record.status + soon.get(record.wanted, "")


def _age(span: timedelta) -> str:
    seconds = max(0, int(span.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def plugins_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return plug-ins, a line each."""
    table = Table("kind", "name", "what it does", "source")
    for row in rows:
        source = f"arXiv {row['source']}" if row["source"] else ""
        table.add_row(row["kind"], row["name"], row["summary"], source)
    return table


def options_table(row: Mapping[str, Any]) -> Table:
    """Return one plug-in's options."""
    table = Table("option", "type", "default", title=f"{row['kind']} {row['name']}")
    for name, option in row["options"].items():
        default = option.get("default", "required")
        table.add_row(name, option["type"], "null" if default is None else str(default))
    return table


def data_report(found: DataReport) -> Table:
    """Return what is in a data set and what is wrong with it."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("records", str(found.total))
    table.add_row("bad", str(found.num_bad))
    for problem in found.problems:
        table.add_row("", f"[red]{escape(problem)}[/]")
    table.add_row("duplicates", str(found.num_duplicates))
    for label, count in found.labels.items():
        table.add_row(f"label {escape(str(label))}", str(count))
    if found.lengths is not None:
        lengths = found.lengths
        table.add_row(
            "tokens",
            f"{lengths.shortest} to {lengths.longest}, median {lengths.median:g}, "
            f"95 % up to {lengths.percentile_95}",
        )
        table.add_row("truncated", str(lengths.num_truncated))
    return table
