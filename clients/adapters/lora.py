"""LoRA, rsLoRA and DoRA, however they start: PEFT's own methods, by PEFT's own names.

Source: Hu et al., LoRA, arXiv 2106.09685; each method and initialisation names its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from clients import lora_layers, placement, shifts
from clients.adapters.peft import LOW_RANK, TRAINED, Method, PeftLora, plugin
from clients.base_factors import first_factors
from clients.initialisations import DRAWN, InitInputs, InitOption, checked_options, init_of
from strategies.base import Tensors
from strategies.plugins import BadOptions, Plugin

METHODS = (
    Method("lora", "Low-rank update B A beside each frozen layer.", "2106.09685", {}, LOW_RANK),
    Method(
        "rslora",
        "LoRA scaled by alpha / sqrt(rank), stable at high ranks.",
        "2312.03732",
        {"use_rslora": True},
        LOW_RANK,
    ),
    Method(
        "dora",
        "LoRA on the direction of each weight row, and a trained magnitude.",
        "2402.09353",
        {"use_dora": True},
        frozenset({"merge", "dp-vmap"}),
    ),
)


@dataclass(frozen=True, slots=True)
class Lora(PeftLora):
    """LoRA with a choice of first tensors.

    Attributes:
        init: how ``A`` and ``B`` start: ``kaiming`` and ``gaussian`` with B = 0, ``orthogonal``
            with both drawn from one orthogonal matrix and B A = 0 (needs an even rank). From the
            base weights: ``pissa``, ``pissa_niter_N`` (N iterations of a faster SVD), ``olora``.
            From data that everyone may see, the run's ``init_data``: ``eva``, ``corda``,
            ``lora_ga``. From what quantisation lost, on an nf4 base: ``loftq``.
        init_options: of the initialisation, by PEFT's names: ``rho``, ``tau`` and ``whiten`` of
            eva, ``corda_method`` of corda, ``direction``, ``scale`` and ``stable_gamma`` of
            lora_ga.
        bias: which biases of the base model train too: ``none``, ``lora_only`` (those of the
            adapted layers) or ``all``.
        modules_to_save: names, as in ``target_modules``, of modules whose parameters all train too,
            such as ``LayerNorm``. Of these and of biases the *change* is part of the adapter, see
            :mod:`clients.shifts`; it is no product, so such an adapter is not stacked; a
            merge sums it entry by entry.
    """

    init: str = "kaiming"
    init_options: Mapping[str, Any] = field(default_factory=dict)
    bias: Literal["none", "lora_only", "all"] = "none"
    modules_to_save: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        PeftLora.__post_init__(self)
        checked_options(self.init, self.init_options)
        for where, rank in {"r": self.r, **self.rank_pattern}.items():
            if self.init == "orthogonal" and rank % 2:
                raise BadOptions(
                    f"the rank of {where} must be even and >= 2 for init 'orthogonal', got {rank}"
                )
        drawn_or_zero = self.init in DRAWN or "zero-b" in init_of(self.init).traits
        if "low-rank" not in self.capabilities and not drawn_or_zero:
            raise BadOptions(
                f"init {self.init!r} starts with a product B A, and the delta of "
                f"{self.method.name} (as set) is more than that; use lora or rslora without bias "
                "and modules_to_save, or init 'kaiming'"
            )

    @property
    def capabilities(self) -> frozenset[str]:
        """What is true of the method and of how it starts."""
        own = self.method.capabilities | init_of(self.init).traits
        if not self._shifts:
            return own
        more = {"low-rank-and-shifts"} if "low-rank" in own else set()
        return own - LOW_RANK | {"merge", "dp-vmap"} | more

    @property
    def _shifts(self) -> bool:
        return self.bias != "none" or bool(self.modules_to_save)

    @property
    def drawn(self) -> bool | str:
        """How PEFT draws the tensors that attaching begins with."""
        return self.init if self.init in ("gaussian", "orthogonal") else True

    def attach(self, backbone: nn.Module, underlay: Tensors) -> nn.Module:
        """Put a trainable adapter into ``backbone``; see :meth:`PeftLora.attach`.

        Raises:
            BadOptions: also if ``bias`` or ``modules_to_save`` do not fit.
        """
        if not self._shifts:
            return PeftLora.attach(self, backbone, underlay)
        adapted = placement.targets(
            backbone, self.target_modules, self.layers, self.exclude_modules
        )
        wanted = shifts.places(backbone, adapted, self.bias, self.modules_to_save)
        model = PeftLora.attach(self, backbone, underlay)
        shifts.attach(wanted)
        return model

    def detach(self, model: nn.Module) -> nn.Module:
        """Take everything out of ``model`` again, which is then as it was, bit for bit."""
        shifts.detach(model)
        return PeftLora.detach(self, model)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the live parameters behind :meth:`read`, by the same names."""
        return {**PeftLora.parameters(self, model), **shifts.parameters(model)}

    def write(self, model: nn.Module, tensors: Tensors) -> None:
        """Put ``tensors`` into the adapter; see :meth:`PeftLora.write`.

        Raises:
            AdapterMismatch: if one is missing, unexpected, or does not fit; nothing is written.
        """
        factors, changes = shifts.split(tensors)
        shifts.check(model, changes)
        PeftLora.write(self, model, factors)
        shifts.write(model, changes)

    def initialise(self, model: nn.Module, inputs: InitInputs) -> dict[str, Tensor]:
        """Give the freshly attached adapter its first tensors; return what is taken from the base.

        Only this pays for an SVD of the weights: later rounds attach and :meth:`write`.

        Returns:
            The offset: factors by the base model's names, to lie frozen underneath from now on, as
            of a plain LoRA. Empty where the base stays whole.

        Raises:
            BadOptions: if the initialisation does not work on this base model or these data.
            clients.base_factors.NotSettled: if EVA does not converge.
        """
        if self.init in DRAWN:
            return {}
        options = checked_options(self.init, self.init_options)
        layers = lora_layers.adapted(model, TRAINED)
        made = first_factors(self.init, options, layers, TRAINED, inputs)
        self.write(model, {**self.read(model), **lora_layers.factor_tensors(made)})
        return lora_layers.offset_tensors(made) if "offset" in self.capabilities else {}


def plugins() -> Iterator[Plugin]:
    """Yield LoRA, rsLoRA and DoRA."""
    init = InitOption("init", str, "kaiming")
    for method in METHODS:
        yield plugin(method, Lora, [init])
