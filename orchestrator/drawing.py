"""Lineages as pictures: a tree for the terminal, Mermaid and Graphviz for documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from orchestrator.epsilons import Epsilon
from orchestrator.provenance import Ancestry, Leaf
from storage.lineage import Edge, Version

_KEEP = 3
_PLAIN = frozenset(" -_.,:@/()+")


def lineage_tree(ancestry: Ancestry, whole: bool = False) -> Tree:
    """Return a version's history as a tree down to client updates, or what was made of it.

    A long line of rounds is shortened to its ends unless ``whole``. A version that is reached a
    second time is referred to.
    """
    found = ancestry.lineage
    drawing = _Drawing(ancestry, whole)
    root = Tree(_version_line(found.nodes[found.root]), guide_style="dim")
    drawing.draw(root, root, found.root)
    if ancestry.epsilons:
        spent = root.add("[bold]privacy inherited[/] (each event counts once)")
        for item in ancestry.epsilons:
            line = spent.add(epsilon_line(item))
            parts = [
                (*k, e)
                for k, e in ancestry.by_data.items()
                if (e.population, e.unit) == (item.population, item.unit)
            ]
            for client, data, part in parts if len(parts) > 1 else ():
                line.add(f"{escape(client)}, data {escape(data[:12])}: {part}")
    return root


class _Drawing:
    """Draws each version once, the root first, its client updates as leaves.

    A line of single edges is drawn flat, one below the other; a version with several opens a
    branch for each.
    """

    def __init__(self, ancestry: Ancestry, whole: bool) -> None:
        self._nodes, self._whole = ancestry.lineage.nodes, whole
        self._down = ancestry.towards == "children"
        self._next: dict[str, list[Edge]] = {}
        for edge in ancestry.lineage.edges:
            self._next.setdefault(edge.parent if self._down else edge.child, []).append(edge)
        self._leaves: dict[str, list[Leaf]] = {}
        for leaf in ancestry.leaves:
            self._leaves.setdefault(leaf.version, []).append(leaf)
        self._drawn: set[str] = set()

    def draw(self, line: Tree, node: Tree, key: str) -> None:
        """Fill ``node``, the version ``key``; what comes next goes on in ``line``."""
        while True:
            self._drawn.add(key)
            for leaf in self._leaves.get(key, ()):
                node.add(_leaf_line(leaf))
            skipped, edges = self._shortened(self._next.get(key, []))
            if skipped:
                line.add(f"[dim]… {skipped} rounds, shown with --all[/]")
            if len(edges) != 1:
                break
            key = self._far(edges[0])
            if key in self._drawn:
                line.add(f"{self._edge(edges[0])} [dim](shown above)[/]")
                return
            node = line.add(self._edge(edges[0]))
        for edge in edges:
            if self._far(edge) in self._drawn:
                node.add(f"{self._edge(edge)} [dim](shown above)[/]")
            else:
                branch = node.add(self._edge(edge))
                self.draw(branch, branch, self._far(edge))

    def _far(self, edge: Edge) -> str:
        return edge.child if self._down else edge.parent

    def _edge(self, edge: Edge) -> str:
        arrow = "→" if self._down else "←"
        return f"[bold]{edge.kind}[/] {arrow} {_version_line(self._nodes[self._far(edge)])}"

    def _shortened(self, edges: list[Edge]) -> tuple[int, list[Edge]]:
        """Return how many rounds to leave out of a line of them, and the edges to go on with."""
        line = edges
        length = 0
        while len(line) == 1 and line[0].kind == "round" and self._far(line[0]) not in self._drawn:
            length += 1
            last, line = line, self._next.get(self._far(line[0]), [])
        if self._whole or length <= _KEEP:
            return 0, edges
        return length - 1, last


def mermaid(ancestry: Ancestry) -> str:
    """Return a lineage as a Mermaid flowchart: base models and clients flow into versions."""
    lines = ["flowchart LR"]
    texts = _texts(ancestry, lambda parts: "<br>".join(_for_mermaid(part) for part in parts))
    shapes = {"v": '["{}"]', "c": '(["{}"])', "b": '[("{}")]'}
    for key, text in texts.items():
        lines.append(f"  {key}{shapes[key[0]].format(text)}")
    for source, target, label in _arrows(ancestry):
        lines.append(f'  {source} -- "{_for_mermaid(label)}" --> {target}')
    return "\n".join(lines)


def graphviz(ancestry: Ancestry) -> str:
    """Return a lineage in Graphviz' DOT language: base models and clients flow into versions."""
    lines = ["digraph lineage {", "  rankdir=LR;", "  node [shape=box];"]
    texts = _texts(ancestry, lambda parts: r"\n".join(_for_graphviz(part) for part in parts))
    shapes = {"v": "box", "c": "ellipse", "b": "cylinder"}
    for key, text in texts.items():
        lines.append(f'  {key} [label="{text}", shape={shapes[key[0]]}];')
    for source, target, label in _arrows(ancestry):
        lines.append(f'  {source} -> {target} [label="{_for_graphviz(label)}"];')
    return "\n".join([*lines, "}"])


def _texts(ancestry: Ancestry, joined: Callable[[list[str]], str]) -> dict[str, str]:
    """Return what is written in each node, by its key: v0.. versions, c0.. clients, b0.. bases."""
    versions, clients, bases = _keys(ancestry)
    nodes = ancestry.lineage.nodes
    made = {key: joined(_version_parts(nodes[id])) for id, key in versions.items()}
    made |= {key: joined([client]) for client, key in clients.items()}
    for (place, revision, content), key in bases.items():
        made[key] = joined([place, f"revision {revision}", f"hash {content[:12]}"])
    return made


def _arrows(ancestry: Ancestry) -> list[tuple[str, str, str]]:
    """Return (from, to, label) in the direction in which tensors went."""
    versions, clients, bases = _keys(ancestry)
    nodes = ancestry.lineage.nodes
    starts = [(bases[_base(v)], versions[v.id], "base") for v in nodes.values() if not v.parents]
    edges = [(versions[e.parent], versions[e.child], e.kind) for e in ancestry.lineage.edges]
    leaves = [(clients[x.client], versions[x.version], x.digest[:12]) for x in ancestry.leaves]
    return [*starts, *edges, *leaves]


def _keys(
    ancestry: Ancestry,
) -> tuple[dict[str, str], dict[str, str], dict[tuple[str, str, str], str]]:
    nodes = ancestry.lineage.nodes
    clients = sorted({leaf.client for leaf in ancestry.leaves})
    bases = sorted({_base(v) for v in nodes.values() if not v.parents})
    return (
        {id: f"v{n}" for n, id in enumerate(nodes)},
        {client: f"c{n}" for n, client in enumerate(clients)},
        {base: f"b{n}" for n, base in enumerate(bases)},
    )


def _base(version: Version) -> tuple[str, str, str]:
    model = version.recipe["model"]
    return model["id"] or "local folder", str(model.get("revision") or "-"), model["hash"]


def _for_mermaid(text: str) -> str:
    """Return text in which nothing is Mermaid's; it takes characters by their number."""
    return "".join(c if c.isalnum() or c in _PLAIN else f"#{ord(c)};" for c in text)


def _for_graphviz(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return "".join(c if c.isprintable() else "\ufffd" for c in escaped)


def epsilon_line(spent: Epsilon) -> str:
    """Return one population's ε as a line."""
    note = " [dim]public data: reported, not budgeted[/]" if spent.public else ""
    return f"{escape(spent.population)}: {spent}{note}"


def _version_line(version: Version) -> str:
    recipe = version.recipe
    title, what, *_ = _version_parts(version)
    base = recipe["model"]
    at = f"@{base['revision']}" if base.get("revision") else ""
    place = escape(f"{base['id'] or 'local folder'}{at} {base['hash'][:12]}")
    extra = f"  [dim]base {place}[/]" if recipe["kind"] in ("start", "merge", "import") else ""
    insecure = (recipe.get("privacy") or {}).get("insecure_seed") is not None
    warning = "  [red]insecure seed: not private[/]" if insecure else ""
    if "unbounded" in recipe:
        warning = f"  [red]without DP, accepted: {escape(recipe['unbounded'])}[/]"
    scores = "  ".join(f"{k} {v:.3f}" for k, v in sorted(version.metrics.items())[:2])
    bad = f"  [red]yanked: {escape(version.yanked)}[/]" if version.yanked is not None else ""
    return f"[cyan]{escape(title)}[/] {escape(what)}{extra}  [dim]{escape(scores)}[/]{warning}{bad}"


def _version_parts(version: Version) -> list[str]:
    """Return what a version is called, and what made it."""
    recipe = version.recipe
    names = ", ".join((*version.names, *version.aliases))
    what = {
        "round": f"round {recipe.get('round')} of {recipe.get('strategy', {}).get('name')}",
        "start": f"start of {_method(recipe)} ({recipe.get('start')})",
        "prepared": f"start of {_method(recipe)}, prepared from data",
        "final": f"round {recipe.get('round')} with the memory of its task",
        "merge": f"merge by {recipe.get('merge', {}).get('name')}",
        "offset": f"offset of {_method(recipe)}",
        "basis": f"basis by {recipe.get('merge', {}).get('name')}",
        "import": f"import of {_method(recipe)}",
    }.get(recipe["kind"], recipe["kind"])
    return [f"{version.id[:12]} {names}".strip(), what]


def _method(recipe: Mapping[str, Any]) -> str:
    """Return an adapter's name, and how it starts where that is not the usual way."""
    choice = recipe.get("adapter") or {"name": "unknown", "options": {}}
    init = choice["options"].get("init", "kaiming")
    return str(choice["name"]) if init == "kaiming" else f"{choice['name']} ({init})"


def _leaf_line(leaf: Leaf) -> str:
    private = "".join(
        f"  noise {s['parameters']['noise_multiplier']:g} q {s['parameters']['sample_rate']:.3g} "
        f"steps {s['parameters']['steps']:g}"
        for s in leaf.spends
    )
    clipped = "not clipped" if leaf.clipped is None else f"clipped to {leaf.clipped:g}"
    data = f"  data {leaf.fingerprint[:12]}" if leaf.fingerprint else ""
    weight = "" if leaf.weight == 1 else f"  weight {leaf.weight:g}"
    return (
        f"[green]{escape(leaf.client)}[/] update {leaf.digest[:12]}  n {leaf.num_examples}{weight}"
        f"  [dim]{clipped}{data}{private}[/]"
    )
