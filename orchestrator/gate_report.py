"""Gates, what they found, and who follows, as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml
from rich.markup import escape
from rich.table import Table

from storage.followers import Follower
from storage.gates import GateRow

if TYPE_CHECKING:
    from orchestrator.gating import Decision
    from orchestrator.merge_file import Stage
    from orchestrator.previewing import Preview

_SEARCHED = ("loss_before", "loss_after", "trials")


def gate_json(row: GateRow) -> dict[str, Any]:
    """Return a state of a gate as JSON."""
    return {
        "name": row.name,
        "number": row.number,
        "digest": None if row.document is None else row.digest,
        "document": row.document,
        "who": row.who,
        "why": row.why,
        "at": row.created_at.isoformat(),
    }


def gate_text(row: GateRow) -> str:
    """Return a gate as its file says it, after a line on who set it."""
    when = row.created_at.strftime("%Y-%m-%d %H:%M:%S UTC")
    why = f": {row.why}" if row.why else ""
    text = yaml.safe_dump(row.document, sort_keys=False, allow_unicode=True).rstrip()
    return f"# {row.name}  gate {row.number}, by {row.who} at {when}{why}\n{text}"


def gates_table(rows: Sequence[GateRow]) -> Table:
    """Return the states of a gate, in the order given."""
    table = Table("", "when (UTC)", "who", "asks for", "why")
    for row in rows:
        when = row.created_at.strftime("%Y-%m-%d %H:%M:%S")
        asks = "removed" if row.document is None else ", ".join(row.document["aliases"])
        table.add_row(*(escape(text) for text in (str(row.number), when, row.who, asks, row.why)))
    return table


def checks_table(decision: Decision) -> Table:
    """Return what a gate found, a line for each check."""
    table = Table("", "check", "of", "short by", "what was found")
    for one in decision.checks:
        short = "" if not one.short else f"{one.short:.4g}"
        mark = "[green]passed[/]" if one.passed else "[red]failed[/]"
        texts = (one.check, one.subject, short, one.said)
        table.add_row(mark, *(escape(text) for text in texts))
    return table


def layers_table(found: Preview) -> Table:
    """Return where the parts of a merge work against each other, and what it keeps of them."""
    table = Table(
        "layer", "of", "signs differ", "cancelled", "inputs shared", "outputs shared", "energy"
    )
    for one in found.conflicts:
        energy = found.layer_energy.get(one.layer)
        shares = (one.disagreement, one.cancelled, one.input_overlap, one.output_overlap, energy)
        told = ("-" if share is None else f"{share:.1%}" for share in shares)
        table.add_row(escape(one.layer), str(len(one.adapters)), *told)
    table.add_row("all", str(len(found.parents)), *[""] * 4, f"{found.energy:.1%}", style="bold")
    return table


def stage_line(stage: Stage, found: Preview) -> str:
    """Return a line on what a stage merges, and on its search for weights, where it has one."""
    of = zip(stage.of, found.parents, found.weights, strict=True)
    parts = [f"{weight:.4g} {part.ref} ({id_[:12]})" for part, id_, weight in of]
    line = f"stage {stage.name}: {found.method.name} of {', '.join(parts)}"
    if stage.search is None:
        return line
    before, after, trials = (found.metrics[f"search_{k}"] for k in _SEARCHED)
    return f"{line}; loss {before:.4g}, and {after:.4g} after {trials:.0f} merges"


def scores_table(found: Preview) -> Table:
    """Return how the parts of a merge, and the merge, score on a suite."""
    columns = [one[:12] for one in found.parents]
    table = Table("data set", "metric", *columns, "merge")
    names = sorted({(data, k) for s in found.scores for data in s.scores for k in s.scores[data]})
    for data, metric in names:
        values = (one.scores.get(data, {}).get(metric) for one in found.scores)
        told = ("-" if value is None else f"{value:.4g}" for value in values)
        table.add_row(escape(data), escape(metric), *told)
    for one, column in zip(found.scores, [*columns, "merge"], strict=True):
        for data, problem in one.problems.items():
            table.add_row(escape(data), f"{column}: {escape(problem)}", style="red")
    return table


def followers_table(found: Sequence[Follower]) -> Table:
    """Return who follows which alias, and what each serves."""
    table = Table("alias", "url", "serves", "heard of (UTC)", "server", "problem")
    for one in found:
        seen = one.seen_at.strftime("%Y-%m-%d %H:%M:%S") + ("" if one.is_live else " silent")
        serves = one.version[:12] if one.version else "-"
        texts = (f"{one.name}@{one.alias}", one.url, serves, seen, one.server, one.problem or "")
        table.add_row(*(escape(text) for text in texts))
    return table
