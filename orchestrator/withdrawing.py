"""A client withdraws: it is used no more, what it sent is buried, and who has it by now is told.

What it keeps of its own examples (:mod:`clients.reservoir`) is deleted at the site that is here.

Nothing is unlearned: versions that were made with its updates stay what they are, and their ids and
lineages stay true.
"""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from clients.site import Site
from orchestrator.history import History
from orchestrator.retention import bury_waiting, folder_of
from orchestrator.workspace import Workspace
from storage.contributions import Deployment
from storage.ledger import RunRecord, UnknownClient
from storage.records import FINAL
from storage.store import UnknownContributor
from storage.withdrawals import Withdrawal

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """What a withdrawal did.

    Attributes:
        record: what is on record.
        buried: how many of its updates' bytes were removed; where a version was made of them, a
            tombstone says so.
        later: runs that still need one of its updates for the round they are in, or are being
            driven; they bury it when that round is committed.
        deployed: aliases that point at versions with its updates in their history.
        forgotten: how many files of examples that it kept were deleted.
        node: at which site's node it was registered, where nothing was deleted; empty for none, and
            when done again.
    """

    record: Withdrawal
    buried: int
    later: tuple[str, ...]
    deployed: tuple[Deployment, ...]
    forgotten: int = 0
    node: str = ""


def withdraw(workspace: Workspace, name: str, why: str = "") -> Withdrawn:
    """Stop using a client, for good. Doing it again reports how things stand now.

    Raises:
        UnknownClient: if no client is registered under the name, none withdrew, and no run had
            one.
    """
    ledger = workspace.ledger
    runs = [run for run in _all_runs(workspace) if _took_part(ledger.plan(run.id), name)]
    registered = name in ledger.client_names()
    if not (registered or runs or name in ledger.withdrawals.all()):
        ledger.client(name)  # raises, with what was perhaps meant
    node = node_of(workspace, name)
    record = ledger.withdrawals.add(name, getpass.getuser(), why)  # first: it stops the rest
    if registered:
        with suppress(UnknownClient):  # somebody was faster
            ledger.remove_client(name)
    later = tuple(run.id for run in runs if _needs_updates(workspace, run))
    buried = workspace.store.updates.bury() + sum(
        bury_waiting(folder_of(workspace.home, run.id), [name])
        for run in runs
        if run.id not in later
    )
    try:
        deployed = workspace.store.deployed_with(name)
    except UnknownContributor:
        deployed = []
    forgotten = Site(workspace.sites).forget_examples(name)
    return Withdrawn(record, buried, later, tuple(deployed), forgotten, node)


def node_of(workspace: Workspace, name: str) -> str:
    """Return the site's node that a client is at; empty where its data are here, or for none."""
    known = {client.name: client.node or "" for client in workspace.ledger.clients()}
    return known.get(name, "")


def forget_examples(workspace: Workspace, name: str) -> int:
    """Delete what a client kept of its examples for later tasks; return how many files that was.

    Runs that go on from its tasks then rehearse nothing of them. At a site that is elsewhere, its
    owner does this there.

    Raises:
        UnknownClient: if nothing was kept, nobody is registered under the name and no version was
            made with an update of theirs.
    """
    count = Site(workspace.sites).forget_examples(name)
    if not count:
        try:
            workspace.store.deployed_with(name)
        except UnknownContributor:
            workspace.ledger.client(name)
    return count


def _all_runs(workspace: Workspace) -> list[RunRecord]:
    page = runs = workspace.ledger.runs(limit=_PAGE)
    while len(page) == _PAGE:
        page = workspace.ledger.runs(limit=_PAGE, before=page[-1].id)
        runs = [*runs, *page]
    return runs


def _took_part(plan: Mapping[str, Any], name: str) -> bool:
    return any(one["name"] == name for one in plan.get("participants", ()))


def _needs_updates(workspace: Workspace, run: RunRecord) -> bool:
    """Return whether a run may still read what it has taken: it is driven, or has decided to."""
    if run.status in FINAL and run.status != "failed":
        return False
    opened = History().after_all(workspace.ledger.events(run.id)).open
    decided = opened is not None and opened.closed is not None
    return decided or workspace.ledger.queue.is_driven(run.id)
