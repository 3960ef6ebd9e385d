"""What a version's model card says: how it was made, of what, at which privacy, how good it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.epsilons import Epsilon
from orchestrator.suite_metrics import measured
from storage.lineage import Lineage, Version

if TYPE_CHECKING:
    from clients.conversion import Conversion


def version_card(version: Version, history: Lineage, epsilons: Iterable[Epsilon]) -> str:
    """Return the card as Markdown, from the version's title down to its evaluations.

    Args:
        version: what the card is of.
        history: its ancestors, itself included.
        epsilons: what it has inherited.
    """
    title = version.names[-1] if version.names else version.id[:12]
    parts = [
        f"# {title}\n\nVersion `{version.id}` of a [weft](https://pypi.org/project/weft) store.",
        _section("Recipe", _rows(_recipe(version.recipe))),
        _section("Lineage", _lineage(version, history)),
        _section("Privacy", _privacy(epsilons)),
    ]
    if scores := measured(version.metrics):
        found = {key: f"{value:.4g}" for key, value in sorted(scores.items())}
        parts.append(_section("Evaluations", _rows(found)))
    return "\n\n".join(parts)


def conversion_card(converted: Conversion) -> str:
    """Return what the card says of a conversion to LoRA, as Markdown."""
    lines = [f"| `{n}` | {k.rank} | {percent(k.energy)} |" for n, k in converted.layers.items()]
    said = (
        f"Converted from {converted.method}. LoRA keeps {percent(converted.energy)} of the energy "
        "(the squared norm) of what it changes."
    )
    table = "\n".join(["| layer | rank | energy |", "|---|---|---|", *lines])
    return _section("Conversion", f"{said}\n\n{table}")


def percent(share: float) -> str:
    """Return a share of the energy for people; only all of it is 100 %.

    >>> percent(1.0), percent(0.99999), percent(0.9912)
    ('100 %', '99.99 %', '99.12 %')
    """
    # what rounding alone lost is nothing
    return "100 %" if share > 1 - 1e-9 else f"{min(100 * share, 99.99):.2f} %"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _rows(facts: Mapping[str, str]) -> str:
    lines = [f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _recipe(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return what of a recipe a reader asks for first; all of it is in the store."""
    model = recipe["model"]
    facts = {
        "made by": recipe["kind"],
        "base model": f"`{model['id'] or 'a local folder'}`, hash `{model['hash'][:12]}`",
    }
    for key in ("adapter", "strategy", "optimizer", "merge"):
        if recipe.get(key):
            facts[key] = _choice(recipe[key])
    if recipe.get("regularizers"):
        facts["regularizers"] = ", ".join(_choice(one) for one in recipe["regularizers"])
    if recipe.get("seen_labels"):
        facts["labels"] = ", ".join(recipe["seen_labels"])
    for key in ("round", "seed", "reproducible"):
        if recipe.get(key) is not None:
            facts[key] = str(recipe[key])
    versions = recipe["libraries"]
    facts["libraries"] = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    return facts


def _choice(choice: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in sorted(choice["options"].items()))
    return f"{choice['name']} ({options})" if options else str(choice["name"])


def _lineage(version: Version, history: Lineage) -> str:
    leaves = [leaf for v in history.nodes.values() for leaf in v.recipe["updates"]]
    lines = [
        f"- versions: {_counted(edge.kind for edge in history.edges) or 'this one alone'}",
        f"- client updates: {_counted(str(leaf['client']) for leaf in leaves) or 'none'}",
        *(f"- {parent.kind} of `{parent.id}`" for parent in version.parents),
    ]
    for v in history.nodes.values():
        if source := v.recipe.get("source"):
            of = f" of version `{source['version']}`" if source["version"] else ""
            lines.append(f"- `{v.id[:12]}` was imported from {len(source['files'])} files{of}")
    return "\n".join(lines)


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(Counter(names).items()))


def _privacy(epsilons: Iterable[Epsilon]) -> str:
    lines = [
        f"- {one.population}: {one}{', public data' if one.public else ''}" for one in epsilons
    ]
    return "\n".join(lines) or "No differential privacy is on record for it."
