"""Asking clients outside of a run where they are: here, or at their sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from clients.sources import is_elsewhere
from orchestrator.backends.base import Backend
from orchestrator.plan import Participant
from orchestrator.superlink_home import NoSuperLink
from orchestrator.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Asking:
    """What sites are asked outside of a run.

    Attributes:
        strategy: that made the version they are asked about; a site may allow some alone.
        name: what a site's own ledger calls it.
        id: by which it is told from all others, as a run's.
        patience_s: seconds until nobody waits for an answer, > 0.
    """

    strategy: str
    name: str
    id: str
    patience_s: float


@contextmanager
def reaching(
    workspace: Workspace,
    people: Sequence[Participant],
    asking: Asking,
    local: Backend,
    superlink: str | None = None,
) -> Iterator[tuple[Backend, Mapping[str, str]]]:
    """Yield a backend that reaches clients where they are, and why some are out of its reach.

    Args:
        workspace: whose ledger knows the nodes.
        people: who is to be asked.
        asking: what sites are asked.
        local: reaches those whose data are not at sites; it is not closed.
        superlink: host and port; None for what the environment or the home names.
    """
    away = [one.name for one in people if is_elsewhere(one.data.uri)]
    if not away:
        yield local, {}
        return
    from orchestrator.backends.mixed import MixedBackend
    from orchestrator.sites import sites_asked  # importing Flower takes a second

    try:
        sites = sites_asked(asking, workspace.ledger, workspace.home, superlink)
    except NoSuperLink as error:
        yield local, dict.fromkeys(away, f"its data lie at its site, and {error}")
        return
    try:
        found = {name: sites.calling.node_of(name) for name in away}
        why = {name: said for name, said in found.items() if isinstance(said, str)}
        yield MixedBackend(local, sites), why
    finally:
        sites.close()
