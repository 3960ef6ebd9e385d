"""Other organisations' sites: nodes that fetch their orders from a SuperLink, and answer there.

An order is sent when its node is there, with the time until which somebody waits; whoever is cut
off is waited for, for a while. A node that was away since it was sent an order may have lost it, so
it is sent once more, as is one whose answer did not arrive whole: a site that has its answer
already sends the same bytes. What is on its way is written down, so that another process can go on:
it collects what comes in reply to what this one sent. Where the Flower run is lost (its SuperLink
was away for a minute, or lost its database), a new one is begun, and what is open is asked again.

Whatever waits for the network does so in threads, a slow site's reply apart from all questions; all
decisions are the caller's thread's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from clients.assignment import Assignment
from clients.orders import BadReply, Packer, pack_order
from clients.pace import pause_after
from orchestrator.backends.base import TICK_S, Result, Started, Stepped, unheard
from orchestrator.backends.sites_answers import CUT_OFF, GONE, failed, mishap, most_bytes, result_of
from orchestrator.backends.sites_line import Calling, Claimed, Line, Link, Open
from orchestrator.backends.sites_state import Sent, SitesState
from orchestrator.backends.superlink import (
    Arrived,
    Lost,
    Mishap,
    Node,
    Refused,
    RuntimeGone,
    TaskLost,
    Unreadable,
    canonical_key,
)

__all__ = ["Calling", "SitesBackend"]

_POLL_S, _LONGEST_POLL_S = 0.1, 1.0
_LOOK_S, _LOOK_FOR_S = 2.0, 0.5
_RETRY_S = 1.0
_STALLED_S = 30.0
"""Seconds without the next part of an answer, of 5 MB at most, after which it is asked for anew."""

_QUESTIONS, _FETCHES = 2, 16


@dataclass(slots=True)
class _Run:
    """One call of :meth:`SitesBackend.run`."""

    line: Line
    calling: Calling
    coming: Iterator[Assignment | None]
    started: Started
    packer: Packer = field(default_factory=Packer)
    ready: deque[Result] = field(default_factory=deque)
    open_: dict[int, Open] = field(default_factory=dict)
    nodes: dict[bytes, Node] = field(default_factory=dict)
    looked: float = 0.0
    heard: float = 0.0
    more: bool = True
    _jobs: dict[Future[Any], Callable[[Future[Any]], None]] = field(default_factory=dict)
    _due: dict[str, float] = field(default_factory=dict)
    _out: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _asks: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_QUESTIONS))
    _in: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_FETCHES))
    _closed: bool = False

    @property
    def unfinished(self) -> bool:
        """Whether there may be a result yet."""
        return bool(self.more or self.open_ or self.ready)

    def take(self) -> None:
        """Take what is to be done now."""
        for assignment in self.coming:
            if assignment is None:
                return
            self._ask(assignment)
        self.more = False

    def _ask(self, assignment: Assignment) -> None:
        found = self.calling.node_of(assignment.client)
        if isinstance(found, str):
            self.ready.append(failed(assignment, found))
            return
        one = Open(assignment, (found[0], canonical_key(found[1])), time.monotonic())
        if (sent := self.line.state.sent.get(one.key)) is not None:
            one.ids, one.activated, one.restored = set(sent.ids), sent.activated, True
            self.started(assignment)
        self.open_[id(one)] = one

    def listen(self) -> None:
        """Do what is due, and wait for a tick at most until some of it is done."""
        if self.line.claim is not None and self.line.claim.lost:
            self._lose(self.line.claim)
        if self.open_:
            self._connect()
            self._look()
            self._give_up()
            self._push()
            self._poll()
        poll_in_s = self._due.get("poll", 0.0) - time.monotonic()
        pause_s = poll_in_s if 0 < poll_in_s < TICK_S else TICK_S
        if not self._jobs:
            time.sleep(pause_s)
            return
        for job in wait(self._jobs, pause_s, FIRST_COMPLETED).done:
            self._jobs.pop(job)(job)

    def close(self) -> None:
        """Give up what is open."""
        self._closed = True
        for pool in (self._out, self._asks, self._in):
            pool.shutdown(wait=False, cancel_futures=True)
        for one in self.open_.values():
            self.line.state.sent.pop(one.key, None)
        if self.open_:
            self.line.state.write()

    def _every(self, what: str, seconds: float) -> bool:
        """Return whether something is due, and have it be due again in so many seconds."""
        now = time.monotonic()
        if now < self._due.get(what, now):
            return False
        self._due[what] = now + seconds
        return True

    def _connect(self) -> None:
        if self.line.claim is not None or not self._every("connect", 3600.0):
            return

        def done(job: Future[tuple[Claimed, bool]]) -> None:
            self._due["connect"] = time.monotonic() + _RETRY_S
            try:
                claim, known = job.result()
            except RuntimeGone as error:
                self.line.silent(error)
            except Refused as error:
                self._fail_all(str(error))
            else:
                self.line.answered()
                self.line.claim = claim
                if not known:
                    self._forget_sent()
                    self.line.state.begin(claim.task)

        self._jobs[self._out.submit(self.line.open)] = done

    def _forget_sent(self) -> None:
        """Have everything sent anew."""
        for one in self.open_.values():
            one.ids, one.activated, one.restored, one.sending = set(), 0.0, False, False

    def _lose(self, claim: Claimed) -> None:
        """Take note that a Flower run is over."""
        if self.line.claim is claim:
            self.line.claim = None
            self._out.submit(claim.close)
            self._forget_sent()

    def _settle(self, job: Future[Any], claim: Claimed) -> Any:
        """Return what a job returned; None where that is of no use any more."""
        try:
            found = job.result()
        except RuntimeGone as error:
            self.line.silent(error)
            return None
        except TaskLost:
            self._lose(claim)
            return None
        self.line.answered()
        return found if claim is self.line.claim else None

    def _look(self) -> None:
        """See which nodes are there."""
        waiting = any(not one.ids for one in self.open_.values())
        if not self._every("look", _LOOK_FOR_S if waiting else _LOOK_S):
            return
        asked = time.monotonic()

        def done(job: Future[Sequence[Node]]) -> None:
            try:
                self.nodes = {node.public_key: node for node in job.result()}
                self.looked = asked
            except (RuntimeGone, Refused, TaskLost) as error:
                self.line.silent(error)
            else:
                self.line.answered()
                self._shut_out()

        self._jobs[self._asks.submit(self.line.superlink.nodes)] = done

    def _shut_out(self) -> None:
        """Fail what was asked of nodes that are let in no more: nobody would take the answer."""
        for one in list(self.open_.values()):
            if one.node[1] not in self.nodes:
                found = self.calling.node_of(one.assignment.client)
                if isinstance(found, str):
                    self._done(one, failed(one.assignment, found))

    def _push(self) -> None:
        """Send what has not been sent, or may have been lost since, to nodes that are there."""
        claim = self.line.claim
        if claim is None:
            return
        for one in self.open_.values():
            node = self.nodes.get(one.node[1])
            came_back = node is not None and node.activated > one.activated
            if node is None or not node.online or one.sending or (one.ids and not came_back):
                continue
            if self.looked < one.cut_off:
                continue  # it was there before that
            one.sending = True
            job = self._out.submit(self._send, claim, node.id, one.assignment)
            self._jobs[job] = partial(self._sent, claim, one, node.activated)

    def _send(self, claim: Claimed, node: int, assignment: Assignment) -> str:
        """Send an order; return its message's id."""
        deadline = time.time() + self.calling.patience_s
        order = pack_order(assignment, replace(self.calling.terms, deadline=deadline), self.packer)
        return claim.push(node, order, deadline, str(assignment.round))

    def _sent(self, claim: Claimed, one: Open, activated: float, job: Future[str]) -> None:
        one.sending = False
        try:
            found = self._settle(job, claim)
        except (Refused, ValueError) as error:  # a node that is going, or what cannot be said
            self._done(one, failed(one.assignment, str(error)))
            return
        if found is None or id(one) not in self.open_:
            return
        if not one.ids:
            self.started(one.assignment)
        one.ids.add(found)
        one.activated, self.heard = activated, time.monotonic()
        self.line.state.sent[one.key] = Sent(tuple(sorted(one.ids)), one.activated)
        self.line.state.write()

    def _poll(self) -> None:
        """Ask what has come."""
        claim, ids = self.line.claim, [i for one in self.open_.values() for i in one.ids]
        if claim is None or not ids or not self._every("poll", 3600.0):
            return
        self._jobs[self._asks.submit(claim.replies, ids)] = partial(self._came, claim)

    def _came(self, claim: Claimed, job: Future[list[Arrived]]) -> None:
        now = time.monotonic()
        self._due["poll"] = now + pause_after(now - self.heard, _POLL_S, _LONGEST_POLL_S)
        try:
            arrived = self._settle(job, claim) or ()
        except Refused as error:
            self.line.silent(error)
            return
        self.heard = now if arrived else self.heard
        asked = {i: one for one in self.open_.values() for i in one.ids}
        for reply in arrived:
            if (one := asked.get(reply.to)) is None:
                continue
            one.ids.discard(reply.to)  # it is told of once
            one.sending = True  # there is nothing to send again while it is fetched
            wanted = partial(self._wanted, self._until(one))
            fetch = self._in.submit(claim.fetch, reply, most_bytes(one.assignment), wanted)
            self._jobs[fetch] = partial(self._fetched, claim, one)

    def _until(self, one: Open) -> float:
        """Return until when anybody waits for a reply, however slowly it arrives."""
        return one.since + self.calling.patience_s

    def _wanted(self, until: float, waited_s: float) -> bool:
        return not self._closed and waited_s < _STALLED_S and time.monotonic() < until

    def _fetched(self, claim: Claimed, one: Open, job: Future[bytes | Mishap]) -> None:
        one.sending = False
        name, assignment = one.node[0], one.assignment
        try:
            found = self._settle(job, claim)
        except Lost:  # it keeps what it answered, and sends the same bytes
            one.cut_off, one.restored = time.monotonic(), False
            if one.cut_off >= self._until(one):
                self._done(
                    one, failed(assignment, f"the reply of node {name} did not arrive in time")
                )
            return
        except (Unreadable, BadReply, Refused) as error:
            self._done(one, failed(assignment, f"the reply of node {name} is no use: {error}"))
            return
        if found is None or id(one) not in self.open_:
            return  # it is sent anew, or was answered
        if isinstance(found, bytes):
            self._done(one, result_of(assignment, name, found, self.calling.learn))
        elif found.code == CUT_OFF:
            one.cut_off = time.monotonic()
        elif not (found.code == GONE and one.restored):
            self._done(one, mishap(assignment, name, found))
        one.restored = False

    def _done(self, one: Open, result: Result) -> None:
        if self.open_.pop(id(one), None) is not None:
            self.ready.append(result)
            if self.line.state.sent.pop(one.key, None) is not None:
                self.line.state.write()

    def _fail_all(self, why: str) -> None:
        for one in list(self.open_.values()):
            self._done(one, failed(one.assignment, why))

    def _give_up(self) -> None:
        """Fail what waits for a node, or a SuperLink, that has been away for too long."""
        now, patience = time.monotonic(), self.calling.away_s
        gone = self.line.gone is not None and now - self.line.gone > patience
        for one in list(self.open_.values()):
            if now - one.since <= patience:
                continue
            if gone:
                self._done(one, failed(one.assignment, self.line.why))
            elif self.looked > max(one.since, one.cut_off) and not one.ids and not one.sending:
                why = _away(one.node[0], self.nodes.get(one.node[1]), patience)
                if why:
                    self._done(one, failed(one.assignment, why))


@dataclass(slots=True)
class SitesBackend:
    """Runs assignments at the sites that have their data.

    Args:
        superlink: over which they are reached.
        calling: how orders are sent.
        state: file in which is written down what is on its way.
    """

    superlink: Link
    calling: Calling
    state: Path
    _line: Line = field(init=False)

    def __post_init__(self) -> None:
        state = SitesState.read(self.state, self.superlink.endpoint.address)
        self._line = Line(self.superlink, state)

    def run(
        self,
        assignments: Iterable[Assignment | None],
        started: Started,
        stepped: Stepped = unheard,
    ) -> Generator[Result | None]:
        """Yield each assignment's result; see :class:`orchestrator.backends.base.Backend`.

        A site is sent what it is asked as soon as it is there, whatever it works at: it keeps the
        rest for later. How far it is nobody is told.
        """
        run = _Run(self._line, self.calling, iter(assignments), started)
        try:
            while run.unfinished:
                run.take()
                if not run.ready and run.unfinished:
                    run.listen()
                yield from _taken(run.ready)
        finally:
            run.close()

    def close(self) -> None:
        """End the Flower run."""
        if self._line.claim is not None:
            self._line.claim.finish()
            self._line.claim.close()
            self._line.claim = None
        self._line.state.forget()
        self.superlink.close()


def _taken(ready: deque[Result]) -> Generator[Result | None]:
    """Yield what is ready, or a tick."""
    if not ready:
        yield None
    while ready:
        yield ready.popleft()


def _away(name: str, node: Node | None, patience_s: float) -> str:
    """Return a sentence if a node has been away for too long, else nothing."""
    if node is None:
        return f"the SuperLink does not know node {name}; see weft clients list if it is enabled"
    if node.online or time.time() - node.last_seen <= patience_s:
        return ""
    if not node.last_seen:
        return f"node {name} has never been there; start it with: weft node start"
    at = time.strftime("%H:%M:%S", time.gmtime(node.last_seen))
    return f"node {name} has not been there since {at} UTC"
