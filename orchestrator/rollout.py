"""A version onto a vLLM server: pushed, checked, switched to, and the one before it unloaded.

Nothing is remembered between the steps. Each looks at what is there (the folder, what the server
lists, where the gateways lead) and does what is missing, so that a rollout that was killed anywhere
is finished by the next. A model is unloaded only after every gateway leads elsewhere and none is
being answered by it any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clients.assignment import ModelSpec
from clients.export import public_id
from orchestrator.adapter_folders import leave, use
from orchestrator.bases import base_of
from orchestrator.deploying import parse_pointer
from orchestrator.deployments import Deployment, alone, forget, remember
from orchestrator.exporting import ForVllm, export
from orchestrator.manifest import BadManifest, NoManifest, check_manifest
from orchestrator.routes import Switch
from orchestrator.signing import admitted
from orchestrator.vllm import Served, Vllm
from orchestrator.workspace import Workspace
from storage.lineage import Version

_LOG = logging.getLogger(__name__)
_POLL_S = 0.1


class OtherBase(ValueError):
    """A server serves another base model than the one that an adapter was trained on."""


class FolderAltered(RuntimeError):
    """An exported adapter is not what it was when it was exported."""


@dataclass(frozen=True, slots=True)
class RolledOut:
    """What a rollout came to.

    Attributes:
        model: what answers for the alias at the server now.
        version: id of the version that it is.
        loaded: whether this rollout loaded it; it may have been there.
        unloaded: what was unloaded.
        left: what answered for the alias before and is still loaded: requests were still being
            answered by it, or there is no gateway that could tell. The next rollout looks again.
        removed: the folders of adapters that were removed: nobody serves them any more.
    """

    model: str
    version: str
    loaded: bool
    unloaded: tuple[str, ...]
    left: tuple[str, ...]
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rollout:
    """How an alias gets onto a server.

    Attributes:
        workspace: where the versions are.
        deployment: which alias, onto which server.
        vllm: the server.
        switches: the gateways that lead to it; none where requests name the model themselves.
        drain_s: seconds to wait for the requests that the one before is answering.
        pause: waits for so many seconds.
        model: where the base model lies here, if not where it was last seen.
    """

    workspace: Workspace
    deployment: Deployment
    vllm: Vllm
    switches: Sequence[Switch] = ()
    drain_s: float = 300.0
    pause: Callable[[float], None] = time.sleep
    model: str | None = None

    def run(self) -> RolledOut:
        """Bring the server and its gateways to where the alias points.

        Raises:
            BadPointer: if it is no alias.
            UnknownVersion: if there is no such alias.
            Unsigned: if the signature policy does not let the version out.
            orchestrator.exporting.NotServable: if vLLM cannot serve it, with the reason.
            clients.conversion.NotConvertible: if it cannot be converted.
            OtherBase: if the server serves another base model.
            FolderAltered: if its folder was exported before and is not that any more.
            orchestrator.vllm.VllmUnreachable, orchestrator.vllm.VllmRefused: if the server is not
                there, or does not take it; requests are answered as before.
            orchestrator.gateway_client.GatewayFailed: if a gateway cannot be switched; nothing is
                unloaded then.
        """
        parse_pointer(self.deployment.pointer)
        with alone(self.workspace.home, self.deployment):
            return self._run()

    def end(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Take the alias off the server: no gateway leads to it, and nothing of it is loaded.

        Without gateways nobody can tell whether it is still asked, and it is unloaded at once.
        Folders that nobody else serves are removed.

        Returns:
            What was unloaded, and what was not, because requests were still being answered by it;
            then the deployment is not forgotten.

        Raises:
            orchestrator.vllm.VllmUnreachable, orchestrator.vllm.VllmRefused: if the server is not
                there, or does not unload it.
            orchestrator.gateway_client.GatewayFailed: if a gateway goes on leading there; nothing
                is unloaded then.
        """
        wanted = self.deployment
        with alone(self.workspace.home, wanted):
            for switch in self.switches:
                switch.drop(wanted.pointer)
            unloaded, left = self._retire(self._loaded())
            if not self.switches:
                for model in left:
                    self.vllm.unload(model)
                unloaded, left = left, ()
            self._leave(left, spare=0)
            if not left:
                forget(self.workspace.home, wanted.pointer, wanted.url)
            return unloaded, left

    def _loaded(self) -> list[str]:
        """Return what the server has of this alias."""
        mine = f"{self.deployment.pointer}:"
        return [one.id for one in self.vllm.models() if one.id.startswith(mine)]

    def _run(self) -> RolledOut:
        wanted = self.deployment
        version = admitted(self.workspace, wanted.pointer)
        remember(self.workspace.home, wanted)
        spec = base_of(self.workspace, version, self.model)
        served = self.vllm.models()
        check_base(served, spec, wanted)
        name = wanted.model_of(version.id)
        missing = name not in {one.id for one in served}
        use(Path(wanted.adapters), wanted.folder_of(version.id), wanted.key)
        if missing:
            self.vllm.load(name, wanted.seen_at(self._folder(version)))
        self.vllm.probe(name)
        for switch in self.switches:
            switch.flip(wanted.pointer, name)
        unloaded, left = self._retire([one for one in self._loaded() if one != name])
        remember(self.workspace.home, replace(wanted, model=name, version=version.id))
        removed = self._leave([name, *left], spare=1)  # with which a rollback is quick
        return RolledOut(name, version.id, missing, unloaded, left, removed)

    def _leave(self, models: Sequence[str], spare: int) -> tuple[str, ...]:
        """Remove the folders of models that are served no more; one that cannot be costs space."""
        wanted = self.deployment
        used = [model.rpartition(":")[2] for model in models]
        try:
            return leave(Path(wanted.adapters), wanted.key, used, spare)
        except OSError as error:
            _LOG.warning("folders of %s are not removed: %s", wanted.pointer, error)
            return ()

    def _folder(self, version: Version) -> Path:
        """Return the folder of a version, exporting it if it is not there."""
        rank = self.deployment.rank
        folder = Path(self.deployment.adapters) / self.deployment.folder_of(version.id)
        if not folder.exists():
            export(self.workspace, version.id, folder, self.model, to=ForVllm(rank))
            return folder
        try:
            found = check_manifest(folder)
            problems = [*found.problems]
            if found.version != version.id:
                problems.append(f"it is version {found.version}")
        except (NoManifest, BadManifest) as error:
            problems = [str(error.args[0])]
        if problems:
            raise FolderAltered(
                f"{folder} is not what was exported: {problems[0]}; remove it, and deploy again"
            )
        return folder

    def _retire(self, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Unload the models that nobody is answered by any more; return them and the others."""
        unloaded: list[str] = []
        end = time.monotonic() + self.drain_s
        for model in models:
            while self.switches and any(switch.in_flight(model) for switch in self.switches):
                if time.monotonic() >= end:
                    break
                self.pause(_POLL_S)
            else:
                if self.switches:
                    self.vllm.unload(model)
                    unloaded.append(model)
        return tuple(unloaded), tuple(model for model in models if model not in unloaded)


def check_base(served: Sequence[Served], spec: ModelSpec, deployment: Deployment) -> None:
    """Refuse a server of another base model: of like shapes it would answer, and wrongly.

    Raises:
        OtherBase: if it is another.
    """
    wanted = deployment.base or public_id(spec)
    cached = "models--" + wanted.replace("/", "--")  # a folder in the Hub's cache
    bases = [one for one in served if one.is_base]
    for one in bases:
        if wanted in (one.id, one.root.rstrip("/")) or cached in Path(one.root).parts:
            return
    found = ", ".join(f"{one.id} ({one.root})" for one in bases) or "none"
    raise OtherBase(
        f"the adapter was trained on {wanted}, and {deployment.url} serves {found}; if that is the "
        "same model, say what it is called there with --base NAME"
    )
