"""Any adapter that adds to linear layers, as LoRA, with how much of it each layer keeps.

*Energy* is the share of the squared Frobenius norm of a layer's change that its low-rank product
keeps. The product of each rank is the nearest one (Eckart and Young).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clients import models, shifts
from clients.adapters import ADAPTERS
from clients.assignment import ModelSpec, PluginChoice
from clients.export import PEFT_PREFIX
from clients.linear_changes import NotLinear, linear_changes, weight_digests
from strategies.base import Tensors
from strategies.tensors import Factors, factored_svd, lora_layers, lora_tensors

ENERGY, LARGEST = 0.99, 64
"""Where no rank is asked for: the energy to keep in each layer, and the rank not to exceed."""

_NOT_LOADED = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
_ROUNDING = 1e-6  # relative, of singular values of float32
_ELSEWHERE = {
    "XLORA": "it routes between other adapters",
    "POLY": "it routes between adapters by the task",
    "ADAPTION_PROMPT": "it changes how attention is computed, and no weight",
    "SHADOW": "it is a network beside the base model",
}


class NotConvertible(ValueError):
    """This adapter cannot be written as LoRA.

    Args:
        method: the adapter's.
        reason: why.
    """

    def __init__(self, method: str, reason: str) -> None:
        super().__init__(f"{method} cannot be exported as LoRA: {reason}; export it without --as")
        self.method, self.reason = method, reason


@dataclass(frozen=True, slots=True)
class Attached:
    """A base model of one's own with an adapter in it, to be read layer by layer.

    Attributes:
        method: the adapter's.
        model: the base model, float32, in evaluation mode, with the adapter.
        prefix: of PEFT's before the base model's names.
        untouched: the base model's :func:`clients.linear_changes.weight_digests`.
        detach: takes the adapter out again and returns the base model, whose linear layers are
            the same objects all along.
    """

    method: str
    model: Any
    prefix: str
    untouched: Mapping[str, str]
    detach: Callable[[], Any]

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what :func:`clients.linear_changes.linear_changes` does.

        Raises:
            NotConvertible: if the adapter is no matrix that is added to linear layers.
        """
        try:
            yield from linear_changes(self.model, self.prefix, self.untouched)
        except NotLinear as reason:
            raise NotConvertible(self.method, str(reason)) from None


@dataclass(frozen=True, slots=True)
class Kept:
    """What LoRA keeps of one layer's change.

    Attributes:
        rank: of the product.
        energy: 0 to 1, the share of ``total`` that it keeps; 1 of no change.
        total: squared Frobenius norm of the change.
    """

    rank: int
    energy: float
    total: float


@dataclass(frozen=True, slots=True)
class Conversion:
    """An adapter as LoRA.

    Attributes:
        method: what it was before.
        tensors: ``lora_A``, ``lora_B`` and ``scaling`` (1) of each layer, by the base's names.
        layers: what is kept, by layer.
    """

    method: str
    tensors: dict[str, Tensor]
    layers: Mapping[str, Kept]

    @property
    def energy(self) -> float:
        """The share of all layers' squared norms that is kept, 0 to 1."""
        total = sum(layer.total for layer in self.layers.values())
        kept = sum(layer.energy * layer.total for layer in self.layers.values())
        return kept / total if total else 1.0

    def facts(self) -> dict[str, Any]:
        """Return what is kept of what, as JSON types."""
        layers = {n: {"rank": one.rank, "energy": one.energy} for n, one in self.layers.items()}
        return {"from": self.method, "energy": self.energy, "layers": layers}


def cut(method: str, adapter: Tensors, rank: int | None = None) -> Conversion:
    """Cut a low-rank adapter to a rank, from its factors; no product is formed.

    Args:
        method: its name.
        adapter: plain factors of every layer.
        rank: the most that a layer keeps, >= 1; None keeps all.
    """
    made = {}
    for name, factors in lora_layers(adapter).items():
        b = factors.b.double() * factors.scaling.item()
        u, s, vh = factored_svd(b, factors.a)
        keep = _rank(s.square(), rank, energy=1.0)
        made[name] = (u * s)[:, :keep], vh[:keep], s.square()
    return _conversion(method, made)


def convert(
    spec: ModelSpec, choice: PluginChoice, tensors: Tensors, rank: int | None = None
) -> Conversion:
    """Write an adapter of weft's as LoRA, whatever its method.

    Args:
        spec: the base model, not quantised.
        choice: the method, and its options.
        tensors: the adapter's, without a head.
        rank: the most that a layer gets, >= 1; None is the smallest that keeps :data:`ENERGY` of
            the layer, up to :data:`LARGEST`.

    Raises:
        NotConvertible: with the reason.
        clients.models.ModelNotFound, clients.models.BaseMismatch: if the base model is not here.
    """
    with attached(spec, choice, tensors) as made:
        return _converted(made, rank)


@contextmanager
def attached(spec: ModelSpec, choice: PluginChoice, tensors: Tensors) -> Iterator[Attached]:
    """Yield a base model of one's own with an adapter of weft's in it.

    Args:
        spec: the base model, not quantised.
        choice: the method, and its options.
        tensors: the adapter's, without a head.

    Raises:
        NotConvertible: if it acts from a token on, trains whole parameters, or the base model is
            quantised.
        clients.models.ModelNotFound, clients.models.BaseMismatch: if the base model is not here.
    """
    if any(name.endswith(".invocation") for name in tensors):
        raise NotConvertible(
            choice.name, "it acts from its invocation tokens on, and LoRA on all tokens"
        )
    if changed := sorted(name for name in tensors if shifts.SHIFT in name):
        raise NotConvertible(choice.name, f"it has {changed[0]}, the change of a whole parameter")
    base = _base(spec, choice.name)
    untouched = weight_digests(base)
    adapter = ADAPTERS.get(choice.name).build(**choice.options)
    with _alone():
        model = adapter.attach(base, {}).eval()
        adapter.write(model, tensors)
        yield Attached(choice.name, model, "", untouched, partial(adapter.detach, model))


def convert_kept(
    spec: ModelSpec, config: Mapping[str, Any], tensors: Tensors, rank: int | None = None
) -> Conversion:
    """Write an adapter that was kept in PEFT's own format as LoRA.

    Args:
        spec: the base model, not quantised.
        config: PEFT's.
        tensors: by PEFT's names.
        rank: as :func:`convert`.

    Raises:
        NotConvertible, clients.models.ModelNotFound, clients.models.BaseMismatch: as
            :func:`convert`.
    """
    with attached_kept(spec, config, tensors) as made:
        return _converted(made, rank)


@contextmanager
def attached_kept(
    spec: ModelSpec, config: Mapping[str, Any], tensors: Tensors
) -> Iterator[Attached]:
    """Yield a base model of one's own with an adapter in it that was kept in PEFT's own format.

    Args:
        spec: the base model, not quantised.
        config: PEFT's.
        tensors: by PEFT's names.

    Raises:
        NotConvertible: if PEFT does not load it, or its config is not of what linear layers add.
        clients.models.ModelNotFound, clients.models.BaseMismatch: if the base model is not here.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    method = str(config["peft_type"]).lower()
    given = _config(method, config)
    base = _base(spec, method)
    untouched = weight_digests(base)
    with _alone():
        try:
            model = get_peft_model(base, given).eval()
            set_peft_model_state_dict(model, dict(tensors))
        except _NOT_LOADED as error:
            reason = str(error).partition("\n")[0]
            raise NotConvertible(method, f"PEFT does not load it here ({reason})") from None
        missing = sorted(get_peft_model_state_dict(model).keys() ^ tensors.keys())
        if missing:
            raise NotConvertible(method, f"its file and its config differ in {missing[0]}")
        yield Attached(method, model, PEFT_PREFIX, untouched, model.unload)


def _converted(made: Attached, rank: int | None) -> Conversion:
    rank_of = partial(_rank, limit=rank)
    factors = {name: _nearest(change.double(), rank_of) for name, change in made.changes()}
    return _conversion(made.method, factors)


@contextmanager
def _alone() -> Iterator[None]:
    """Let PEFT draw the same numbers each time; the caller's generator stays as it was.

    PEFT's warnings are for who trains; what it could not do is checked afterwards.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(0)
        yield


def _config(method: str, config: Mapping[str, Any]) -> Any:
    """Return PEFT's config of an adapter.

    Raises:
        NotConvertible: if nothing that it can say is LoRA, or it names code or other files.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if config["peft_type"] in _ELSEWHERE:
        raise NotConvertible(method, _ELSEWHERE[config["peft_type"]])
    if config.get("task_type") not in (None, "CAUSAL_LM", "FEATURE_EXTRACTION"):
        raise NotConvertible(method, f"its task type {config['task_type']} brings a head with it")
    if str(config.get("bias", "none")) != "none":
        raise NotConvertible(
            method, f"bias is {config['bias']!r}: it trains the base model's own biases"
        )
    if config.get("arrow_config"):
        raise NotConvertible(method, _ELSEWHERE["XLORA"])
    if config.get("alora_invocation_tokens"):
        raise NotConvertible(
            method, "it acts from its invocation tokens on, and LoRA on all tokens"
        )
    if config.get("megatron_config"):
        raise NotConvertible(method, "it is for Megatron, whose module PEFT would import")
    plain = {k: v for k, v in config.items() if k not in ("auto_mapping", "runtime_config")}
    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]])}
    if unheard := sorted(key for key, value in plain.items() if value and key not in known):
        raise NotConvertible(method, f"PEFT here does not know its setting {unheard[0]}")
    try:
        given = PeftConfig.from_peft_type(**{**plain, "inference_mode": True})
    except (TypeError, ValueError) as error:
        raise NotConvertible(method, f"PEFT does not read its config here ({error})") from None
    if given.is_prompt_learning:
        raise NotConvertible(method, "it changes what the model is given, and no weight")
    return given


def _base(spec: ModelSpec, method: str) -> Any:
    if spec.quantization != "none":
        raise NotConvertible(
            method, f"what it adds depends on the {spec.quantization} weights of its base model"
        )
    found = models.base_hash(spec)
    if spec.hash and spec.hash != found:
        raise models.BaseMismatch(
            f"the base model at {models.locate(spec.id, spec.revision)} has hash {found[:12]}…, "
            f"the adapter was trained on {spec.hash[:12]}…; give that one with --model"
        )
    return models.unshared(replace(spec, gradient_checkpointing=False))


def _nearest(change: Tensor, rank_of: Callable[[Tensor], int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``b``, ``a`` and all squared singular values of ``change``, ``[out, in]``, float64.

    From the eigenvectors of the smaller Gram matrix, a fraction of the cost of the SVD. The product
    is the projection of ``change`` on them, so that at full rank it is ``change`` to rounding.
    """
    wide = change.shape[1] > change.shape[0]
    gram = change @ change.T if wide else change.T @ change
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    basis = vectors[:, : rank_of(squares)]
    factors = (basis, basis.T @ change) if wide else (change @ basis, basis.T)
    return (*factors, squares)


def _rank(squares: Tensor, limit: int | None, energy: float = ENERGY) -> int:
    """Return how many of the squared singular values, descending, to keep; at least 1."""
    real = int((squares > squares[0] * _ROUNDING**2).sum())
    if limit is not None:
        return max(1, min(real, limit))
    reached = squares.cumsum(0)
    enough = int((reached < energy * reached[-1]).sum()) + 1
    return max(1, real if energy == 1 else min(real, enough, LARGEST))


def _conversion(method: str, made: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> Conversion:
    factors, layers = {}, {}
    for name, (b, a, squares) in sorted(made.items()):
        rank, total = a.shape[0], float(squares.sum())
        one = torch.tensor(1.0)
        factors[name] = Factors(a.float().contiguous(), b.float().contiguous(), one)
        energy = min(1.0, float(squares[:rank].sum()) / total) if total else 1.0
        layers[name] = Kept(rank, energy, total)
    return Conversion(method, lora_tensors(factors), layers)
