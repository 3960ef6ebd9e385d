"""What weft does about a version that a gate does not let pass: merges first, then replay.

Each merge with the version there is now is tried, as the mean of the two and with the newer one
counting less; each is scored on the suite before anything is committed, and the best that passes
everything is committed, named and promoted. Where none does, the version is trained on for a little
with past tasks beside its last one (:mod:`orchestrator.remedy_runs`), and what comes of that is
named and promoted if it passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from clients.assignment import PluginChoice
from orchestrator import gate_checks, gating
from orchestrator.coordinator import Driving, RunBusy
from orchestrator.deploying import GateFailed, Intent, promote_as
from orchestrator.federation import Cancelled, Observe, Paused, RoundFailed
from orchestrator.gate_checks import Check
from orchestrator.gate_file import LOWER_IS_BETTER, Asked, GateFile
from orchestrator.gate_setting import gate_for
from orchestrator.gate_suite import Scored, scored, scored_draft
from orchestrator.gating import Decision
from orchestrator.merge_draft import Draft, draft
from orchestrator.merging import BadMerge, NotAModel
from orchestrator.previewing import suite_of
from orchestrator.remedy_runs import NoReplay, Replay, plan_replay, run_replay
from orchestrator.workspace import Workspace
from storage.aliases import AliasMove
from strategies.merges import MERGES
from strategies.plugins import BadOptions
from strategies.tensors import NotLowRank
from strategies.terms import BadMerge as CannotMerge

Kind: TypeAlias = Literal["merge", "replay"]

_SHARES = (0.5, 0.25)
"""How much of what the newer version learned counts, between the two."""

_IMPOSSIBLE = (BadMerge, BadOptions, CannotMerge, NotAModel, NotLowRank)
_LEARNED = ("metrics", "tasks")
"""The checks of what a version learned, which more training can mend."""


Running: TypeAlias = Callable[[Replay], AbstractContextManager[tuple[Observe, Driving]]]
"""Entered around a run that is about to begin; gives who is told of its events, and how it is
driven."""


def _unseen(replay: Replay) -> AbstractContextManager[tuple[Observe, Driving]]:
    return nullcontext((lambda kind, facts: None, Driving()))


@dataclass(frozen=True, slots=True)
class _Remedy:
    """One remedy that was tried.

    Attributes:
        what: it is, such as ``merge by svd, 0.5 of it``.
        said: what came of it.
        made: the merge, where the suite lets it pass; else None.
        quality: how good it is on the suite; higher is better.
        version: id of the version, where one was made of it.
        passes: whether that passes all.
    """

    what: str
    said: str
    made: Draft | None = None
    quality: float = 0.0
    version: str | None = None
    passes: bool = False

    def to_json(self) -> dict[str, Any]:
        passed = self.passes or self.made is not None
        found = {"what": self.what, "said": self.said, "passed": passed}
        return found if self.version is None else {**found, "version": self.version}


def promote_or_remedy(
    workspace: Workspace,
    pointer: tuple[str, str],
    ref: str,
    intent: Intent,
    kinds: Sequence[Kind] = ("merge", "replay"),
    running: Running = _unseen,
) -> AliasMove:
    """Point an alias at a version, or if its gate fails at the first remedy that passes.

    What was tried is kept with the move.

    Args:
        workspace: where.
        pointer: the name and the alias.
        ref: one of the name's versions.
        intent: why, and how; not forced.
        kinds: which remedies are tried, in this order.
        running: who watches the run that replays.

    Raises:
        GateFailed: if no remedy passes either; it says what was tried, and nothing was moved.
        Stopped: if the process was asked to stop; the same again goes on where it was.
        UnknownVersion, YankedVersion, AliasMoved: as :func:`orchestrator.deploying.promote`.
    """
    version = workspace.store.usable(pointer[0], ref)  # a merge would pass on what was yanked
    decision = gating.check(workspace, pointer, version, intent.sign)
    if decision is None or decision.passed:
        return promote_as(workspace, pointer, ref, intent)
    found: list[_Remedy] = []
    for kind in kinds:
        if kind == "merge":
            found += _by_merge(workspace, pointer, decision, intent.sign)
        else:
            found.append(_by_replay(workspace, pointer, decision, intent.sign, running))
        passed = next((one.version for one in found if one.passes), None)
        if passed is not None:
            workspace.store.name(pointer[0], passed)
            tried = tuple(one.to_json() for one in found)
            seen = replace(intent, seen=intent.seen or decision.against, tried=tried)
            return promote_as(workspace, pointer, passed, seen)
    raise GateFailed(decision, [one.to_json() for one in found])


def _by_merge(
    workspace: Workspace, pointer: tuple[str, str], decision: Decision, sign: str | None
) -> list[_Remedy]:
    """Return what came of all merges; the best that passes everything is a version."""
    if decision.against is None:
        return [_Remedy("merge", "cannot be: the alias points at no version yet")]
    found = list(_tried(workspace, pointer, (decision.version, decision.against)))
    for one in sorted((r for r in found if r.made), key=lambda r: -r.quality):
        assert one.made is not None  # it was just filtered
        committed = one.made.commit(workspace)
        again = gating.check(workspace, pointer, committed, sign)
        place = found.index(one)
        if again is None or again.passed:
            found[place] = replace(one, version=committed, passes=True)
            break
        found[place] = replace(one, said=_failures(again.failed), made=None, version=committed)
    return found


def _by_replay(
    workspace: Workspace,
    pointer: tuple[str, str],
    decision: Decision,
    sign: str | None,
    running: Running,
) -> _Remedy:
    """Return what came of training on with past tasks, if that can help and may be."""
    beyond = sorted({one.check for one in decision.failed if one.check not in _LEARNED})
    if beyond:
        return _Remedy("replay", f"cannot help: training mends no {' and no '.join(beyond)}")
    try:
        replay = plan_replay(workspace, decision.version, pointer[0])
    except NoReplay as error:
        return _Remedy("replay", f"cannot be: {error}")
    try:
        with running(replay) as (observe, driving):
            made = run_replay(workspace, replay, observe, driving)
    except (RoundFailed, Paused, Cancelled, RunBusy) as error:
        return _Remedy(str(replay), f"was not done: {error}")
    again = gating.check(workspace, pointer, made, sign)
    if again is None or again.passed:
        return _Remedy(str(replay), "passes", version=made, passes=True)
    return _Remedy(str(replay), _failures(again.failed), version=made)


def _tried(
    workspace: Workspace, pointer: tuple[str, str], pair: tuple[str, str]
) -> Iterator[_Remedy]:
    """Yield each merge of a version with the one there is, as the suite found it."""
    found = gate_for(workspace, *pointer)
    gate = suite_of(workspace, pointer[0])
    yanked = workspace.store.version(pair[1]).yanked
    if yanked is not None:
        yield _Remedy("merge", f"cannot be: the version there is now is yanked ({yanked})")
        return
    assert found is not None  # somebody was refused by it
    assert gate is not None  # as before
    asked = found[1]
    there = scored(workspace, gate, [pair[1]])[pair[1]] if asked.needs_scores else None
    # what was trained on top of the one there is holds what it learned itself, and not that too
    stacked = pair[1] in workspace.store.version(pair[0]).recipe["stack"]
    for name in MERGES.names():
        for share in _SHARES:
            what = f"merge by {name}, {share:g} of it"
            try:
                weights = (share, 1.0 if stacked else 1.0 - share)
                made = draft(workspace, pair, PluginChoice(name, {}), weights)
            except _IMPOSSIBLE as error:
                yield _Remedy(what, f"cannot be: {error}")
                break
            if there is None:
                yield _Remedy(what, "may pass", made)
                continue
            own = scored_draft(workspace, gate, made)
            failed = [one for one in _scores(asked, own, there) if not one.passed]
            if failed:
                yield _Remedy(what, _failures(failed))
            else:
                yield _Remedy(what, "passes the suite", made, _quality(gate, own))


def _scores(asked: Asked, own: Scored, there: Scored) -> Iterator[Check]:
    yield from gate_checks.metrics(asked.metrics, own, there)
    if asked.tasks is not None:
        yield from gate_checks.tasks(asked.tasks, own, there)


def _quality(gate: GateFile, own: Scored) -> float:
    """Return the mean accuracy over a suite's data sets; of those without, minus the loss."""
    values = []
    for name in gate.suite:
        scores = own.scores.get(name, {})
        metric = next((k for k in ("accuracy", "exact_match", "loss") if k in scores), None)
        if metric is not None:
            values.append(-scores[metric] if metric in LOWER_IS_BETTER else scores[metric])
    return sum(values) / len(values) if values else 0.0


def _failures(checks: tuple[Check, ...] | list[Check]) -> str:
    return "fails: " + "; ".join(f"{one.check}: {one.said}" for one in checks)
