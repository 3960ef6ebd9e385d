"""A node's process that stays: each order is judged, charged, done by the installed weft, answered.

In this order: what the site's policy refuses reads no data; what an answer costs is on the site's
own ledger, on the disk, before the data are read; what is released is on the disk, too, before it
is sent. So a crash at any point overstates what was spent, and the same order asked again gets the
same bytes and costs nothing.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from clients import models, worker
from clients.accounting import BudgetSpent, epsilon
from clients.assignment import Assignment
from clients.charges import charge_of
from clients.data import leaving_out_what_is_bad
from clients.downlink import NotHeld, expanded
from clients.evaluate import Evaluation
from clients.keys import destroy_key, has_key
from clients.node.ledger import Entry, Ledger, LedgerUnavailable, MixedProtection
from clients.node.policy import Allowed, Late, Refused, Versions, allowed, refuse_extremes
from clients.node.settings import Settings
from clients.orders import (
    BadOrder,
    BadReply,
    Order,
    Refusal,
    Reply,
    Terms,
    pack_reply,
    unpack_order,
)
from clients.pace import GivenUp
from clients.reasons import reason_of
from clients.site import Site
from strategies.base import Update
from strategies.spends import PrivacySpend

Answered: TypeAlias = Update | Evaluation | Refusal


class NoiseLost(RuntimeError):
    """An order that was paid for would be answered with other noise."""


_LOG = logging.getLogger(__name__)
_PATH = re.compile(r"(?<![\w./)])~?/[^\s'\"(),;:]+")
_PLACE = "(a place at the site)"
_ASKED_FOR_S = 2 * 24 * 3600.0  # seconds; a coordinator waits for scores half as long
_ANY = PrivacySpend(
    "gaussian", "example", "add-remove", {"noise_multiplier": 1.0, "sample_rate": 1.0, "steps": 1.0}
)


class Resident:
    """Answers orders, one at a time, and keeps the base model from one to the next.

    Args:
        settings: of the node.
        stop: when set, what runs is given up, and the order is refused.

    Raises:
        clients.node.ledger.LedgerUnavailable: if there is no ledger to go on with.
    """

    def __init__(self, settings: Settings, stop: threading.Event | None = None) -> None:
        self._settings = settings
        self._stop = stop or threading.Event()
        self._ledger = Ledger(settings.state)
        self._versions = Versions(version("weft"), version("flwr"))
        epsilon([_ANY], 0.5, "rdp")  # imports what accounts: seconds, now and not in a round

    def answer(self, order: Order) -> bytes:
        """Return the packed reply to an order; where it fails, of a refusal with the reason."""
        began = time.monotonic()
        client, round_ = self._settings.name, 0
        try:
            asked, terms = unpack_order(order)
            client, round_ = asked.client, asked.round
            may = allowed(asked, terms, self._settings, self._versions, time.time())
            return self._answered(asked, terms, may, began)
        except (BadOrder, Refused) as error:
            final = _is_final(error)
            return self._refused(Refusal(client, round_, str(error), final=final))
        except LedgerUnavailable as error:
            _LOG.error("%s", error)
            return pack_reply(Reply(Refusal(client, round_, str(error)), self._facts()))

    def _answered(self, asked: Assignment, terms: Terms, may: Allowed, began: float) -> bytes:
        number = self._ledger.begin(asked.run, asked.client, asked.round, asked.action)
        result = self._result(asked, terms, may)
        node = self._facts()
        node["spends"] = self._ledger.unknown_to(asked.run, may.population, asked.round)
        if may.protection in ("none", "public"):
            node["seconds"] = time.monotonic() - began  # else it would tell how many examples
        try:
            data = pack_reply(Reply(result, node))
        except BadReply as error:  # a number that is not finite
            result = Refusal(asked.client, asked.round, str(error))
            data = pack_reply(Reply(result, node))
        self._note(number, asked.action, result, data)
        return data

    def _refused(self, refusal: Refusal) -> bytes:
        """Return the reply to what is not even begun."""
        number = self._ledger.begin("", refusal.client, refusal.round, "none")
        data = pack_reply(Reply(refusal, self._facts()))
        self._note(number, "an order", refusal, data)
        return data

    def _note(self, number: int, action: str, result: Answered, data: bytes) -> None:
        """Put on the ledger what is about to be sent."""
        kind = type(result).__name__.lower()
        reason = result.reason if isinstance(result, Refusal) else ""
        self._ledger.end(number, kind, reason, len(data), hashlib.sha256(data).hexdigest())
        said = reason or f"{kind} of {len(data)} bytes"
        _LOG.info("%s for %s, round %d: %s", action, result.client, result.round, said)

    def _facts(self) -> dict[str, Any]:
        return {
            "weft": self._versions.weft,
            "flwr": self._versions.flwr,
            "loads": models.num_loads(),
            "spends": [],
        }

    def _result(self, asked: Assignment, terms: Terms, may: Allowed) -> Answered:
        resolved = self._resolved(asked, may)
        try:
            return self._done(resolved, terms, may)
        except GivenUp as error:
            return Refusal(asked.client, asked.round, str(error))
        except Exception as error:  # whatever happens at a client is an answer
            reason = self._without_places(reason_of(asked, error))
            not_held, final = isinstance(error, NotHeld), _is_final(error)
            return Refusal(asked.client, asked.round, reason, not_held, final)

    def _resolved(self, asked: Assignment, may: Allowed) -> Assignment:
        """Return an order's assignment with the site's own places for its names."""
        data = self._settings.data[may.data_set]
        folder = self._settings.models[asked.model.hash]
        return replace(
            asked,
            model=replace(asked.model, id=str(folder), revision=None),
            data=replace(asked.data, uri=data.uri, fields=dict(data.fields)),
            site=str(self._settings.state / "site"),
        )

    def _done(self, resolved: Assignment, terms: Terms, may: Allowed) -> Update | Evaluation:
        whole = expanded(resolved)
        if whole.action != "evaluate" or (whole.private and whole.head == "personal"):
            # goes on from what the client keeps of the run, or adds to it
            name, strategy = terms.run_name, terms.strategy
            run, client, whose = whole.run, whole.client, may.population
            self._ledger.enter(Entry(run, client, whose, name, strategy, may.protection))
        if whole.private:
            refuse_extremes(whole)
        if _costs(whole):
            self._charge(whole, may)

        def stepped(step: int, steps: int) -> None:
            if self._stop.is_set():
                raise GivenUp("the site is being stopped")
            if time.time() > terms.deadline:
                raise GivenUp("missed the round's deadline at the site")

        if not whole.private:
            return worker.perform(whole, stepped)
        with leaving_out_what_is_bad():  # whether there is such a record is nobody's business
            found = _without_fingerprint(worker.perform(whole, stepped), whole)
        if whole.action == "evaluate":
            self._destroy_keys(whole)
        return found

    def _charge(self, whole: Assignment, may: Allowed) -> None:
        """Put what an assignment costs on the ledger, once for the noise of one key.

        Raises:
            NoiseLost: if it is paid for, and what it was answered with can be made no more.
        """
        charged, site = charge_of(whole, may.population), Path(whole.site)
        run, client = whole.run, whole.client
        if _own_key(whole):
            if self._ledger.has(charged.event):
                kept = Site(site).answered(run, client, charged.assignment)
                if kept or has_key(site, run, client):
                    return
                raise NoiseLost(
                    f"{client} was asked this before, and the key of its noise is gone from "
                    "the site's state: with another it would tell as much again, uncharged. "
                    "Restore the state from a backup, or ask in another run"
                )
            Site(site).run_key(run, client)  # there before the charge is, or neither
        share = whole.noise_share
        self._ledger.charge(charged, may.budget, share.of if share else 0)

    def _destroy_keys(self, scored: Assignment) -> None:
        """Destroy the keys of evaluations outside of runs, so that nobody can make their noise.

        That of one that was answered at once, since what it told is kept and told again; one that
        was not, as nobody can ask for it any more.
        """
        site = Path(scored.site)
        if not self._ledger.entered(scored.run, scored.client):
            destroy_key(site, scored.run, scored.client)
        for run, client in self._ledger.scored_before(time.time() - _ASKED_FOR_S):
            destroy_key(site, run, client)

    def _without_places(self, text: str) -> str:
        """Return a message without paths: where things lie at a site is nobody else's business."""
        settings = self._settings
        known = [data.uri.partition(":")[2].partition("?")[0] for data in settings.data.values()]
        known += map(str, (*settings.models.values(), settings.state, settings.file.parent))
        for place in sorted(filter(None, known), key=len, reverse=True):
            text = text.replace(place, _PLACE)
        return _PATH.sub(_PLACE, text)


def _is_final(error: Exception) -> bool:
    """Return whether an order that failed so would fail again."""
    settled = (BudgetSpent, MixedProtection, NoiseLost, Refused)
    return isinstance(error, settled) and not isinstance(error, Late)


def _own_key(asked: Assignment) -> bool:
    """Return whether an order's noise is made with a key that only this site has."""
    made_here = asked.noise_share if asked.privacy is None else asked.privacy
    return made_here is not None and made_here.insecure_seed is None


def _without_fingerprint(result: Update | Evaluation, asked: Assignment) -> Update | Evaluation:
    """Return what may be told of a result under privacy: not whether the data are still the same.

    Whoever may choose labels could ask for the data with one and without, and compare.
    """
    if isinstance(result, Update) and _own_key(asked):
        return replace(result, fingerprint="")
    return result


def _costs(asked: Assignment) -> bool:
    """Return whether what is sent is noised data: a reading's memory is not (clients.reading)."""
    if asked.action == "evaluate":
        return asked.privacy is not None
    return asked.action == "train" and asked.private
