"""Several versions as cores in one basis: each stays a version of its own, and is loaded whole.

The basis is a version that is no adapter by itself; a core's parent of kind ``basis``, whose
tensors :meth:`storage.store.AdapterStore.tensors` gives with the core's own. What is loaded is the
version's product in the principal directions of all (:mod:`strategies.shared`), as a ``lora-sb``
adapter, and its head as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from clients.adapters import ADAPTERS
from clients.assignment import PluginChoice
from orchestrator.config import BadConfig, find_plugin
from orchestrator.merge_parts import Allow, Parts, parts_of
from orchestrator.merging import BadMerge, split_head
from orchestrator.recipes import merge_recipe
from orchestrator.workspace import Workspace
from storage.refs import check_name
from strategies.base import Tensors
from strategies.shared import InOneBasis, SharedLayer, share
from strategies.tensors import CORE, lora_layers, lora_tensors
from strategies.terms import Term, merge_terms, merged_factors

METHOD = "eigenlorax"
_CORED = "lora-sb"
_WHERE = ("target_modules", "layers", "exclude_modules")
_OF = "captured_energy_of/"


@dataclass(frozen=True, slots=True)
class Core:
    """A version in the basis.

    Attributes:
        of: id of the version that it is of.
        version: its own id.
        name: what it is called.
        energy: how much of the squared norm of what that version changes it keeps, 0 to 1.
        num_bytes: of its tensors, without the basis.
    """

    of: str
    version: str
    name: str
    energy: float
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Based:
    """Versions in one basis.

    Attributes:
        basis: its id.
        name: what it is called.
        num_bytes: of its tensors.
        bytes_before: of the tensors of the versions that the cores are of.
        cores: in the order of those.
    """

    basis: str
    name: str
    num_bytes: int
    bytes_before: int
    cores: tuple[Core, ...]

    @property
    def bytes_after(self) -> int:
        """Of the basis and all cores."""
        return self.num_bytes + sum(core.num_bytes for core in self.cores)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON."""
        return {**asdict(self), "bytes_after": self.bytes_after}


def in_one_basis(
    workspace: Workspace,
    refs: Sequence[str],
    options: Mapping[str, Any],
    into: str,
    allow: Allow = Allow(),  # noqa: B008  (frozen)
) -> Based:
    """Commit the basis of several versions and each of them in it, and name all of these.

    They are called ``INTO.basis`` and ``INTO.REF``, with ``-`` for what no name may have.

    Args:
        workspace: where.
        refs: at least two versions of one base model.
        options: of the merge ``eigenlorax``: ``rank`` or ``energy``.
        into: what their names begin with.
        allow: what else may be: different layers, what must be converted.

    Raises:
        BadMerge: if they do not belong together, or one changes what has no low rank.
        BadOptions: if an option is wrongly set.
        BadName: if a name is too long, or none.
        Unsigned: if the signature policy does not let one be loaded.
    """
    method = PluginChoice(METHOD, find_plugin("merge", METHOD).check(options))
    parts = parts_of(workspace, refs, allow)
    if parts.shapes:
        raise BadMerge(
            f"{min(parts.shapes)!r} is trained whole, and a basis is of low-rank layers; leave out "
            "the versions that train biases or modules"
        )
    names = _names(into, refs)
    layers = merge_terms(parts.vectors, [1.0] * len(refs))
    found = share(layers, **method.options)
    basis, cores = _tensors(layers, found, len(refs))
    rank = max(len(one.a) for one in lora_layers(basis).values())
    where = {k: v for k, v in parts.adapter["options"].items() if k in _WHERE}
    adapter = {"name": _CORED, "options": ADAPTERS.get(_CORED).check({**where, "r": rank})}
    store, recipes = workspace.store, {v.id: v.recipe for v in parts.versions}
    base = store.commit(
        basis,
        parents=dict.fromkeys(recipes, "recycle"),
        recipe={**_recipe(parts, recipes, method), "kind": "basis", "adapter": adapter},
        metrics={k: v for k, v in found.metrics.items() if not k.startswith(_OF)},
    )
    store.name(names[0], base)
    kept, before = [], 0
    for number, (version, name) in enumerate(zip(parts.versions, names[1:], strict=True)):
        whole = store.tensors(version.id)
        own = {**cores[number], **split_head(whole)[1]}
        energy = found.metrics.get(f"{_OF}{number}", 1.0)
        made = _recipe(parts, {version.id: version.recipe}, method)
        core = store.commit(
            own,
            parents={version.id: "merge", base: "basis"},
            recipe={**made, "adapter": adapter, "basis": base},
            metrics={"captured_energy": energy},
        )
        kept.append(Core(version.id, core, store.name(name, core), energy, _size(own)))
        before += _size(whole)
    return Based(base, f"{into}.basis", _size(basis), before, tuple(kept))


def _names(into: str, refs: Sequence[str]) -> list[str]:
    """Return what the basis is called, and each version in it.

    Raises:
        BadName, BadConfig: if one is no name, or two are one.
    """
    names = [f"{into}.{ref.replace(':', '-').replace('@', '-')}" for ref in ("basis", *refs)]
    for name in names:
        check_name("name", name)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BadConfig(f"two versions would be called {twice[0]!r}; give one of them by its id")
    return names


def _recipe(
    parts: Parts, recipes: Mapping[str, Mapping[str, Any]], method: PluginChoice
) -> dict[str, Any]:
    converted = {v: {"from": o.method} for v, o in parts.converted.items() if v in recipes}
    return merge_recipe(recipes, dict.fromkeys(recipes, 1.0), method, parts.stack, converted)


def _tensors(
    layers: Mapping[str, Sequence[Term]], found: InOneBasis, count: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the tensors of the basis, and of each version's cores in it."""
    basis: dict[str, Tensor] = {}
    cores: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, one in found.layers.items():
        rank = max(one.b.shape[1], len(one.a))
        factors = merged_factors(_wide(one.b, rank), _wide(one.a.T, rank).T, layers[name])
        basis |= lora_tensors({name: factors})
        for number, mine in enumerate(cores):
            mine[name + CORE] = _square(one, number, rank).to(factors.a.dtype)
    return basis, cores


def _wide(matrix: Tensor, rank: int) -> Tensor:
    """Return ``[features, k]`` with columns of zeros after it, ``[features, rank]``."""
    return torch.nn.functional.pad(matrix, (0, rank - matrix.shape[1]))


def _square(layer: SharedLayer, number: int, rank: int) -> Tensor:
    """Return a version's core ``[rank, rank]``; zeros where it has not the layer."""
    core = layer.cores.get(number, layer.b.new_zeros(0, 0))
    return torch.nn.functional.pad(core, (0, rank - core.shape[1], 0, rank - len(core)))


def _size(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
