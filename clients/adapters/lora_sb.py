"""LoRA-SB: an r x r core is trained between two frozen factors.

Source: Initialization using update approximation, arXiv 2411.19557; the parameterisation is that of
LoRA-XS, arXiv 2405.17604. A layer changes by ``scaling * B core A``. With orthonormal columns of B
and rows of A the core's gradient is the best approximation of the weight's in their span, and the
Frobenius norm of the change is ``scaling * |core|``. What can be learned is decided by the span.

``init`` decides it. ``orthogonal`` draws it by the run's seed, over a core of zeros: it costs no
privacy. ``gradient`` is the paper's: B and A are the leading singular vectors of ``-sign(G)``, with
G the base weight's gradient over ``init_data``, which everyone may see, and the core starts with
``init_step`` times the singular values: the best approximation of one step of Adam. That step is
learned and stays in the adapter; nothing lies underneath. The authors' code keeps the singular
vectors in bfloat16, where they are orthonormal to a hundredth; here everything is float32. Their
truncated SVD is a randomised one; here it is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from clients import lora_layers
from clients.adapters.peft import LOW_RANK, TRAINED, Method, PeftLora, plugin
from clients.base_factors import mean_gradients
from clients.initialisations import InitInputs
from clients.lora_layers import CORE, B
from strategies.base import Tensors
from strategies.plugins import BadOptions, Plugin, Range

LORA_SB = Method(
    "lora-sb",
    "An r x r core trained between two frozen orthonormal factors.",
    "2411.19557",
    {},
    LOW_RANK,
)


@dataclass(frozen=True, slots=True)
class LoraSB(PeftLora):
    """LoRA with a core: ``NAME.lora_core.weight`` ``[rank, rank]`` between frozen factors.

    Clients share both factors, so that the mean of their products is the product of their mean.

    Attributes:
        init: ``orthogonal`` (drawn) or ``gradient`` (from the run's ``init_data``).
        init_step: with ``gradient``, what the core starts with: so much of the step that the
            singular values are, >= 0; the learning rate in the paper. 0 starts from the base model.
    """

    init: Literal["orthogonal", "gradient"] = "orthogonal"
    init_step: Annotated[float, Range(0)] = 0.0

    def __post_init__(self) -> None:
        PeftLora.__post_init__(self)
        if self.init_step and self.init != "gradient":
            raise BadOptions(
                f"init_step is a step along the gradient, got {self.init_step:g} with init "
                f"{self.init!r}; set init: gradient or leave init_step out"
            )

    @property
    def capabilities(self) -> frozenset[str]:
        """What is true of the method and of how it starts."""
        reads = {"reads-data", "unquantised-base"} if self.init == "gradient" else set()
        # what starts with a product may not be given another subspace before round 1
        return self.method.capabilities | reads | (set() if self.init_step else {"zero-b"})

    @property
    def frozen(self) -> str:
        """Names of the tensors that never train: both factors."""
        return r".*\.lora_[AB]\.weight"

    def attach(self, backbone: nn.Module, underlay: Tensors) -> nn.Module:
        """Put a trainable adapter into ``backbone`` (in place); see :class:`PeftLora`."""
        model = PeftLora.attach(self, backbone, underlay)
        for layer in lora_layers.adapted(model, TRAINED).values():
            nn.init.normal_(layer.lora_B[TRAINED].weight)  # PEFT's is zero; see initialise
            put_core(layer, Core())
        return model

    def initialise(self, model: nn.Module, inputs: InitInputs) -> dict[str, Tensor]:
        """Make both factors orthonormal, from what was drawn or from the gradient.

        Costs a QR of both factors, or an SVD of every adapted weight's gradient.

        Raises:
            BadOptions: with ``gradient``, if there are no data, or a layer has no gradient on them.
        """
        layers = lora_layers.adapted(model, TRAINED)
        gradients = mean_gradients(layers, TRAINED, inputs) if self.init == "gradient" else {}
        for name, layer in layers.items():
            down, up = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
            with torch.no_grad():
                if name not in gradients:
                    down.copy_(_orthonormal(down.T).T)
                    up.copy_(_orthonormal(up))
                    continue
                b, s, a = leading(-torch.sign(gradients[name]), len(down))
                down.copy_(a)
                up.copy_(b)
                step = s * self.init_step / layer.scaling[TRAINED]
                layer.lora_core[TRAINED].weight.copy_(torch.diag(step))
        return {}

    def factored(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return the same delta as plain factors: the core goes into B."""
        found = {n: t for n, t in tensors.items() if not n.endswith(CORE)}
        for name in tensors.keys() - found.keys():
            up = name.removesuffix(CORE) + B
            found[up] = tensors[up] @ tensors[name]
        return found


def put_core(layer: Any, variant: Core) -> None:
    """Give one of PEFT's layers a core of zeros between the trained adapter's factors."""
    down = layer.lora_A[TRAINED].weight
    core = nn.Linear(len(down), len(down), bias=False, device=down.device)
    nn.init.zeros_(core.weight)
    layer.lora_core = nn.ModuleDict({TRAINED: core.train(layer.training)})
    layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_core")
    layer.lora_variant[TRAINED] = variant


class Core:
    """What PEFT's layer asks of a variant, for a core between its factors.

    Every product is an ``nn.Linear``'s, so that hooks see each of them.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Return ``result + scaling * B core A x``."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        hidden = down(module.lora_dropout[active_adapter](x.to(down.weight.dtype)))
        delta: Tensor = up(module.lora_core[active_adapter](hidden))
        changed: Tensor = result + (delta * module.scaling[active_adapter]).to(result.dtype)
        return changed

    @staticmethod
    def _delta(module: Any, adapter: str) -> Tensor:
        core = module.lora_core[adapter].weight
        product = module.lora_B[adapter].weight @ core @ module.lora_A[adapter].weight
        delta: Tensor = (product.T if module.fan_in_fan_out else product) * module.scaling[adapter]
        return delta.detach()

    @classmethod
    def merge_safe(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the delta."""
        return orig_weight + cls._delta(module, active_adapter).to(orig_weight.dtype)

    @classmethod
    def merge_unsafe(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the delta to the weight, in place."""
        orig_weight.data += cls._delta(module, active_adapter).to(orig_weight.dtype)

    @classmethod
    def unmerge(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight without the delta."""
        return orig_weight - cls._delta(module, active_adapter).to(orig_weight.dtype)


def _orthonormal(drawn: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of ``drawn``, ``[rows, rank]``, signs canonical.

    A normal draw's basis is uniform over all subspaces.
    """
    q, r = torch.linalg.qr(drawn.double())
    basis: Tensor = q * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    return basis


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` leading singular triples of ``matrix``, ``[out, in]``.

    The entry of largest magnitude of each row of the last is positive.

    Returns:
        ``[out, rank]``, ``[rank]`` descending and ``[rank, in]``, in float64.
    """
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    peaks = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0)
    return u * signs.T, s, vh * signs


def plugins() -> Iterator[Plugin]:
    """Yield LoRA-SB."""
    yield plugin(LORA_SB, LoraSB)
