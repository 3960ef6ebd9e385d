"""Replay from data: a run trained once more, client by client, until something differs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.assignment import Assignment
from clients.regularizers import When
from clients.site import Site
from clients.wire import digest, pack
from orchestrator.backends.base import Backend, Failure, complete
from orchestrator.backends.inline import InlineBackend
from orchestrator.beginning import rehearse
from orchestrator.committed import Commits
from orchestrator.coordinator import planned
from orchestrator.plan import Plan, RoundInputs, plan_round
from orchestrator.reading import plan_reading
from orchestrator.replay import asked_round, reached
from orchestrator.workspace import Workspace
from storage.lineage import Version
from storage.store import AdapterStore
from strategies import STRATEGIES
from strategies.base import Broadcast, ClientSpec, Strategy, Tensors, Update

_READINGS: Mapping[str, When] = {"prepared": "prepare", "final": "consolidate"}
"""Of which reading the updates are that a version of this kind is made of."""


class NoiseSecret(ValueError):
    """A run cannot be trained again: its noise is secret."""


class NotRetrained(RuntimeError):
    """A client could not be trained again."""


@dataclass(frozen=True, slots=True)
class Retrained:
    """How far training again gave the same.

    Attributes:
        versions: how many versions were reached again, the start included.
        updates: how many updates were, byte for byte.
        differs: where something first differs, and what; "" where nothing does.
    """

    versions: int
    updates: int
    differs: str = ""


def retrain(workspace: Workspace, run: str, backend: Backend | None = None) -> Retrained:
    """Train a run again, here, from its clients' data, until something differs from the store.

    Each update is made from the versions that are in the store, so that the first difference is
    where it arose. Nothing is written, but to a temporary folder. A client's private state (a
    personal head) is that of its accepted updates.

    Args:
        workspace: where the run is, and from where its clients' data can be read.
        run: id, prefix or name.
        backend: where to train; by default in this process.

    Raises:
        UnknownRun: if there is no such run.
        NoiseSecret: if it was trained with DP: its noise cannot be had again, and must not be.
        NotRetrained: if it has no version yet, or a client cannot be trained here.
    """
    record = workspace.ledger.run(run)
    plan = planned(workspace.ledger, record)
    privacy = plan.config.privacy
    if plan.central is not None:
        raise NoiseSecret(
            f"run {record.id} has client-level DP: no update is kept that one trained again could "
            "be compared with, nor the key of its noise once it is closed"
        )
    if privacy is not None and privacy.insecure_seed is None:
        raise NoiseSecret(
            f"run {record.id} was trained with DP, and its noise is keyed by secrets that stay at "
            "its clients; verify its updates instead with: weft replay REF --verify"
        )
    if record.version is None:
        raise NotRetrained(f"run {record.id} has committed no version yet")
    chain = versions_of(workspace.store, record.version)
    with tempfile.TemporaryDirectory(prefix="weft-replay-") as scratch:
        Site(scratch).share_data_key(sites := Site(workspace.home / "sites"))
        Site(scratch).share_examples(sites)
        return _Retraining(workspace, plan, backend or InlineBackend(), scratch).compare(chain)


def versions_of(store: AdapterStore, last: str) -> list[Version]:
    """Return a run's versions, the start first."""
    chain = [store.version(last)]
    while chain[-1].recipe["kind"] != "start":
        [parent] = chain[-1].parents
        chain.append(store.version(parent.id))
    return chain[::-1]


class _Retraining:
    """One run, trained again in a folder of its own."""

    def __init__(self, workspace: Workspace, plan: Plan, backend: Backend, site: str) -> None:
        self._workspace, self._plan, self._backend, self._site = workspace, plan, backend, site
        choice = plan.strategy
        self._strategy: Strategy = STRATEGIES.get(choice.name).build(**choice.options)
        self._commits = Commits(workspace.store, plan.start.stack)
        self._people = {one.name: one for one in plan.participants}

    def compare(self, chain: Sequence[Version]) -> Retrained:
        """Make one version after the other again, and say where one differs."""
        start, *rest = chain
        if self._start() != start.id:
            return Retrained(0, 0, "the start: the adapter's first tensors, or its base, differ")
        count = 0
        for done, version in enumerate(rest, 1):
            updates: list[Update] = []
            for leaf in version.recipe["updates"]:
                update = self._sent(leaf, _READINGS.get(version.recipe["kind"]))
                if digest(pack(update)) != leaf["digest"]:
                    where = f"round {update.round}, {leaf['client']}: {_difference(update, leaf)}"
                    return Retrained(done, count, where)
                updates.append(update)
                count += 1
            if version.id not in reached(self._workspace, version, updates):
                where = f"round {version.recipe['round']}: the same updates aggregate to another"
                return Retrained(done, count, f"{where} version")
        return Retrained(len(chain), count)

    def _start(self) -> str:
        store = self._workspace.store
        return rehearse(self._plan, store, self._strategy, self._made, self._site).version

    def _made(self, assignment: Assignment) -> Update:
        return self._run([assignment])

    def _sent(self, leaf: Mapping[str, Any], when: When | None) -> Update:
        """Return the update that a leaf's client sends today, of a round or of a reading."""
        start = self._commits.of(leaf["base"])
        underlay = self._commits.below(leaf["base"])
        round_ = asked_round(self._workspace, leaf)
        inputs = self._inputs(round_, leaf["base"], underlay, start.memory)

        def broadcast(client: ClientSpec) -> Broadcast:
            return self._strategy.broadcast(start.state, client)

        who = [self._people[leaf["client"]]]
        if when is not None:
            return self._run(plan_reading(self._plan, inputs, broadcast, who, when))
        return self._run(plan_round(self._plan, inputs, broadcast, who))

    def _run(self, assignments: Sequence[Assignment]) -> Update:
        limit = self._plan.config.deadline_s
        [result] = complete(self._backend, assignments, limit, lambda assignment: None)
        if isinstance(result, Failure):
            who = result.client or "the adapter's start"
            raise NotRetrained(f"{who} cannot be trained again: {result.reason}")
        assert isinstance(result, Update)
        return result

    def _inputs(self, round_: int, base: str, underlay: Tensors, memory: Tensors) -> RoundInputs:
        return RoundInputs(round_, base, underlay, memory, self._site)


def _difference(update: Update, leaf: Mapping[str, Any]) -> str:
    """Return what of an update is not as it was, as far as the lineage tells."""
    if update.fingerprint != leaf["fingerprint"]:
        return "its data are not those that it was trained on (another fingerprint)"
    if update.num_examples != leaf["num_examples"]:
        return f"it has {update.num_examples} examples, and had {leaf['num_examples']}"
    return "the same data give an update with other bytes"
