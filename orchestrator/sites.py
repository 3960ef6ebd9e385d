"""What the backend of sites needs of a run, or of an evaluation outside one, and of the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clients.orders import Terms
from orchestrator.asking_sites import Asking
from orchestrator.backends.sites import Calling, SitesBackend
from orchestrator.backends.sites_line import Link
from orchestrator.backends.sites_state import FILE
from orchestrator.plan import Plan
from orchestrator.retention import folder_of
from orchestrator.sections import BackendConfig
from orchestrator.site_spends import learn
from orchestrator.superlink_home import superlink_of
from storage.ledger import Ledger


def sites_backend(plan: Plan, ledger: Ledger, home: Path, link: Link | None = None) -> SitesBackend:
    """Return the backend that reaches a run's sites.

    Args:
        plan: of the run.
        ledger: that knows the nodes.
        home: the weft home.
        link: what the sites are reached by; None for the SuperLink that the run's config names.

    Raises:
        orchestrator.superlink_home.NoSuperLink: if there is no SuperLink to reach them by.
    """
    config = plan.config
    patience_s = config.deadline_s * (1 + (config.stale.max_staleness if config.stale else 0))
    calling = _calling(ledger, (plan.strategy.name, config.name), patience_s, config.backend.away_s)
    state = folder_of(home, plan.run) / FILE
    return SitesBackend(link or superlink_of(home, config.backend), calling, state)


def sites_asked(
    asking: Asking, ledger: Ledger, home: Path, superlink: str | None = None
) -> SitesBackend:
    """Return the backend that reaches sites outside of a run.

    Args:
        asking: what they are asked.
        ledger: that knows the nodes.
        home: the weft home.
        superlink: its host and port; None for what the environment or the home names.

    Raises:
        orchestrator.superlink_home.NoSuperLink: if there is no SuperLink to reach them by.
    """
    chosen = BackendConfig(name="superlink", superlink=superlink)
    calling = _calling(ledger, (asking.strategy, asking.name), asking.patience_s, chosen.away_s)
    return SitesBackend(superlink_of(home, chosen), calling, folder_of(home, asking.id) / FILE)


def _calling(ledger: Ledger, named: tuple[str, str], patience_s: float, away_s: float) -> Calling:
    """Return how sites are called; ``named`` has the names of the strategy and of the run."""
    known = _Known(ledger)
    strategy, run_name = named
    terms = Terms(
        strategy=strategy,
        run_name=run_name,
        weft=version("weft"),
        flwr=".".join(version("flwr").split(".")[:2]),
        deadline=0.0,
    )
    return Calling(terms, patience_s, known.node_of, known.learn, away_s)


@dataclass(frozen=True, slots=True)
class _Known:
    """What the ledger knows of sites.

    Attributes:
        ledger: which one.
    """

    ledger: Ledger

    def node_of(self, client: str) -> tuple[str, str] | str:
        """Return the name and the key of a client's node, or why it cannot be asked."""
        node = self.ledger.nodes.of_clients([client]).get(client)
        if node is None:
            return f"client {client!r} is at no node; weft clients list shows who is"
        if not node.is_let_in(datetime.now(UTC)):
            state = "its key has expired" if node.status == "enabled" else f"it is {node.status}"
            return f"node {node.name} takes no part: {state}; see weft clients show {node.name}"
        return node.name, node.public_key

    def learn(self, node: str, about: Mapping[str, Any]) -> None:
        """Take what a node says of itself onto the ledger."""
        learn(self.ledger, node, about)
