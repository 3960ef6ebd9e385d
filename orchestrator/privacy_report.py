"""What a version says of people's privacy, for an ethics board: facts first, then what they mean.

Everything in it is read from the version's lineage and from the ledger; nothing is computed on
data. What was not measured is said not to have been.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clients.files import write_durably
from orchestrator.documents import Section, html_page, markdown
from orchestrator.epsilons import Epsilon, against_coordinator
from orchestrator.provenance import lineage
from orchestrator.statements import Statement, statements
from orchestrator.workspace import Workspace
from storage.lineage import Version
from strategies.spends import CLIENT_UNIT, PrivacySpend

_SEES = (
    ("who", "sees", "does not see"),
    (
        "a client's site",
        "its own records, keys, losses and errors; every broadcast",
        "other clients' records and updates",
    ),
    (
        "the coordinator, and whoever can read its store",
        "every single client's update, who took part when, declared sizes, all versions",
        "records, keys, noise without the update it is in, exact losses and counts of a private "
        "run",
    ),
    (
        "whoever gets a version or an export",
        "its tensors, and with the store its lineage: clients' names, populations, spends",
        "records, updates",
    ),
)

_AUDITED = {
    f"audit/{name}"
    for name in ("epsilon_at_least", "delta", "confidence", "canaries", "guesses", "right")
}

_OF_EXAMPLES = (
    "Who sees what, today: the coordinator sees the update of each single client, and not only "
    "their sum. Against it, and against everyone after it, stands the noise alone."
)
_OF_CLIENTS = (
    "Where the unit is the client, clients are hidden from everybody but the coordinator: it sees "
    "each single update without noise, makes the noise of their sum, and is trusted with both."
)

_OF_SHARES = (
    "Where the clients made the noise by shares, no one of them nor the coordinator made the noise "
    "of the sum. The coordinator sees each single update with its client's share of the noise and "
    "no more, and against it holds the larger ε of that share alone. Clients that tell it "
    "their shares, or made none, weaken the sum's noise by as much: one of them is allowed for."
)

_CLIENT_ASSUMPTIONS = (
    "Where the unit is the client, neighbours differ in one client's every change, which is there "
    "or is none (zero-out); another client's data in its place costs what half the noise would. "
    "That clients are drawn for a round is not counted.",
)
_OF_THE_KEY = (
    "The key of the noise in a sum was drawn well by the coordinator's operating system, was read "
    "by nobody else, and was deleted when its run was closed.",
)

_ASSUMPTIONS = (
    "The unit of each ε is named beside it. It protects one such unit: who has several in the data "
    "is protected less.",
    "Neighbouring data sets differ in one unit that is there or not (add-remove).",
    "Each step takes each unit with the stated probability, by a secret draw at the client "
    "(Poisson sampling); the amplification by it is counted. That clients are drawn for a round "
    "is not.",
    "A client's declared size is right: the sample rate follows from it. It is not itself private.",
    "Keys and noise stay at the site, and its operating system draws them well.",
    "The base model, the label set, the sizes that were declared, who took part and when are not "
    "private.",
    "Populations are recognised as related where their data were looked at by one site and share "
    "a record word for word. People whose records were written anew are not recognised.",
    "ε composes over every event on record, each once, whatever became of its update. Different "
    "populations are not added: whoever is in two is protected by the sum.",
)


@dataclass(frozen=True, slots=True)
class PrivacyReport:
    """The report on a version.

    Attributes:
        version: its id.
        names: that it has.
        inherited: its ε, by population.
        statements: what the populations have spent in all.
        unbounded: versions of its lineage trained without DP: their ids, runs' reasons or "".
        insecure: versions of its lineage whose noise anybody can compute.
        sections: the same, and what it means, for people.
    """

    version: str
    names: tuple[str, ...]
    inherited: tuple[Epsilon, ...]
    statements: tuple[Statement, ...]
    unbounded: Mapping[str, str]
    insecure: tuple[str, ...]
    sections: tuple[Section, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {**asdict(self), "statements": [one.to_json() for one in self.statements]}


def privacy_report(workspace: Workspace, ref: str) -> PrivacyReport:
    """Return the report on a version.

    Raises:
        UnknownVersion: if there is no such version.
    """
    ancestry = lineage(workspace, ref)
    nodes = ancestry.lineage.nodes
    version = nodes[ancestry.lineage.root]
    populations = sorted({leaf.population for leaf in ancestry.leaves})
    known = {*workspace.ledger.populations(), *workspace.ledger.spent_populations()}
    wanted = [name for name in populations if name in known]
    found = tuple(statements(workspace, wanted)) if wanted else ()
    bare = {v.id: str(v.recipe.get("unbounded", "")) for v in nodes.values() if _is_bare(v)}
    insecure = tuple(
        v.id
        for v in nodes.values()
        if (v.recipe.get("privacy") or {}).get("insecure_seed") is not None
    )
    facts = _Facts(version, tuple(nodes.values()), ancestry.epsilons, found, bare, insecure)
    return PrivacyReport(
        version.id,
        (*version.names, *version.aliases),
        ancestry.epsilons,
        found,
        bare,
        insecure,
        tuple(_sections(workspace, facts)),
    )


def written(report: PrivacyReport, folder: Path) -> list[Path]:
    """Write the report as ``privacy-ID.md`` and ``.html`` into a folder, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"Privacy of {report.names[0] if report.names else report.version[:12]}"
    made = []
    for suffix, render in ((".md", markdown), (".html", html_page)):
        path = folder / f"privacy-{report.version[:12]}{suffix}"
        write_durably(path, render(title, report.sections).encode())
        made.append(path)
    return made


@dataclass(frozen=True, slots=True)
class _Facts:
    version: Version
    history: Sequence[Version]
    inherited: Sequence[Epsilon]
    statements: Sequence[Statement]
    bare: Mapping[str, str]
    insecure: Sequence[str]


def _is_bare(version: Version) -> bool:
    """Return whether somebody's data that are not public went into a version without DP."""
    leaves = version.recipe.get("updates", ())
    return any(
        not (leaf["public"] or leaf["spends"] or leaf.get("released", False)) for leaf in leaves
    )


def _sections(workspace: Workspace, facts: _Facts) -> Iterator[Section]:
    version = facts.version
    yield Section("Version", (f"{version.id}, made on {version.created_at:%Y-%m-%d} (UTC).",))
    yield _verdict(facts)
    yield _inherited(facts)
    yield _by_population(facts)
    yield Section(
        "Threat model",
        _threats(facts),
        table=_SEES,
    )
    yield from _against_coordinator(facts)
    said = _threats(facts)
    of_clients = _OF_CLIENTS in said or _OF_SHARES in said
    more = (*_CLIENT_ASSUMPTIONS[: 1 if of_clients else 0], *_OF_THE_KEY[: _OF_CLIENTS in said])
    yield Section("Assumptions", items=(*_ASSUMPTIONS, *more))
    yield _mechanisms(facts)
    yield _audit(facts)
    yield _retention(workspace, facts)


def _threats(facts: _Facts) -> tuple[str, ...]:
    """Return against whom the noise stands, by what it hides."""
    units = {one.unit for one in facts.inherited}
    examples = (_OF_EXAMPLES,) if units != {CLIENT_UNIT} else ()
    whole, shared = _made_by(facts)
    clients = (*((_OF_CLIENTS,) if whole else ()), *((_OF_SHARES,) if shared else ()))
    return (*examples, *(clients if CLIENT_UNIT in units else ()))


def _made_by(facts: _Facts) -> tuple[bool, bool]:
    """Return whether the coordinator made the noise of sums, and whether clients did by shares."""
    found = [v.recipe["privacy"] for v in facts.history if v.recipe.get("privacy")]
    shared = ["noise_shares" in one for one in found if one.get("unit") == CLIENT_UNIT]
    return not all(shared), any(shared)


def _verdict(facts: _Facts) -> Section:
    if facts.insecure:
        said = (
            "Nothing is promised: a part of it was trained with insecure_seed, whose noise anybody "
            "can compute."
        )
    elif facts.bare:
        said = (
            "Nothing is promised to the people whose data were trained on without differential "
            "privacy: no ε bounds what the version tells of them."
        )
    elif facts.inherited:
        said = "All data that are not public were trained on with differential privacy."
    else:
        said = "No data went into it that are not public, as far as its lineage says."
    reasons = sorted({reason for reason in facts.bare.values() if reason})
    items = [f"accepted, for this reason: {reason}" for reason in reasons]
    if facts.bare and not reasons:
        items.append("no population of theirs had a budget when that was done")
    imported = [v.id[:12] for v in facts.history if v.recipe["kind"] == "import"]
    items += [
        f"{one} was imported: what was spent on it elsewhere is not known" for one in imported
    ]
    return Section("What is promised", (said,), tuple(items))


def _inherited(facts: _Facts) -> Section:
    rows = [
        (
            e.population,
            f"{e.epsilon:.3f}",
            f"{e.delta:g}",
            e.unit,
            e.adjacency,
            "yes" if e.public else "no",
        )
        for e in facts.inherited
    ]
    header = ("population", "ε", "δ", "unit", "adjacency", "public data")
    if not rows:
        return Section("ε of this version", ("It has inherited no spend.",))
    return Section(
        "ε of this version",
        ("Of everything that went into it, each event once.",),
        table=(header, *rows),
    )


def _against_coordinator(facts: _Facts) -> Iterator[Section]:
    """Yield the ε of single updates, where each has a share of the noise."""
    deltas = {e.population: e.delta for e in facts.inherited if e.unit == CLIENT_UNIT}
    events: dict[str, dict[str, tuple[PrivacySpend, int]]] = {}
    bare: set[str] = set()
    for version in facts.history:
        shares = (version.recipe.get("privacy") or {}).get("noise_shares")
        for leaf in version.recipe.get("updates", ()):
            for spend in leaf["spends"]:
                if spend["unit"] != CLIENT_UNIT:
                    continue
                if shares is None:
                    bare.add(leaf["population"])
                else:
                    own = events.setdefault(leaf["population"], {})
                    own[leaf["digest"]] = (PrivacySpend(**spend), shares)
    rows = []
    for population, own in sorted(events.items()):
        spends, shares = zip(*own.values(), strict=True)
        found = against_coordinator(population, spends, shares, deltas[population])
        value = (
            "none: it saw updates without noise" if population in bare else f"{found.epsilon:.3f}"
        )
        rows.append((population, value, f"{found.delta:g}", found.unit, found.adjacency))
    if rows:
        header = ("population", "ε", "δ", "unit", "adjacency")
        said = "Of single updates, each with its own client's share of the noise alone."
        yield Section("ε against the coordinator", (said,), table=(header, *rows))


def _by_population(facts: _Facts) -> Section:
    header = ("population", "spent in all", "budget", "left", "shares records with", "without DP")
    rows = [
        (
            one.population,
            "; ".join(map(str, one.spent)) or "nothing",
            f"ε = {one.budget.epsilon:g} (δ = {one.budget.delta:g})" if one.budget else "none",
            "-" if one.left is None else f"{one.left:.3f}",
            ", ".join(one.related) or "-",
            ", ".join(
                bare.run + (f" ({bare.reason})" if bare.reason else "") for bare in one.unprotected
            )
            or "-",
        )
        for one in facts.statements
    ]
    title = "What the populations have spent in all"
    text = "By everything that was ever trained on their data here, and on data that share records."
    if not rows:
        return Section(title, ("No population of its lineage is on the ledger.",))
    return Section(title, (text,), table=(header, *rows))


def _mechanisms(facts: _Facts) -> Section:
    found: dict[tuple[str, ...], float] = {}
    for version in facts.history:
        privacy = version.recipe.get("privacy") or {}
        for leaf in version.recipe.get("updates", ()):
            for spend in leaf["spends"]:
                chosen = spend["parameters"]
                numbers = (chosen.get("noise_multiplier"), chosen.get("sample_rate"))
                key = (
                    leaf["population"],
                    f"{spend['mechanism']}, unit {spend['unit']}",
                    *("-" if one is None else f"{one:.4g}" for one in numbers),
                    f"{privacy.get('max_grad_norm', privacy.get('clip', '-'))}",
                )
                found[key] = found.get(key, 0.0) + float(chosen.get("steps", 1))
    header = ("population", "mechanism", "noise multiplier", "sample rate", "clipped to", "steps")
    rows = [(*key, f"{steps:g}") for key, steps in sorted(found.items())]
    if not rows:
        return Section("Mechanisms", ("None.",))
    return Section("Mechanisms", table=(header, *rows))


def _audit(facts: _Facts) -> Section:
    measured = {k: v for k, v in facts.version.metrics.items() if k.startswith("audit/")}
    if not measured:
        said = (
            "No audit of this version is on record: what was promised was not tried by an attack.",
        )
        return Section("Audit", said)
    items = tuple(f"{k}: {v:.4g}" for k, v in sorted(measured.items()))
    return Section("Audit", (_proved(measured),) if measured.keys() >= _AUDITED else (), items)


def _proved(measured: Mapping[str, float]) -> str:
    """Return what an audit found, in words."""
    number = {name.removeprefix("audit/"): value for name, value in measured.items()}
    claimed = number.get("epsilon_claimed", math.inf)
    refuted = number["epsilon_at_least"] > claimed
    return (
        f"What is released was attacked by {number['canaries']:.0f} canaries, each there or not "
        f"by a fair coin. Of {number['guesses']:.0f} guesses which were in, "
        f"{number['right']:.0f} were right, which proves ε >= {number['epsilon_at_least']:.2f} "
        f"(δ = {number['delta']:g}, confidence {number['confidence']:g}). Claimed was ε = "
        f"{claimed:.2f}. "
        + ("The claim is refuted." if refuted else "An attack that fails proves nothing.")
    )


def _retention(workspace: Workspace, facts: _Facts) -> Section:
    runs = workspace.ledger.runs_at(facts.version.id)
    kept = []
    for run in runs:
        record = workspace.ledger.run(run)
        keep = record.config.get("retention", {})
        last = f" {keep['last']}" if keep.get("last") else ""
        kept.append(f"run {run}: {keep.get('keep', 'until-closed')}{last}")
    return Section(
        "Retention",
        (
            "A version, its lineage and what was spent are kept for ever; a client that withdraws "
            "is asked no more, and nothing is unlearned. Clients' updates are kept by their run's "
            "retention. Records and keys never left their sites.",
        ),
        tuple(kept),
    )
