"""Gates: what a name asks of a version before one of its aliases is moved there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from clients.data import BadDataURI, BadRecord, DataNotFound
from clients.weights import ModelNotFound, UnsupportedBase, locate
from orchestrator import gate_checks
from orchestrator.backends.base import Backend
from orchestrator.bases import base_of
from orchestrator.config import BadConfig
from orchestrator.epsilons import composed
from orchestrator.gate_checks import Check, Cost, Size
from orchestrator.gate_file import EVERY, Asked, Ceiling, SignatureCheck, parse_gate
from orchestrator.gate_setting import PrivateData, gate_for
from orchestrator.gate_suite import scored
from orchestrator.merging import NotAModel, effective
from orchestrator.signing import keys
from orchestrator.workspace import Workspace
from storage.gates import GateRow
from storage.lineage import Version
from storage.signatures import SignatureStore
from strategies.spends import PrivacySpend
from strategies.tensors import NotLowRank, lora_layers

_UNSCORABLE = (PrivateData, DataNotFound, BadDataURI, BadRecord, BadConfig)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a gate found of a version.

    Attributes:
        pointer: ``NAME@ALIAS``, the alias that is to be moved.
        gate: the gate that asked.
        version: id of the version.
        against: id of the version that the alias points at; None for none.
        checks: what was found.
    """

    pointer: str
    gate: GateRow
    version: str
    against: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """Return the decision as JSON: what is kept with a move as its evidence."""
        return {
            "pointer": self.pointer,
            "gate": {"number": self.gate.number, "digest": self.gate.digest},
            "version": self.version,
            "against": self.against,
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
        }


def check(
    workspace: Workspace,
    pointer: tuple[str, str],
    ref: str,
    sign: str | None = None,
    backend: Backend | None = None,
) -> Decision | None:
    """Return what the gate of an alias finds of a version; what is missing is evaluated.

    Args:
        workspace: where.
        pointer: the name and the alias.
        ref: the version.
        sign: name of the key that signs the version when the alias is moved; None for none.
        backend: where to evaluate; by default in this process.

    Returns:
        The decision, or None where nothing is asked for this alias.

    Raises:
        UnknownVersion: if there is no such version.
        BadConfig: if the gate that is kept cannot be read.
    """
    found = gate_for(workspace, *pointer)
    if found is None:
        return None
    row, asked = found
    version = workspace.store.version(ref)
    there = workspace.store.pointing(*pointer)
    checks = list(_scores(workspace, row, asked, (version.id, there), backend))
    checks += _facts(workspace, asked, version, there)
    if asked.signature is not None:
        checks.append(_signature(workspace, asked.signature, version, sign))
    return Decision("@".join(pointer), row, version.id, there, tuple(checks))


def _scores(
    workspace: Workspace,
    row: GateRow,
    asked: Asked,
    pair: tuple[str, str | None],
    backend: Backend | None,
) -> Iterator[Check]:
    if not asked.needs_scores:
        return
    gate = parse_gate(row.document or {}, f"the gate of {row.name}")
    if asked.tasks is None:  # then only what has bounds is measured
        wanted = {name: one for name, one in gate.suite.items() if name in asked.metrics}
        gate = gate.model_copy(update={"suite": wanted})
    try:
        found = scored(workspace, gate, [one for one in pair if one], backend, charging=True)
    except _UNSCORABLE as error:
        yield gate_checks.unknown("suite", "all of it", str(error))
        return
    there = None if pair[1] is None else found[pair[1]]
    yield from gate_checks.metrics(asked.metrics, found[pair[0]], there)
    if asked.tasks is not None:
        yield from gate_checks.tasks(asked.tasks, found[pair[0]], there)


def _facts(
    workspace: Workspace, asked: Asked, version: Version, there: str | None
) -> Iterator[Check]:
    """Yield the checks of what is on record."""
    own = version.recipe["model"]["hash"]
    if asked.size is not None:
        yield from gate_checks.size(asked.size, size_of(workspace, version))
    if asked.base is not None:
        now = workspace.store.version(there).recipe["model"]["hash"] if there else None
        yield from gate_checks.base(asked.base, own, now)
    if asked.licences is not None:
        yield gate_checks.licences(asked.licences, own, licence_of(workspace, version))
    if asked.epsilon:
        yield from gate_checks.epsilon(asked.epsilon, costs(workspace, version, asked.epsilon))


def size_of(workspace: Workspace, version: Version) -> Size:
    """Return how large what is served of a version is."""
    try:
        tensors = effective(workspace.store, version)
    except NotAModel:
        tensors = workspace.store.tensors(version.id)
    try:
        ranks = [len(layer.a) for layer in lora_layers(tensors).values()]
    except NotLowRank:
        ranks = []
    return Size(
        num_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        num_parameters=sum(t.numel() for t in tensors.values()),
        rank=max(ranks, default=0),
    )


def licence_of(workspace: Workspace, version: Version) -> str | None:
    """Return the licence that the card beside a version's base model states, if it is here."""
    try:
        spec = base_of(workspace, version)
        card = locate(spec.id, spec.revision) / "README.md"
        text = card.read_text("utf-8")
    except (ModelNotFound, UnsupportedBase, OSError, UnicodeDecodeError):
        return None
    begin, _, rest = text.partition("---\n")
    head, end, _ = rest.partition("\n---")
    if begin.strip() or not end:
        return None
    try:
        facts = yaml.safe_load(head)
    except yaml.YAMLError:
        return None
    licence = facts.get("license") if isinstance(facts, dict) else None
    return licence if isinstance(licence, str) else None


def costs(workspace: Workspace, version: Version, asked: Sequence[Ceiling]) -> list[Cost]:
    """Return what a version cost the populations that ceilings are for, at the ceilings' δ.

    Each event of its history counts once, and against every population that shares records.

    Args:
        workspace: where.
        version: the version.
        asked: the ceilings.
    """
    events: dict[tuple[str, str], dict[str, list[PrivacySpend]]] = {}
    bare: set[str] = set()
    named = {one.population for one in asked}
    related = workspace.ledger.relations.all()
    for one in workspace.store.lineage(version.id).nodes.values():
        insecure = (one.recipe.get("privacy") or {}).get("insecure_seed") is not None
        for leaf in one.recipe.get("updates", ()):
            hit = {leaf["population"], *related.get(leaf["population"], ())}
            concerned = hit if EVERY in named else hit & named
            if leaf["public"]:
                continue
            if insecure or not (leaf["spends"] or leaf.get("released", False)):
                bare |= concerned
            spends = [PrivacySpend(**spend) for spend in leaf["spends"]]
            for population in concerned if spends else ():
                own = events.setdefault((population, spends[0].unit), {})
                own[leaf["digest"]] = spends
    found = [Cost(population, "any unit", None) for population in sorted(bare)]
    for (population, unit), kept in sorted(events.items()):
        ceiling = gate_checks.ceiling_of(asked, population, unit)
        spent = math.inf
        if ceiling is not None:
            spends = [spend for spends in kept.values() for spend in spends]
            spent = composed(population, spends, ceiling.delta).epsilon
        bounded = spent if math.isfinite(spent) else None if ceiling else 0.0
        found.append(Cost(population, unit, bounded))
    return found


def _signature(
    workspace: Workspace, asked: SignatureCheck, version: Version, sign: str | None
) -> Check:
    """Return the check of who signed a version, or will with the move."""
    ring = keys(workspace.home)
    known = ring.keys()
    names = {key.name for key in known if key.name == sign}
    for signature in SignatureStore(workspace.engine).of("version", version.id):
        signer = ring.signer("version", version.id, [signature])
        names |= {signer.name} if signer else set()
    good = names & set(asked.by) if asked.by else names
    wanted = f"by {' or '.join(asked.by)}" if asked.by else "by a trusted key"
    found = f"is signed by {', '.join(sorted(names))}" if names else "has no signature by one"
    said = f"the version must be signed {wanted}, and {found}"
    if not good:
        said += "; sign it with: weft sign REF, or promote it with --sign KEY"
    return Check("signature", "version", bool(good), None, None, None, said)
