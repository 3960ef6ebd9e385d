"""Base models: located, checked, loaded once, and resident in their process."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from clients import attention, mapped, placement
from clients.adapters import Adapter
from clients.assignment import ModelSpec
from clients.task_model import TaskModel, is_decoder
from clients.weights import ModelNotFound, UnsupportedBase, base_hash, locate

__all__ = [
    "Base",
    "BaseMismatch",
    "ModelNotFound",
    "TaskModel",
    "UnsupportedBase",
    "base_hash",
    "estimate",
    "load",
    "locate",
    "skeleton",
]

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BaseMismatch(ValueError):
    """The base model is not the one that the adapter was trained on."""


@dataclass(frozen=True, slots=True)
class Base:
    """A base model, loaded and frozen.

    Attributes:
        backbone: a transformers model: with its language head for ``causal-lm``, else the body
            alone. No parameter requires a gradient; its dropout is off.
        tokenizer: its tokenizer, with a padding token wherever it has an end token.
        spec: what was asked for.
    """

    backbone: Any
    tokenizer: Any
    spec: ModelSpec


_MOST_SHAPES = 256
_shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}
_resident: tuple[tuple[Any, ...], Base] | None = None
_loads = 0


def num_loads() -> int:
    """Return how many base models this process has loaded, the resident one included."""
    return _loads


def load(spec: ModelSpec, device: str = "cpu") -> Base:
    """Return the base model of ``spec``, from memory if it is the one this process loaded last.

    One model is resident in a process: loading another releases it. Specs that differ only in
    labels, pooling or length share one. The base model's own dropout is switched off, so that
    training mode computes what evaluation computes; an adapter's dropout is its own option.

    Args:
        spec: which model, and how; ``nf4`` needs CUDA, ``int8`` also runs (slowly) on CPUs.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ModelNotFound: if the files are not there.
        BaseMismatch: if ``spec.hash`` is set and the weights have another.
        UnsupportedBase: if weft does not load this model, or not in this way.
    """
    global _resident, _loads
    folder = locate(spec.id, spec.revision)
    found = base_hash(spec)
    if spec.hash and spec.hash != found:
        raise BaseMismatch(
            f"the base model at {folder} has hash {found[:12]}…, the adapter was trained on "
            f"{spec.hash[:12]}…; use the model, revision, quantization and compute_dtype that "
            "the adapter was trained with"
        )
    key = (folder, found, _auto_class(spec), spec.gradient_checkpointing, device)
    if _resident is None or _resident[0] != key:
        if _resident is not None:
            _resident = None
            gc.collect()  # modules are reference cycles: without this, two models are in memory
        _resident = key, Base(_backbone(spec, folder, device), _tokenizer(folder), spec)
        _loads += 1
    elif _resident[1].spec != spec:
        _resident = key, replace(_resident[1], spec=spec)
    return _resident[1]


def _backbone(spec: ModelSpec, folder: Path, device: str) -> Any:
    config = _config(spec, folder)
    options: dict[str, Any] = {
        "config": config,
        "dtype": _DTYPES[spec.compute_dtype],
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        **class_options(spec, config),
    }
    if spec.quantization != "none":
        options["quantization_config"] = _quantization(spec, device)
        options["device_map"] = {"": device}
    elif device == "cpu":
        body = "causal-lm" if spec.kind == "causal-lm" else "classification"
        key = f"{base_hash(spec)}-{body}"
        with quiet():
            folder = mapped.mappable(
                folder, options["dtype"], key, lambda: _pretrained(spec, folder, options)
            )
    model = _pretrained(spec, folder, options)
    if device == "cpu" and spec.compute_dtype != "float32":
        attention.attend_in_float32(model)
    if spec.quantization == "none":
        model.to(device)
    elif spec.quantization == "int8":
        for module in model.modules():
            if hasattr(module, "init_8bit_state"):
                module.register_forward_pre_hook(_return_scales)
    return _frozen(model, spec)


def _return_scales(layer: Any, inputs: tuple[Any, ...]) -> None:
    """Give an int8 layer the scales back that it is about to look for.

    On a CPU PEFT's DoRA puts a copy of the weight into the layer whenever it reads it. From a copy
    the layer takes its scales anew, and bitsandbytes copies none once they are in its state.
    """
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


def _pretrained(spec: ModelSpec, folder: Path, options: dict[str, Any]) -> Any:
    with quiet():
        try:
            model, info = _auto_class(spec).from_pretrained(folder, **options)
        except ImportError as error:
            raise UnsupportedBase(f"{spec.id} cannot be loaded here: {error}") from error
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise UnsupportedBase(
            f"{folder} lacks {len(lacking)} of the weights that a {type(model).__name__} needs "
            f"({lacking[0]}, …), which would be random; is kind {spec.kind!r} right for it?"
        )
    return model


def _frozen(model: Any, spec: ModelSpec) -> Any:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if spec.gradient_checkpointing:
        # Opacus' per-example hooks never fire under transformers' non-reentrant default, and the
        # reentrant form needs an input with a gradient to start from.
        try:
            model.activation_checkpointing_enable({"use_reentrant": True})
        except ValueError as error:
            raise UnsupportedBase(f"gradient_checkpointing: {error}") from error
        model.enable_input_require_grads()
    return model.eval()


def _config(spec: ModelSpec, folder: Path) -> Any:
    """Return the model's config with every dropout at 0 and no cache.

    Raises:
        UnsupportedBase: if the architecture does not suit ``spec.kind``.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedBase(f"{folder} has no config that is known here: {reason}") from error
    if config.is_encoder_decoder:
        raise UnsupportedBase(
            f"{spec.id} is an encoder-decoder ({config.model_type}); weft trains encoders and "
            "decoders: choose one of those"
        )
    if spec.kind == "causal-lm" and not is_decoder(config):
        raise UnsupportedBase(
            f"{spec.id} is an encoder ({config.model_type}): it sees the tokens it would have to "
            "predict; use kind 'classification', or a decoder"
        )
    for part in (config, *(p for p in vars(config).values() if hasattr(p, "model_type"))):
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    config.use_cache = False
    return config


def _auto_class(spec: ModelSpec) -> Any:
    return AutoModelForCausalLM if spec.kind == "causal-lm" else AutoModel


def class_options(spec: ModelSpec, config: Any) -> dict[str, Any]:
    """Return what transformers' class is told besides its config, to be what weft trains."""
    # weft pools by itself; BERT's pooler would be dead weight, and random where it is not saved.
    if spec.kind != "causal-lm" and type(config) in MODEL_MAPPING:
        parameters = inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
        return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
    return {}


def _quantization(spec: ModelSpec, device: str) -> Any:
    from transformers import BitsAndBytesConfig

    if spec.quantization not in ("nf4", "int8"):
        raise UnsupportedBase(
            f"quantization must be 'none', 'nf4' or 'int8', got {spec.quantization!r}"
        )
    try:
        import bitsandbytes  # noqa: F401  (transformers' own message does not name our extra)
    except ImportError as error:
        raise UnsupportedBase(
            f"quantization {spec.quantization!r} needs bitsandbytes, which is not installed; "
            "run: pip install 'weft[quantization]'"
        ) from error
    if spec.quantization == "nf4" and not device.startswith("cuda"):
        raise UnsupportedBase(
            f"quantization 'nf4' needs a CUDA device, got {device!r}: on CPUs bitsandbytes repacks "
            "the weights while it computes, and results change; use 'none' or 'int8' there"
        )
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_DTYPES[spec.compute_dtype],
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading report; what matters of it is checked after."""
    level, bar = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelNotFound(f"{folder} has no tokenizer that loads ({reason})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Without vocabulary files transformers makes a tokenizer that knows no word.
        raise ModelNotFound(f"{folder} has no tokenizer that loads (its vocabulary is missing)")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def estimate(spec: ModelSpec, adapter: Adapter) -> dict[str, int]:
    """Return what a run of ``adapter`` on ``spec`` holds and sends, without loading any weights.

    Returns:
        ``base_parameters`` and ``base_bytes`` (as held in memory, quantised or not),
        ``trainable_parameters`` (adapter and head) and ``adapter_bytes`` (float32, what a client
        receives in a round; it sends at most as many back).

    Raises:
        ModelNotFound: if there is no such model.
        UnsupportedBase: if it does not suit ``spec.kind``.
        strategies.plugins.BadOptions: if the adapter does not fit, such as by its rank.
    """
    backbone = skeleton(spec)
    output = backbone.get_output_embeddings()
    linear = {  # what bitsandbytes quantises
        f"{name}.weight"
        for name, module in placement.linear_layers(backbone).items()
        if module is not output
    }
    full = float(_DTYPES[spec.compute_dtype].itemsize)
    # nf4 keeps, besides half a byte, a one-byte scale for every 64 weights (double quantisation).
    width = {"none": full, "int8": 1.0, "nf4": 0.5 + 1 / 64}[spec.quantization]
    sizes = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    held = sum(n * (width if name in linear else full) for name, n in sizes.items())
    with torch.device("meta"):
        model = TaskModel(adapter.attach(backbone, {}), spec)
    trained = {**adapter.parameters(model.backbone), **model.head_parameters()}
    counts = {name: parameter.numel() for name, parameter in trained.items()}
    return {
        "base_parameters": sum(sizes.values()),
        "base_bytes": round(held),
        "trainable_parameters": sum(
            count for name, count in counts.items() if not re.fullmatch(adapter.frozen, name)
        ),
        "adapter_bytes": 4 * sum(counts.values()),
    }


def unshared(spec: ModelSpec) -> Any:
    """Return a base model of the caller's own, on the CPU, to be changed at will.

    In float32 and not quantised, whatever ``spec`` says; its hash is not asked for.

    Raises:
        ModelNotFound: if there is no such model.
        UnsupportedBase: if it does not suit ``spec.kind``.
    """
    folder = locate(spec.id, spec.revision)
    config = _config(spec, folder)
    options = {
        "config": config,
        "dtype": torch.float32,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        **class_options(spec, config),
    }
    return _frozen(_pretrained(spec, folder, options), spec)


def skeleton(spec: ModelSpec, *, whole: bool = False) -> Any:
    """Return the base model of ``spec`` without weights, on torch's meta device.

    Args:
        spec: the base model and the task.
        whole: with the parts that weft leaves out and others load, such as BERT's pooler.

    Raises:
        ModelNotFound: if there is no such model.
        UnsupportedBase: if it does not suit ``spec.kind``.
    """
    config = _config(spec, locate(spec.id, spec.revision))
    with torch.device("meta"), quiet():
        options = {} if whole else class_options(spec, config)
        return _auto_class(spec).from_config(config, **options)


def shapes(spec: ModelSpec, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that ``adapter`` (and the head) has, without any weights.

    Worked out once a process, while the model's configuration does not change.

    Raises:
        ModelNotFound, UnsupportedBase, strategies.plugins.BadOptions: as :func:`estimate`.
    """
    file = (locate(spec.id, spec.revision) / "config.json").resolve()
    if not file.is_file():
        return _shapes_of(spec, adapter)  # which says what is missing
    status = file.stat()
    key = (file, status.st_size, status.st_mtime_ns, spec, repr(adapter))
    if key not in _shapes:
        if len(_shapes) == _MOST_SHAPES:
            _shapes.clear()
        _shapes[key] = _shapes_of(spec, adapter)
    return dict(_shapes[key])


def _shapes_of(spec: ModelSpec, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"), quiet():
        model = TaskModel(adapter.attach(skeleton(spec), {}), spec)
        live = {**adapter.parameters(model.backbone), **model.head_parameters()}
    found = {name: tuple(parameter.shape) for name, parameter in live.items()}
    layers = {n.partition(".lora_")[0] for n in live if ".lora_" in n}
    return found | {f"{layer}.scaling": () for layer in sorted(layers)}


def tokenizer(spec: ModelSpec) -> Any:
    """Return the tokenizer of ``spec`` without its model.

    Raises:
        ModelNotFound: if there is none.
    """
    return _tokenizer(locate(spec.id, spec.revision))
