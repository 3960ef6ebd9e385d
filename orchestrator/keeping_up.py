"""Servers that go where their aliases point: each look rolls out what is not there yet."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from orchestrator.deploying import parse_pointer
from orchestrator.rollout import RolledOut, Rollout

_LOG = logging.getLogger(__name__)
_EXPECTED = (LookupError, ValueError, OSError, RuntimeError, SQLAlchemyError)


class Registry(Protocol):
    """Where servers say what they serve, so that a rollback can wait for them."""

    def register(
        self, server: str, url: str, pointers: Sequence[tuple[str, str]], lease_s: float
    ) -> None:
        """Record that a server follows these aliases."""
        ...

    def heartbeat(self, server: str) -> None:
        """Record that it was heard of now."""
        ...

    def confirm(
        self, server: str, name: str, alias: str, version: str | None, problem: str | None = None
    ) -> None:
        """Record that it answers with this version and no other."""
        ...

    def forget(self, server: str) -> bool:
        """Remove it."""
        ...


@dataclass(frozen=True, slots=True)
class Server:
    """Who follows.

    Attributes:
        id: unique to the process.
        url: where requests are answered.
        registry: where it says so.
        lease_s: seconds for which a word of it counts.
    """

    id: str
    url: str
    registry: Registry
    lease_s: float = 60.0


class KeepingUp:
    """Some aliases at one server, kept where they point.

    Nothing that is expected to go wrong ends it: while the store, the server or a gateway is away
    requests are answered as before, and the next look tries again. A server that was started anew
    gets its adapters again.

    Args:
        rollouts: one for each alias; with a short ``drain_s``, since every look waits for it.
        server: who follows.
        poll_s: seconds between looks, at most a third of the lease.
    """

    def __init__(self, rollouts: Sequence[Rollout], server: Server, poll_s: float = 1.0) -> None:
        self._rollouts, self._server, self._poll_s = rollouts, server, poll_s
        self._done: dict[str, RolledOut] = {}
        self._problems: dict[str, str] = {}
        self._registered = False

    def run(self, stop: threading.Event) -> None:
        """Look until ``stop`` is set; then the registry is told that nobody follows any more."""
        while not stop.is_set():
            self.look()
            stop.wait(self._poll_s)
        if self._registered:
            self._heard(partial(self._server.registry.forget, self._server.id))

    def look(self) -> None:
        """Roll out what is not where its alias points, and say what is served."""
        for rollout in self._rollouts:
            pointer = rollout.deployment.pointer
            problem = None
            try:
                if not self._is_there(rollout):
                    self._done[pointer] = rollout.run()
            except _EXPECTED as error:
                problem = str(error.args[0] if error.args else error)
                if self._may_lead_on(rollout):
                    self._done.pop(pointer, None)
            self._note(pointer, problem)
            self._heard(partial(self._say, pointer, problem))

    def _is_there(self, rollout: Rollout) -> bool:
        """Return whether server and gateways are where the alias points, as far as they say."""
        done = self._done.get(rollout.deployment.pointer)
        name, alias = parse_pointer(rollout.deployment.pointer)
        if done is None or done.left:
            return False
        if rollout.workspace.store.pointing(name, alias) != done.version:
            return False
        if done.model not in {one.id for one in rollout.vllm.models()}:
            return False
        return all(one.leads(rollout.deployment.pointer) == done.model for one in rollout.switches)

    def _may_lead_on(self, rollout: Rollout) -> bool:
        """Return whether a gateway may lead elsewhere than what was rolled out last."""
        pointer = rollout.deployment.pointer
        done = self._done.get(pointer)
        try:
            return done is None or any(one.leads(pointer) != done.model for one in rollout.switches)
        except _EXPECTED:
            return True

    def _say(self, pointer: str, problem: str | None) -> None:
        server, registry = self._server, self._server.registry
        pointers = [parse_pointer(r.deployment.pointer) for r in self._rollouts]
        if not self._registered:
            registry.register(server.id, server.url, pointers, server.lease_s)
            self._registered = True
        done = self._done.get(pointer)
        # what is still being drained may answer with the version before
        served = done.version if done and not done.left else None
        try:
            registry.confirm(server.id, *parse_pointer(pointer), served, problem)
        except LookupError:  # it was forgotten
            self._registered = False

    def _note(self, what: str, problem: str | None) -> None:
        """Log a problem once, and that it is over."""
        if problem == self._problems.get(what):
            return
        if problem is None:
            _LOG.warning("%s: as it should be again, after: %s", what, self._problems.pop(what))
        else:
            self._problems[what] = problem
            _LOG.warning("%s: requests are answered as before: %s", what, problem)

    def _heard(self, said: Callable[[], object]) -> None:
        try:
            said()
        except _EXPECTED as error:
            self._note("the registry", str(error.args[0] if error.args else error))
        else:
            self._note("the registry", None)
