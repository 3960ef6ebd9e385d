"""EigenLoRAx: cores are trained between the principal directions of adapters that are there.

Source: arXiv 2502.04700, which trains coefficients of both factors; these are bilinear, and their
means are not the product's mean. Here one core stands between both bases, ``B core A``, as in
Fed-SB: linear in what is trained, and exact when it is averaged. How the directions are found, and
what of the authors' code is left out, is told in :mod:`strategies.subspaces`. The authors start
from random coefficients, and so from a random change of the model; here the core starts at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from strategies.base import ALONE, Broadcast, ClientSpec, ServerState, Setting, Update
from strategies.cores import Cored, cored_layers
from strategies.fed_sb import FedSB
from strategies.library import BadLibrary, library_layers
from strategies.plugins import Range
from strategies.subspaces import Subspace, balanced, completed, extended, nothing
from strategies.tensors import CORE, Factors, Weighting, lora_tensors
from strategies.uplink import derived


@dataclass(frozen=True, slots=True)
class EigenLoRAx:
    """Clients train cores between principal directions of the library; the server averages them.

    The directions are found once, before round 1, from what the library's adapters change in each
    layer, whatever their ranks: as many as the adapter's rank, and where they have fewer, random
    ones orthogonal to them. Layers that the library has not keep their factors.

    A core that is there already (``start: continue``) is one more adapter, the first: its basis is
    extended by the library's, cut to the rank, and the core written in the new one.

    Attributes:
        energy: a layer's rank grows beyond the adapter's until its directions keep this share of
            the squared singular values of what they are found from, of columns and rows each, in
            (0, 1]; null keeps the adapter's rank.
        random: so many of a layer's directions are random at least, >= 0 and below its rank: what
            the library does not span can then be learned too.
        weighting: ``examples`` counts a client by its number of examples, ``uniform`` by 1,
            ``label:NAME`` by the number in its label.
    """

    energy: Annotated[float | None, Range(0, 1, open_low=True)] = None
    random: Annotated[int, Range(0)] = 0
    weighting: Weighting = "examples"

    starts: ClassVar[str] = "fresh"
    capabilities: ClassVar[frozenset[str]] = FedSB.capabilities | {"needs-library", "recycles"}
    mean_options: ClassVar[Mapping[str, Any]] = {}

    def init(self, adapter: Mapping[str, Tensor], setting: Setting = ALONE) -> ServerState:
        """Return the adapter with the library's directions as factors; as it is without a library.

        Tells how much of the library the directions keep, as a share of the squared singular values
        of its columns and rows: ``captured_energy`` and ``captured_energy/LAYER``; and of a core
        that was there, as ``carried_energy`` of the squared norm of its product.

        Raises:
            NotLowRank: if a layer of the adapter has no core.
            BadLibrary: if the library does not fit, or a rank leaves no place for its directions.
        """
        layers = cored_layers(adapter)
        if not setting.library:
            return ServerState(dict(adapter))
        made, metrics = dict(adapter), _Energy()
        for name, members in library_layers(setting.library, layers).items():
            own, rank = layers[name], len(layers[name].core)
            most = min(len(own.b), own.a.shape[1])
            if rank > most or self.random >= rank:
                raise BadLibrary(
                    f"layer {name!r} of shape {[len(own.b), own.a.shape[1]]} has rank {rank}, of "
                    f"which {self.random} directions are random; the rank must be at most its "
                    "smaller side, and above strategy.random"
                )
            spaces = _principal(own, members)
            if self.energy is not None:  # more directions, where these many keep too little
                wanted = max(space.rank_for(self.energy) for space in spaces)
                rank = min(most, max(rank, wanted + self.random))
            spaces = [space.cut(rank - self.random) for space in spaces]
            b, a = (
                completed(space.basis, rank, _generator(setting.seed, name, side))
                for space, side in zip(spaces, "ba", strict=True)
            )
            core = (b.T @ own.b.double()) @ own.core.double() @ (own.a.double() @ a)
            metrics.add(name, spaces, own, core)
            factors = Factors(_like(a.T, own.a), _like(b, own.b), own.scaling)
            made |= lora_tensors({name: factors}) | {name + CORE: _like(core, own.core)}
        return ServerState(made, metrics=metrics.all())

    def broadcast(self, state: ServerState, client: ClientSpec) -> Broadcast:
        """Return the adapter, of which the cores and the head are to be trained."""
        return FedSB(self.weighting).broadcast(state, client)

    def aggregate(self, state: ServerState, updates: Iterable[Update]) -> ServerState:
        """Return the state with averaged cores and head. The directions are the same tensors.

        Raises:
            BadUpdate: if the updates do not fit the adapter or each other.
        """
        return FedSB(self.weighting).aggregate(state, updates)


def _principal(own: Cored, members: Sequence[Factors]) -> list[Subspace]:
    """Return all principal directions of a layer's outputs, and those of its inputs."""
    spaces = nothing(len(own.b)), nothing(own.a.shape[1])
    if own.core.any():
        there = Factors(own.a, own.b.double() @ own.core.double(), own.scaling)
        up, down = balanced(there)
        spaces = extended(spaces[0], up), extended(spaces[1], down)
    both = zip(*map(balanced, members), strict=True)
    return [
        extended(space, torch.cat(parts, dim=1)) for space, parts in zip(spaces, both, strict=True)
    ]


class _Energy:
    """How much of what was there is kept."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[float, float]] = {}  # kept and total, by layer
        self._before = self._after = 0.0

    def add(self, name: str, spaces: Sequence[Subspace], own: Cored, core: Tensor) -> None:
        """Count a layer in; ``core`` is its own in the new directions, which are orthonormal."""
        kept = sum(space.kept for space in spaces)
        self._parts[name] = kept, kept + sum(space.lost for space in spaces)
        scale = float(own.scaling) ** 2
        left, right = (torch.linalg.qr(t.double(), mode="r").R for t in (own.b, own.a.T))
        self._before += scale * float((left @ own.core.double() @ right.T).square().sum())
        self._after += scale * float(core.square().sum())

    def all(self) -> dict[str, float]:
        """Return the metrics."""
        kept, total = (sum(part[i] for part in self._parts.values()) for i in range(2))
        shares = {f"captured_energy/{n}": _share(*part) for n, part in self._parts.items()}
        carried = {"carried_energy": _share(self._after, self._before)} if self._before else {}
        return {"captured_energy": _share(kept, total), **shares, **carried}


def _share(kept: float, total: float) -> float:
    return kept / total if total else 1.0


def _generator(seed: int, layer: str, side: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived(seed, f"eigenlorax/{layer}/{side}"))


def _like(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype).contiguous()
