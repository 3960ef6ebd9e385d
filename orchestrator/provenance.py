"""What a version is made of, what was made of it, and where a client's contribution is in use."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.epsilons import Composed, Epsilon, epsilon_by
from orchestrator.workspace import Workspace
from storage.contributions import Deployment
from storage.lineage import PARENT_KINDS, Edge, Lineage, Towards, Version
from storage.refs import did_you_mean


class BadSelection(ValueError):
    """Nothing of a lineage is selected, or by what there is not."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which part of a lineage is wanted: by default all of it.

    Attributes:
        kinds: only edges of these kinds are followed; empty for all.
        depth: most steps from the root, >= 0; None for all.
        client: only what leads to versions made with an update of this client, and its leaves.
        run: only what leads to versions that this run made.
    """

    kinds: tuple[str, ...] = ()
    depth: int | None = None
    client: str | None = None
    run: str | None = None


@dataclass(frozen=True, slots=True)
class Leaf:
    """A client's update, as it went into a version.

    Attributes:
        version: id of the version that it was aggregated into.
        client: who sent it.
        population: whose data it was trained on.
        digest: of its bytes.
        base: id of the version that it was trained from; empty where the recipe is older.
        weight: what its change counted, in (0, 1].
        num_examples: as declared.
        clipped: norm to which each example's gradient (at client level, the client's whole change)
            was clipped, or None without DP.
        fingerprint: of the data; keyed, so that nobody else can test a guess.
        spends: what privacy it cost, as JSON.
    """

    version: str
    client: str
    population: str
    digest: str
    base: str
    weight: float
    num_examples: int
    clipped: float | None
    fingerprint: str
    spends: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Ancestry:
    """What a version is made of, or what was made of it.

    Attributes:
        lineage: the selected versions and edges.
        towards: which way it was followed.
        leaves: the selected client updates, in the order of the versions.
        epsilons: the ε that the root has inherited, by population and unit; each event counts
            once. Of its whole history, whatever is selected; empty towards children.
        by_data: the same by (client, fingerprint of its data).
        decisions: what gates found when aliases were moved to the selected versions, by alias
            such as ``bot@production``; of aliases that still point there, and were asked about.
    """

    lineage: Lineage
    towards: Towards
    leaves: tuple[Leaf, ...]
    epsilons: tuple[Epsilon, ...]
    by_data: Mapping[tuple[str, str], Epsilon]
    decisions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def lineage(workspace: Workspace, ref: str, wanted: Selection | None = None) -> Ancestry:
    """Return a version's ancestors down to client updates, and what privacy it has cost.

    Raises:
        UnknownVersion, UnknownRun: if there is no such version or run.
        BadSelection: if nothing is selected.
    """
    whole = workspace.store.lineage(ref)
    recipes = [version.recipe for version in whole.nodes.values()]
    composed: Composed = {}
    epsilons = epsilon_by(recipes, lambda leaf: (leaf["population"],), composed)
    by_data = epsilon_by(recipes, lambda leaf: (leaf["client"], leaf["fingerprint"]), composed)
    chosen, leaves = _selected(workspace, whole, "parents", wanted or Selection())
    return Ancestry(
        chosen,
        "parents",
        leaves,
        tuple(epsilons.values()),
        {(client, data): spent for (client, data, *_), spent in by_data.items()},
        _decisions(workspace, chosen),
    )


def descendants(workspace: Workspace, ref: str, wanted: Selection | None = None) -> Ancestry:
    """Return what was made of a version; each version says which aliases point at it.

    Raises:
        UnknownVersion, UnknownRun, BadSelection: as :func:`lineage`.
    """
    selection = wanted or Selection()
    whole = workspace.store.descendants(ref, depth=selection.depth)
    chosen, leaves = _selected(workspace, whole, "children", selection)
    return Ancestry(chosen, "children", leaves, (), {}, _decisions(workspace, chosen))


def _decisions(workspace: Workspace, chosen: Lineage) -> dict[str, Mapping[str, Any]]:
    found = {}
    for pointer in sorted({p for version in chosen.nodes.values() for p in version.aliases}):
        name, _, alias = pointer.partition("@")
        evidence = workspace.store.promotions(name, alias)[0].evidence
        if evidence is not None:
            found[pointer] = evidence
    return found


def deployed_with(workspace: Workspace, client: str) -> list[Deployment]:
    """Return the deployed versions that contain a contribution of ``client``.

    Raises:
        UnknownContributor: if no version does.
    """
    return workspace.store.deployed_with(client)


def leaves_of(version: Version) -> Iterator[Leaf]:
    """Yield the client updates that a version was aggregated from, in the recipe's order."""
    privacy = version.recipe.get("privacy") or {}
    bound = privacy.get("max_grad_norm", privacy.get("clip"))
    for leaf in version.recipe.get("updates", ()):
        yield Leaf(
            version=version.id,
            client=leaf["client"],
            population=leaf["population"],
            digest=leaf["digest"],
            base=leaf.get("base", ""),
            weight=leaf.get("weight", 1.0),
            num_examples=leaf["num_examples"],
            clipped=bound if leaf["spends"] else None,
            fingerprint=leaf["fingerprint"],
            spends=tuple(leaf["spends"]),
        )


def narrowed(
    whole: Lineage, towards: Towards, wanted: Selection, goals: Collection[str] | None
) -> Lineage:
    """Return the part of a lineage that is reached from its root by the edges that are wanted.

    Pure.

    Args:
        whole: the lineage.
        towards: which way it goes.
        wanted: kinds and depth.
        goals: only what lies on a way to one of these versions; None for all.
    """
    ways: dict[str, list[Edge]] = {}
    for edge in whole.edges:
        if not wanted.kinds or edge.kind in wanted.kinds:
            near = edge.child if towards == "parents" else edge.parent
            ways.setdefault(near, []).append(edge)
    kept, frontier, steps = {whole.root}, [whole.root], 0
    while frontier and (wanted.depth is None or steps < wanted.depth):
        reached = {_far(e, towards) for near in frontier for e in ways.get(near, ())}
        frontier, steps = sorted(reached - kept), steps + 1
        kept |= reached
    followed = {edge for edges in ways.values() for edge in edges}
    edges = [e for e in whole.edges if {e.child, e.parent} <= kept and e in followed]
    if goals is not None:
        kept = _on_the_way(edges, towards, kept & set(goals))
        edges = [e for e in edges if {e.child, e.parent} <= kept]
    return Lineage(whole.root, {k: v for k, v in whole.nodes.items() if k in kept}, edges)


def _selected(
    workspace: Workspace, whole: Lineage, towards: Towards, wanted: Selection
) -> tuple[Lineage, tuple[Leaf, ...]]:
    for kind in wanted.kinds:
        if kind not in PARENT_KINDS:
            raise BadSelection(f"an edge is one of {', '.join(PARENT_KINDS)}; got {kind!r}")
    goals: set[str] | None = None
    if wanted.client is not None:
        goals = {k for k, v in whole.nodes.items() if wanted.client in _clients(v)}
        if not goals:
            raise BadSelection(_no_such_client(whole, wanted.client))
    if wanted.run is not None:
        made = _made_by(workspace, wanted.run) & whole.nodes.keys()
        if not made:
            raise BadSelection(
                f"run {wanted.run} made no version in the lineage of {whole.root[:12]}"
            )
        goals = made if goals is None else goals & made
    chosen = narrowed(whole, towards, wanted, goals)
    if whole.root not in chosen.nodes:
        raise BadSelection(
            f"nothing in the lineage of {whole.root[:12]} meets all of --kind, --depth, --client "
            "and --run; leave one out"
        )
    leaves = tuple(
        leaf
        for version in chosen.nodes.values()
        for leaf in leaves_of(version)
        if wanted.client in (None, leaf.client)
    )
    return chosen, leaves


def _made_by(workspace: Workspace, run: str) -> set[str]:
    kinds = ("started", "committed", "completed")
    events = workspace.ledger.events(workspace.ledger.run(run).id)
    return {event.data["version"] for event in events if event.kind in kinds}


def _clients(version: Version) -> set[str]:
    return {leaf["client"] for leaf in version.recipe.get("updates", ())}


def _no_such_client(whole: Lineage, client: str) -> str:
    known = sorted({c for version in whole.nodes.values() for c in _clients(version)})
    hint = did_you_mean(client, known)
    return f"no update of {client!r} is in the lineage of {whole.root[:12]}{hint}"


def _far(edge: Edge, towards: Towards) -> str:
    return edge.parent if towards == "parents" else edge.child


def _on_the_way(edges: Collection[Edge], towards: Towards, goals: set[str]) -> set[str]:
    """Return the goals and all from which one of them is reached."""
    back: dict[str, list[str]] = {}
    for edge in edges:
        near = edge.child if towards == "parents" else edge.parent
        back.setdefault(_far(edge, towards), []).append(near)
    kept, frontier = set(goals), list(goals)
    while frontier:
        for near in back.get(frontier.pop(), ()):
            if near not in kept:
                kept.add(near)
                frontier.append(near)
    return kept
