"""The one door to the ``peft`` library: what its LoRA methods share.

A :class:`Method` is data: what to set in PEFT's config, and what is true of the result. The methods
are in ``lora.py`` (LoRA, rsLoRA, DoRA, with every initialisation) and, where one needs code, in a
module of its own. The tensors *are* the adapter: the same tensors on the same untouched base model,
over the same frozen tensors underneath, give the same function. What PEFT takes out of the base
weights (:mod:`clients.initialisations`, KaSA) lies underneath as an offset.

Of PEFT 0.21's ``LoraConfig``, left out are Arrow, a router over adapters that are finished,
QA-LoRA, for GPTQ weights, which weft does not load, and these settings:

* ``trainable_token_indices`` trains rows of an embedding, which is not a linear layer.
* ``layer_replication`` repeats layers of the base model, which makes it another base model.
* ``target_parameters`` adapts bare parameters, which are no layers that hooks and names go by.

Source: Hu et al., LoRA, arXiv 2106.09685; the other methods name theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from clients import lora_layers, placement
from clients.initialisations import InitInputs
from clients.lora_layers import AdapterMismatch
from strategies.base import Tensors
from strategies.plugins import BadOptions, Option, Plugin, Range

if TYPE_CHECKING:  # peft takes seconds to import: listing plug-ins does not need it
    from peft import LoraConfig

TRAINED, _UNDERLAY = "default", "underlay"
_FACTOR = re.compile(r"\.(lora_[AB]\.weight|scaling)$")


class UnsupportedUnderlay(ValueError):
    """This adapter cannot be trained on top of that one."""


@dataclass(frozen=True, slots=True)
class Method:
    """One of PEFT's methods.

    Attributes:
        name: PEFT's name, in kebab case.
        summary: one line.
        source: arXiv id.
        settings: what it sets in ``LoraConfig``.
        capabilities: see :attr:`clients.adapters.Adapter.capabilities`.
    """

    name: str
    summary: str
    source: str
    settings: Mapping[str, Any]
    capabilities: frozenset[str]


LOW_RANK = frozenset({"low-rank", "merge", "dp-taps"})


@dataclass(frozen=True, slots=True)
class PeftLora:
    """A method of PEFT's LoRA family, configured.

    Attaching gives it random first tensors of zero delta; :meth:`initialise` then gives it those
    that the method computes. ``write`` takes tensors of any rank: a layer gets the rank and the
    scaling that its tensors have, so that merged and mixed-rank adapters load as they are.

    Attributes:
        method: which of PEFT's methods.
        r: rank, at most the smaller side of every layer.
        alpha: numerator of the scaling ``alpha / r`` (rsLoRA: ``alpha / sqrt(r)``); by default
            each layer's rank, so that LoRA's scaling is 1.
        dropout: probability of dropping an input of ``A`` in training; 0 is none.
        target_modules: ``auto`` (PEFT's choice for the architecture, mostly query and value),
            ``all-linear`` (every linear layer but the output embedding), or module names: regular
            expressions of the last parts of their paths.
        exclude_modules: names, as in ``target_modules``, of modules among them to leave out.
        layers: indices of the layers to adapt, from 0; null adapts all.
        rank_pattern: module name, as in ``target_modules``, to another rank; the first counts.
        alpha_pattern: module name to another alpha; the first counts.
    """

    method: Method
    r: Annotated[int, Range(1)] = 8
    alpha: Annotated[float | None, Range(0, open_low=True)] = None
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    target_modules: str | list[str] = "auto"
    exclude_modules: list[str] = field(default_factory=list)
    layers: list[int] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for where, rank in {"r": self.r, **self.rank_pattern}.items():
            if rank < 1:
                raise BadOptions(f"the rank of {where} must be >= 1, got {rank}")
        for where, alpha in self.alpha_pattern.items():
            if alpha <= 0:
                raise BadOptions(f"the alpha of {where} must be > 0, got {alpha}")

    @property
    def capabilities(self) -> frozenset[str]:
        """What is true of the method; see :class:`Method`."""
        return self.method.capabilities

    @property
    def frozen(self) -> str:
        """Names of the tensors that never train; none."""
        return ""

    @property
    def drawn(self) -> bool | str:
        """How PEFT draws the tensors that attaching begins with; True is Kaiming, and B = 0."""
        return True

    def settings(self, targets: Mapping[str, nn.Module]) -> Mapping[str, Any]:
        """Return what the method sets in ``LoraConfig`` to adapt ``targets``.

        Raises:
            BadOptions: if an option does not fit them.
        """
        return self.method.settings

    def attach(self, backbone: nn.Module, underlay: Tensors) -> nn.Module:
        """Put a trainable adapter into ``backbone`` (in place), over a frozen ``underlay`` if any.

        The trained adapter's first tensors come from torch's global generator and are the same
        with and without an underlay. Adapter tensors are float32 whatever the base model is. The
        adapter is in the backbone's mode, training or not.

        Args:
            backbone: the base model.
            underlay: a low-rank adapter's tensors, of any layers and ranks; ``head.*`` is ignored.

        Returns:
            ``backbone`` itself.

        Raises:
            BadOptions: if a target does not exist, a rank exceeds its layer, or a layer is
                quantised and the adapter needs one that is not.
            UnsupportedUnderlay: if either adapter is not low-rank.
            AdapterMismatch: if the underlay does not fit the base model.
        """
        from peft import LoraModel

        linear = placement.linear_layers(backbone)
        below = self._layers_of(underlay, linear)
        targets = placement.targets(
            backbone, self.target_modules, self.layers, self.exclude_modules
        )
        self._refuse_quantised(targets)
        config = self._config(targets)
        try:
            tuner = LoraModel(backbone, config, TRAINED)
            if below:
                # Ranks and scalings come with the tensors, and the random numbers go nowhere.
                tuner.peft_config[_UNDERLAY] = _lora_config(below, r=1, init_lora_weights=False)
                with torch.random.fork_rng(devices=[]):
                    tuner.inject_adapter(backbone, _UNDERLAY)
                lora_layers.write(backbone, _UNDERLAY, underlay)
        except ValueError:
            self.detach(backbone)
            raise
        for layer in lora_layers.adapted(backbone).values():
            # set_adapter makes everything active trainable, so freezing comes after it.
            layer.set_adapter([_UNDERLAY, TRAINED] if below else [TRAINED])
            layer.train(backbone.training)  # a new module is in training mode
        for adapter in (TRAINED, _UNDERLAY):
            for name, parameter in lora_layers.parameters(backbone, adapter).items():
                trained = adapter == TRAINED and not re.fullmatch(self.frozen, name)
                parameter.requires_grad_(trained)
                parameter.data = parameter.data.float()  # PEFT makes DoRA's in the base's dtype
        return backbone

    def initialise(self, model: nn.Module, inputs: InitInputs) -> dict[str, Tensor]:
        """Keep the tensors that :meth:`attach` drew, over the base as it is."""
        return {}

    def factored(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the tensors themselves."""
        return dict(tensors)

    def detach(self, model: nn.Module) -> nn.Module:
        """Take every adapter out of ``model`` (in place) and return it, bit for bit as it was."""
        for name, layer in lora_layers.adapted(model).items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
        if hasattr(model, "peft_config"):
            del model.peft_config
        return model

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of the trained adapter's tensors, on the CPU, float32.

        ``NAME.lora_A.weight`` ``[rank, in_features]``, ``NAME.lora_B.weight`` ``[out_features,
        rank]``, ``NAME.scaling`` (0-d) and with DoRA ``NAME.lora_magnitude_vector``
        ``[out_features]``: the names of PEFT's files without their prefix.
        """
        tensors = {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in self.parameters(model).items()
        }
        for name, layer in lora_layers.adapted(model, TRAINED).items():
            tensors[name + lora_layers.SCALING] = torch.tensor(
                layer.scaling[TRAINED], dtype=torch.float32
            )
        return tensors

    def write(self, model: nn.Module, tensors: Tensors) -> None:
        """Put ``tensors`` into the trained adapter; ``head.*`` among them is ignored.

        Rank and scaling become those of ``tensors``. A parameter stays the same object unless its
        rank changes: take :meth:`parameters` afterwards.

        Raises:
            AdapterMismatch: if a tensor is missing, unexpected, or does not fit its layer; nothing
                is written then.
        """
        lora_layers.write(model, TRAINED, tensors)

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return None: the loss is the task's."""
        return None

    def refuse_batch(self, model: nn.Module, input_ids: Tensor) -> None:
        """Refuse nothing: any text teaches it."""

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the live parameters behind :meth:`read`, by the same names."""
        return lora_layers.parameters(model, TRAINED)

    def _refuse_quantised(self, targets: Mapping[str, nn.Module]) -> None:
        """Refuse quantised layers where PEFT would fail on them, or put plain LoRA there."""
        if "unquantised-base" not in self.capabilities:
            return
        for name, layer in targets.items():
            weight: Any = layer.weight
            if not weight.is_floating_point():
                raise BadOptions(
                    f"{self.method.name} (as set) needs a base model that is not quantised, and "
                    f"{name} is; choose another adapter or init, or quantization: none"
                )

    def _config(self, targets: Mapping[str, nn.Module]) -> LoraConfig:
        """Return PEFT's config with every layer's rank and alpha spelled out."""
        ranks = placement.by_pattern("rank_pattern", self.rank_pattern, targets, self.r)
        alphas = placement.by_pattern("alpha_pattern", self.alpha_pattern, targets, self.alpha)
        placement.check_ranks(ranks, targets)
        return _lora_config(
            targets,
            r=self.r,
            lora_alpha=self.alpha or self.r,
            lora_dropout=self.dropout,
            init_lora_weights=self.drawn,
            rank_pattern={_exactly(n): r for n, r in ranks.items() if r != self.r},
            alpha_pattern={
                _exactly(n): a or ranks[n]
                for n, a in alphas.items()
                if (a or ranks[n]) != (self.alpha or self.r)
            },
            **self.settings(targets),
        )

    def _layers_of(
        self, underlay: Tensors, linear: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """Return the layers of ``underlay``, which must be low-rank and of this base model."""
        names = sorted(lora_layers.without_head(underlay))
        if names and "low-rank" not in self.capabilities:
            raise UnsupportedUnderlay(
                f"{self.method.name} cannot be trained on top of a frozen adapter: its delta is "
                "not a product that adds to the one underneath; use lora or rslora, or start fresh"
            )
        for name in names:
            if not _FACTOR.search(name):
                raise UnsupportedUnderlay(
                    f"the adapter underneath has {name}, so its delta is not low-rank; only "
                    "adapters of lora_A, lora_B and scaling can be stacked on"
                )
        layers = sorted({_FACTOR.sub("", name) for name in names})
        for layer in layers:
            if layer not in linear:
                raise AdapterMismatch(
                    f"the adapter underneath has the layer {layer}, which the base model has not; "
                    "it belongs to another base model"
                )
        return {layer: linear[layer] for layer in layers}


def _exactly(name: str) -> str:
    """Return the pattern that PEFT matches with this layer and no other."""
    return f"^{re.escape(name)}"


def _lora_config(targets: Mapping[str, nn.Module], **settings: Any) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        target_modules="|".join(re.escape(name) for name in targets),
        fan_in_fan_out=placement.transposed(targets),
        **settings,
    )


def plugin(
    method: Method, kind: type[PeftLora] = PeftLora, options: Sequence[Option] = ()
) -> Plugin:
    """Return the plug-in of a method.

    Args:
        method: which.
        kind: its class; the fields are its options.
        options: those that a field's type alone does not describe, in place of the field's.
    """
    schema = Plugin("adapter", "", kind, "", context=("method",)).options
    own = {option.name: option for option in options}
    return Plugin(
        kind="adapter",
        name=method.name,
        factory=partial(kind, method),
        summary=method.summary,
        source=method.source,
        explicit_options=tuple(own.get(o.name, o) for o in schema.values()),
    )
