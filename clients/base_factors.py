"""The first factors that PEFT's initialisations take from the base weights, or from data.

PEFT's own code computes them, on a scratch copy of one layer at a time: a float32 ``nn.Linear`` of
the weight as it computes (dequantised, not transposed, with the frozen adapter underneath folded
in). No base weight is touched, and what needs a plain weight works on a quantised base too. The
memory is that of the largest layer; LoRA-GA also holds one gradient of every adapted weight.

Random numbers (``pissa_niter_N``, LoRA-GA's truncated SVD) come from a fixed seed, so that the
result is a function of the weights and the data alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from clients.initialisations import InitInputs
from strategies.plugins import BadOptions

if TYPE_CHECKING:  # peft takes seconds to import
    from peft import LoraConfig

    from clients.data import Batch

_SCRATCH = "scratch"
_SEED = 0
_EVA_BATCH = 64  # examples whose tokens make one step of EVA's incremental SVD
_EVA_PASSES = 50


class NotSettled(RuntimeError):
    """EVA's directions keep turning, however often the data are read."""


class Factors(NamedTuple):
    """One layer's factors: ``scaling * b @ a``.

    Attributes:
        a: ``[rank, in_features]``.
        b: ``[out_features, rank]``.
        scaling: as the layer has it at this rank.
    """

    a: Tensor
    b: Tensor
    scaling: float


def first_factors(
    init: str,
    options: Mapping[str, Any],
    layers: Mapping[str, Any],
    adapter: str,
    inputs: InitInputs,
) -> dict[str, Factors]:
    """Return the first factors of every layer, float32, on the layer's device.

    The base weights are bit-identical afterwards.

    Args:
        init: one of :data:`clients.initialisations.INITS` that is not drawn.
        options: its options, checked.
        layers: PEFT's LoRA layers by the base model's names; they say rank and alpha.
        adapter: PEFT's name of the adapter among them that starts; its delta must be zero.
        inputs: where weights and data come from.

    Raises:
        BadOptions: if it cannot be computed on this base model or from these data.
        NotSettled: if EVA does not converge.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        if init == "eva":
            return _eva(layers, adapter, options, inputs)
        if init == "loftq":
            return {n: _loftq(n, layer, adapter, inputs) for n, layer in layers.items()}
        with _prepared(init, options, layers, adapter, inputs) as prepare:
            return {
                n: _by_peft(init, options, layer, adapter, prepare) for n, layer in layers.items()
            }


def minor_components(layer: Any, adapter: str) -> Factors:
    """Return the ``rank`` smallest singular components of a layer's weight, which KaSA takes out.

    Source: arXiv 2412.06071, eq. 5; PEFT truncates the base weight itself.

    Raises:
        BadOptions: if nothing would be left of the weight.
    """
    weight, rank = layer_weight(layer, adapter), layer.r[adapter]
    if rank >= min(weight.shape):
        raise BadOptions(
            f"kasa drops the rank's number of singular components: it must be below "
            f"{min(weight.shape)} (the layer is {list(weight.shape)}), got {rank}"
        )
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return Factors(vh[-rank:].contiguous(), u[:, -rank:] * s[-rank:], 1.0)


def residual_factors(weight: Tensor, dequantized: Tensor, rank: int, scaling: float) -> Factors:
    """Return the best factors of what quantisation lost: LoftQ (2310.08659), one step, T = 1.

    The delta ``scaling * b @ a`` is the nearest of this rank to ``weight - dequantized``. PEFT's
    own function leaves the scaling out, and is the same where it is 1.

    Args:
        weight: ``[out, in]``, before quantisation.
        dequantized: ``[out, in]``, as the quantised layer computes.
        rank: of the factors.
        scaling: of the layer, > 0.
    """
    from peft.utils.loftq_utils import _low_rank_decomposition

    lost = weight.to(dequantized.device, torch.float32) - dequantized.float()
    found = _low_rank_decomposition(lost, reduced_rank=rank)
    return Factors(found["R"], found["L"] / scaling, scaling)


def layer_weight(layer: Any, adapter: str) -> Tensor:
    """Return the frozen weight under ``adapter``, a float32 copy ``[out, in]``."""
    weight = dequantized_weight(layer.get_base_layer()).clone()
    for below in layer.lora_A:
        if below != adapter:
            weight += layer.get_delta_weight(below).float()
    # Conv1D, which GPT-2 has, keeps its weights transposed.
    return weight.T.contiguous() if _transposed(layer.get_base_layer()) else weight


def dequantized_weight(base: Any) -> Tensor:
    """Return what a linear layer multiplies with, float32, in the layer's own layout."""
    from peft.utils.integrations import dequantize_module_weight, get_bnb_param_type

    if get_bnb_param_type(base.weight) == "8bit":
        # PEFT looks for the scales where they are no longer after a first forward pass. What the
        # layer does to unit vectors is its columns.
        with torch.no_grad():
            columns: Tensor = base(torch.eye(base.in_features, device=base.weight.device)).float()
        return (columns if base.bias is None else columns - base.bias.float()).T
    weight: Tensor = dequantize_module_weight(base)
    return weight.detach().float()


def _transposed(base: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(base, Conv1D)


def _scratch(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


Prepare = Callable[[Any, nn.Linear], None]


def _by_peft(
    init: str, options: Mapping[str, Any], layer: Any, adapter: str, prepare: Prepare
) -> Factors:
    """Return what PEFT's own layer starts with on a scratch copy of ``layer``'s weight."""
    from peft.tuners.lora.layer import Linear

    rank, alpha = layer.r[adapter], layer.lora_alpha[adapter]
    config = _config(init, options, r=rank, lora_alpha=alpha, use_rslora=layer.use_rslora[adapter])
    scratch = _scratch(layer_weight(layer, adapter))
    prepare(layer, scratch)
    made = Linear(scratch, _SCRATCH, config, rank, alpha)
    a, b = made.lora_A[_SCRATCH].weight, made.lora_B[_SCRATCH].weight
    return Factors(a.detach().float(), b.detach().float(), made.scaling[_SCRATCH])


def _config(init: str, options: Mapping[str, Any], **settings: Any) -> LoraConfig:
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    own: dict[str, Any] = {
        "corda": lambda: {"corda_config": CordaConfig(**options)},
        "eva": lambda: {"eva_config": EvaConfig(**options)},
        "lora_ga": lambda: {"lora_ga_config": LoraGAConfig(**options)},
    }.get(init, dict)()
    return LoraConfig(init_lora_weights=init, **own, **settings)


def mean_gradients(
    layers: Mapping[str, Any], adapter: str, inputs: InitInputs
) -> dict[str, Tensor]:
    """Return the gradient of every adapted weight, ``[out, in]``, mean over the examples read.

    The base weights are bit-identical afterwards, and none keeps a gradient.

    Args:
        layers: PEFT's LoRA layers by the base model's names.
        adapter: PEFT's name of the adapter among them that starts; its delta must be zero.
        inputs: where data come from.

    Raises:
        BadOptions: if there are no data, or a layer has no gradient on them.
    """
    _read(inputs, 1, "gradient")
    with _prepared("lora_ga", {}, layers, adapter, inputs) as prepare:
        found = {}
        for name, layer in layers.items():
            marked: Any = _scratch(layer_weight(layer, adapter))
            prepare(layer, marked)
            found[name] = marked._peft_loraga_grad.float()
        return found


# --- what reads data --------------------------------------------------------------------------


def _measuring(
    init: str,
    options: Mapping[str, Any],
    layers: Mapping[str, Any],
    adapter: str,
    inputs: InitInputs,
) -> tuple[LoraConfig, dict[str, str]]:
    """Return PEFT's config for the base layers *within* the model, and their names there by ours.

    Measured in place, the frozen adapter underneath takes part and the new one, at zero, does not.
    """
    places = {id(module): name for name, module in inputs.model.named_modules()}
    named = {name: places[id(layer.get_base_layer())] for name, layer in layers.items()}
    pattern = "|".join(name.replace(".", r"\.") for name in named.values())
    ranks = {named[n].replace(".", r"\."): layer.r[adapter] for n, layer in layers.items()}
    config = _config(
        init, options, r=max(ranks.values()), target_modules=pattern, rank_pattern=ranks
    )
    return config, named


def _read(inputs: InitInputs, size: int, init: str) -> Sequence[Batch]:
    batches = inputs.batches(size)
    if not batches:
        raise BadOptions(f"init {init!r} reads data, and there are none; give the run init_data")
    return batches


@contextmanager
def _prepared(
    init: str,
    options: Mapping[str, Any],
    layers: Mapping[str, Any],
    adapter: str,
    inputs: InitInputs,
) -> Iterator[Prepare]:
    """Yield what puts the measurements of a layer on its scratch copy; forget them on leaving."""
    if init not in ("corda", "lora_ga"):
        yield lambda layer, scratch: None
        return
    config, _ = _measuring(init, options, layers, adapter, inputs)
    measured = {"corda": ("covariance_matrix", "sample_count"), "lora_ga": ("_peft_loraga_grad",)}
    try:
        if init == "corda":
            _measure_covariance(config, inputs)
            yield lambda layer, scratch: _take_covariance(layer, scratch, adapter, options)
        else:
            _measure_gradient(config, inputs)
            yield _take_gradient
    finally:
        for layer in layers.values():
            for name in measured[init]:
                vars(layer.get_base_layer()).pop(name, None)


def _measure_covariance(config: LoraConfig, inputs: InitInputs) -> None:
    from peft.tuners.lora.corda import calib_cov_distribution

    batches = _read(inputs, 1, "corda")  # PEFT's hook takes one unpadded text at a time

    def run() -> None:
        for batch in batches:
            inputs.model(batch)

    calib_cov_distribution(inputs.model, config, run, None, None)


def _take_covariance(
    layer: Any, scratch: nn.Linear, adapter: str, options: Mapping[str, Any]
) -> None:
    from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens

    marked: Any = scratch
    marked.covariance_matrix = layer.get_base_layer().covariance_matrix
    marked.corda_method = options["corda_method"]
    marked.rank = layer.r[adapter]
    alone = nn.ModuleDict({"layer": scratch})
    config = _config("corda", options, target_modules="layer")
    collect_eigens(alone, config, False)
    crop_corda_eigens(alone, config)


def _measure_gradient(config: LoraConfig, inputs: InitInputs) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    batches = _read(inputs, 1, "lora_ga")  # PEFT averages over backward passes: one an example

    def step() -> None:
        for batch in batches:
            torch.autograd.backward(inputs.losses(batch).mean())

    heads = {p: p.requires_grad for p in inputs.model.parameters()}
    with warnings.catch_warnings():
        # The first layer's input has no gradient, and only the calls of the hook are counted.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(inputs.model, config, step)
    for parameter, trained in heads.items():
        parameter.requires_grad_(trained)
        parameter.grad = None


def _take_gradient(layer: Any, scratch: nn.Linear) -> None:
    base = layer.get_base_layer()
    gradient = getattr(base, "_peft_loraga_grad", None)
    if gradient is None or not gradient.any():  # PEFT would draw random numbers without a word
        raise BadOptions(
            f"lora_ga: a layer of {base.weight.numel()} weights has no gradient on init_data; "
            "leave it out of target_modules, or give data that reach it"
        )
    marked: Any = scratch
    marked._peft_loraga_grad = gradient.T if _transposed(base) else gradient


def _eva(
    layers: Mapping[str, Any], adapter: str, options: Mapping[str, Any], inputs: InitInputs
) -> dict[str, Factors]:
    """Return EVA's A, the directions in which a layer's inputs vary most, over a zero B.

    With ``rho`` > 1 ranks move to the layers whose inputs need them. A layer that would get none
    keeps a rank of 1, with the A that was drawn: the adapter has the same layers everywhere.
    """
    from peft.tuners.lora.eva import _Hook, get_eva_state_dict

    config, named = _measuring("eva", options, layers, adapter, inputs)
    _check_components(layers, adapter, options["rho"])
    batches = _read(inputs, _EVA_BATCH, "eva")
    limit, calls = _EVA_PASSES * (len(batches) + 1), 0

    def forward(model: nn.Module, batch: Mapping[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls > limit:  # PEFT's own loop has no end
            raise NotSettled(
                f"eva has not settled after {_EVA_PASSES} passes over init_data; give more "
                "examples, a lower rank, or a lower init_options.tau"
            )
        model(batch["batch"])

    try:
        found = get_eva_state_dict(
            inputs.model,
            [_as_mapping(batch, inputs) for batch in batches],
            config,
            forward_fn=forward,
            show_progress_bar=False,
        )
    finally:
        for layer in layers.values():  # PEFT leaves its hooks behind where it fails
            hooks = layer.get_base_layer()._forward_hooks
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
    return {n: _with_rank(found[named[n]], layer, adapter) for n, layer in layers.items()}


def _check_components(layers: Mapping[str, Any], adapter: str, rho: float) -> None:
    for name, layer in layers.items():
        if round(layer.r[adapter] * rho) > layer.in_features:
            raise BadOptions(
                f"eva looks for rank x rho = {layer.r[adapter]} x {rho:g} directions, and {name} "
                f"has {layer.in_features} inputs; lower the rank or init_options.rho"
            )


def _as_mapping(batch: Batch, inputs: InitInputs) -> dict[str, Any]:
    """Return what PEFT looks at to leave out padding and, in language models, prompts."""
    seen = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "batch": batch}
    return seen if inputs.model.head is not None else {**seen, "labels": batch.labels}


def _with_rank(components: Tensor, layer: Any, adapter: str) -> Factors:
    """Return EVA's factors; alpha follows the rank, as with PEFT's ``adjust_scaling_factors``."""
    drawn = layer.lora_A[adapter].weight.detach()
    a = (components if len(components) else drawn[:1]).to(drawn.device, torch.float32)
    alpha = layer.lora_alpha[adapter] * len(a) / layer.r[adapter]
    scaling = alpha / (len(a) ** 0.5 if layer.use_rslora[adapter] else len(a))
    return Factors(a.contiguous(), a.new_zeros(layer.out_features, len(a)), scaling)


def _loftq(name: str, layer: Any, adapter: str, inputs: InitInputs) -> Factors:
    if len(layer.lora_A) > 1:
        raise BadOptions(
            "init 'loftq' restores what quantisation lost, and the adapter underneath may have "
            "restored it already; start afresh, or use another init"
        )
    base = layer.get_base_layer()
    weight = inputs.weight(f"{name}.weight")
    from transformers.pytorch_utils import Conv1D

    if getattr(base, "source_cls", None) is Conv1D:
        weight = weight.T
    held = dequantized_weight(base)
    return residual_factors(weight, held, layer.r[adapter], layer.scaling[adapter])
