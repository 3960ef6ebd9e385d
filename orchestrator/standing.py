"""Where deployments stand: what their servers have, and where their gateways lead."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from orchestrator.deploying import parse_pointer
from orchestrator.deployments import Deployment, deployments
from orchestrator.gateway_client import GatewayFailed, RemoteGateway
from orchestrator.vllm import Vllm, VllmRefused, VllmUnreachable
from orchestrator.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Standing:
    """One deployment, as it is now.

    Attributes:
        deployment: which alias, at which server.
        wanted: id of the version that the alias points at, or None.
        loaded: what the server has loaded for the alias.
        leads: by gateway, the model that answers for the alias there, or None.
        problem: why this is not known, or None.
    """

    deployment: Deployment
    wanted: str | None
    loaded: tuple[str, ...]
    leads: Mapping[str, str | None]
    problem: str | None

    @property
    def state(self) -> Literal["in step", "behind", "unknown"]:
        """Whether the alias' version alone is loaded, and every gateway leads there."""
        if self.problem is not None:
            return "unknown"
        model = self.wanted and self.deployment.model_of(self.wanted)
        there = self.loaded == (model,) and all(led == model for led in self.leads.values())
        return "in step" if there else "behind"


def standings(
    workspace: Workspace, key: str | None = None, gateway_key: str | None = None
) -> list[Standing]:
    """Return where everything that was deployed from a home stands now.

    Args:
        workspace: whose deployments.
        key: the servers' API key.
        gateway_key: the gateways' administrator's key.
    """
    return [_standing(workspace, one, key, gateway_key) for one in deployments(workspace.home)]


def _standing(
    workspace: Workspace, deployment: Deployment, key: str | None, gateway_key: str | None
) -> Standing:
    wanted = workspace.store.pointing(*parse_pointer(deployment.pointer))
    loaded: tuple[str, ...] = ()
    leads: dict[str, str | None] = {}
    problem = None
    try:
        with closing(Vllm(deployment.url, key)) as server:
            models = server.models()
        loaded = tuple(m.id for m in models if m.id.startswith(f"{deployment.pointer}:"))
        for url in deployment.gateways:
            with closing(RemoteGateway(url, gateway_key)) as gateway:
                leads[url] = gateway.leads(deployment.pointer)
    except (VllmUnreachable, VllmRefused, GatewayFailed) as error:
        problem = str(error)
    return Standing(deployment, wanted, loaded, leads, problem)
