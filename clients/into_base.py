"""An adapter in the weights of its base model: a model of its own, which knows of no adapter.

Weights are summed in float32, tensor by tensor, and rounded once. What plain factors add is formed
one layer at a time from the base model's mapped files, so that no second copy of the model is in
memory; other methods are measured (:mod:`clients.linear_changes`) on one float32 copy. What was
written is loaded again and must compute what the adapter computes, or nothing is left.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
)

from clients import models, placement, shifts
from clients.adapters import ADAPTERS
from clients.agreement import Agreement, MergeIsOff, agreement, logits_of, task_model
from clients.assignment import ModelSpec, PluginChoice
from clients.base_factors import dequantized_weight
from clients.card import whole_card
from clients.conversion import Attached, NotConvertible, attached, attached_kept
from clients.export import FACTS, HEAD, check_head, plain, task_facts, write_json
from clients.tagger import Tagger, tagger_of
from strategies.base import Tensors
from strategies.tensors import Factors, lora_layers

SHARD_BYTES = 2 << 30
"""Of one weight file at most; what is written at once is in memory."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PLAIN = (".lora_A.weight", ".lora_B.weight", ".scaling")


class NotMergeable(ValueError):
    """This adapter cannot be put into the weights of its base model."""


@dataclass(frozen=True, slots=True)
class IntoBase:
    """How an adapter goes into the base model.

    Attributes:
        dtype: of the written weights.
        dequantize: whether a quantised base model may become one that is not.
    """

    dtype: Literal["bf16", "fp32"] = "bf16"
    dequantize: bool = False


@dataclass(frozen=True, slots=True)
class Trained:
    """What is to go into the base model.

    Attributes:
        spec: the base model and the task.
        choice: the method, and its options; ``lora`` of plain factors.
        tensors: adapter and head, by weft's names, or by PEFT's where ``config`` is given.
        config: PEFT's, of what was kept in its own format.
    """

    spec: ModelSpec
    choice: PluginChoice
    tensors: Tensors
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Sum:
    """A base model and what is added to it.

    Attributes:
        backbone: the base model.
        factors: by layer, products that are not in the weights yet.
        changes: of whole parameters, by weft's names.
        logits: what base model and adapter compute.
    """

    backbone: Any
    factors: Mapping[str, Factors]
    changes: Tensors
    logits: list[Tensor]


def merge_into_base(
    folder: Path, trained: Trained, wanted: IntoBase, card: str, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill an empty folder with the base model, the adapter in its weights.

    ``AutoModelForCausalLM``, or ``AutoModelForTokenClassification`` where it has weft's head, load
    it as it is. Of other classifiers it is the body, which ``AutoModel`` loads, beside
    ``head.safetensors``. Config and tokenizer are the base model's.

    Args:
        folder: where to; empty (:func:`clients.folders.whole_folder` makes it appear at once).
        trained: the adapter.
        wanted: how.
        card: what the model card says of the adapter, in Markdown.
        extra: further facts for ``weft.json``, such as the version's id; JSON types.

    Returns:
        What ``weft.json`` says.

    Raises:
        NotMergeable: if the adapter cannot go into the weights, with the reason.
        clients.agreement.MergeIsOff: if what was written does not compute the same.
        clients.export.NotExportable: if the head is not the task's.
        clients.models.ModelNotFound, clients.models.BaseMismatch: if the base model is not here.
    """
    spec = replace(trained.spec, gradient_checkpointing=False)
    trained = replace(trained, spec=spec)
    method = trained.choice.name
    if spec.quantization != "none" and not wanted.dequantize:
        raise _refused(
            method,
            f"its base model is quantised ({spec.quantization}); say --dequantize to write one "
            "that is not, several times as large",
        )
    head = {name: t for name, t in trained.tensors.items() if name.startswith("head.")}
    check_head(head, spec)
    tagger = tagger_of(spec) if spec.kind == "token-classification" else None
    with _summed(trained, head) as made:
        write_weights(folder, _named(made, method, tagger, head), _DTYPES[wanted.dtype])
        logits = made.logits
    _write_config(folder, spec, wanted, tagger)
    if head and tagger is None:
        save_file(plain(head), folder / HEAD, {"format": "pt"})
    agreed = _check(folder, trained, wanted, logits, tagger)
    facts = {
        **task_facts(folder, spec),
        "merged": {"dtype": wanted.dtype, **asdict(agreed)},
        **extra,
    }
    write_json(folder / FACTS, facts)
    text = whole_card(spec, facts, card, tagger is not None, _options(spec, wanted, tagger))
    (folder / "README.md").write_text(text, encoding="utf-8")
    return facts


def write_weights(
    folder: Path,
    tensors: Mapping[str, tuple[int, Callable[[], Tensor]]],
    dtype: torch.dtype,
    limit: int = SHARD_BYTES,
) -> None:
    """Write a model's weights as transformers does, one file's tensors in memory at a time.

    Args:
        folder: where to.
        tensors: by name, how many elements each has, and what makes it.
        dtype: of all that are floating.
        limit: bytes of one file; a larger tensor has one to itself.
    """
    shards: list[list[str]] = [[]]
    held = total = 0
    for name, (count, _) in tensors.items():
        size = count * dtype.itemsize
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held, total = held + size, total + size
    files = [_file(number, len(shards)) for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        found = {name: tensors[name][1]() for name in names}
        found = {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.items()}
        save_file(plain(found), folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {n: file for file, names in zip(files, shards, strict=True) for n in names}
        document = {"metadata": {"total_size": total}, "weight_map": index}
        write_json(folder / "model.safetensors.index.json", document)


def _file(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _refused(method: str, reason: str) -> NotMergeable:
    return NotMergeable(
        f"{method} cannot be merged into the base model: {reason}; export it without "
        "--merge-into-base"
    )


@contextmanager
def _summed(trained: Trained, head: Tensors) -> Iterator[_Sum]:
    own = {name: tensor for name, tensor in trained.tensors.items() if name not in head}
    if trained.config is None and all(n.endswith(_PLAIN) or shifts.SHIFT in n for n in own):
        yield _factored(trained, own, head)
        return
    try:
        with _opened(trained, own) as found:
            logits = logits_of(task_model(found.model, trained.spec, head), trained.spec)
            for layer, change in found.changes():
                adapted: Any = found.model.get_submodule(found.prefix + layer)
                _add(adapted.get_base_layer(), change)
            yield _Sum(found.detach(), {}, {}, logits)
    except NotConvertible as error:
        raise _refused(error.method, error.reason) from None


def _factored(trained: Trained, own: Tensors, head: Tensors) -> _Sum:
    """Return the base model that all share, and what is to be added."""
    spec = trained.spec
    backbone = models.load(spec).backbone
    adapter = ADAPTERS.get(trained.choice.name).build(**trained.choice.options)
    factors, changes = shifts.split(own)
    with torch.random.fork_rng(devices=[]):
        model = adapter.attach(backbone, {})
        try:
            adapter.write(model, own)
            logits = logits_of(task_model(model, spec, head), spec)
        finally:
            adapter.detach(model)
    return _Sum(backbone, lora_layers(factors), changes, logits)


@contextmanager
def _opened(trained: Trained, own: Tensors) -> Iterator[Attached]:
    """Yield a base model of one's own with the adapter in it, whole parameters changed already."""
    if trained.config is not None:
        with attached_kept(trained.spec, trained.config, own) as found:
            yield found
        return
    adapter, changes = shifts.split(own)
    options = trained.choice.options
    factors_only = {k: v for k, v in options.items() if k not in ("bias", "modules_to_save")}
    choice = PluginChoice(trained.choice.name, factors_only)
    with attached(trained.spec, choice, adapter) as found:
        live = {n.replace(".base_layer.", "."): p for n, p in found.model.named_parameters()}
        with torch.no_grad():
            for name, change in changes.items():
                live[name.replace(shifts.SHIFT, ".")].add_(change)
        yield found


def _add(layer: Any, change: Tensor) -> None:
    with torch.no_grad():
        layer.weight.add_(change.T if placement.transposed({"": layer}) else change)


def _named(
    made: _Sum, method: str, tagger: Tagger | None, head: Tensors
) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Return the tensors to write, by transformers' names: how large each is, and what makes it.

    Raises:
        NotMergeable: if a weight that changes is another layer's too.
    """
    state, prefix = made.backbone.state_dict(), "" if tagger is None else tagger.prefix
    own = {n for n, _ in made.backbone.named_parameters(remove_duplicate=False)}
    own |= {n for n, _ in made.backbone.named_buffers(remove_duplicate=False)}
    linear = {f"{n}.weight": layer for n, layer in placement.linear_layers(made.backbone).items()}
    changed = {f"{layer}.weight" for layer in made.factors}
    changed |= {name.replace(shifts.SHIFT, ".") for name in made.changes}
    found: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    first: dict[int, str] = {}
    for name in (n for n in state if n in own):  # bitsandbytes keeps its scales beside them
        tensor = state[name]
        owner = first.setdefault(tensor.data_ptr(), name)
        if owner == name:
            count = math.prod(placement.shape(linear[name])) if name in linear else tensor.numel()
            found[prefix + name] = count, partial(_merged, made, name, linear.get(name), tensor)
        elif changed & {owner, name}:
            raise _refused(method, f"{owner} and {name} are one tensor, and both would change")
    if tagger is not None:
        for name, tensor in head.items():
            found[f"{tagger.head}{name.removeprefix('head')}"] = tensor.numel(), tensor.clone
    return found


@torch.no_grad()
def _merged(made: _Sum, name: str, layer: Any, tensor: Tensor) -> Tensor:
    """Return a tensor of the base model with what is added to it; float32 where it changes.

    Args:
        made: base model and changes.
        name: of the tensor.
        layer: the linear layer whose weight it is, or None.
        tensor: as the base model has it, perhaps quantised.
    """
    if layer is not None and not tensor.is_floating_point():
        tensor = dequantized_weight(layer)
    owner, _, part = name.rpartition(".")
    if part == "weight" and owner in made.factors:
        a, b, scaling = made.factors[owner]
        product = (scaling.float() * b.float()) @ a.float()
        tensor = tensor.cpu().float() + (
            product.T if placement.transposed({"": layer}) else product
        )
    change = made.changes.get(f"{owner}{shifts.SHIFT}{part}")
    return tensor if change is None else tensor.cpu().float() + change


def _write_config(folder: Path, spec: ModelSpec, wanted: IntoBase, tagger: Tagger | None) -> None:
    """Write the base model's config, as of what is written now."""
    place = models.locate(spec.id, spec.revision)
    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    config.dtype = _DTYPES[wanted.dtype]
    if tagger is not None:
        config.architectures = [type(tagger.model).__name__]
        config.id2label = dict(enumerate(spec.labels))
        config.label2id = {label: number for number, label in enumerate(spec.labels)}
    config.save_pretrained(folder)
    generation = place / "generation_config.json"
    if spec.kind == "causal-lm" and generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


def _options(spec: ModelSpec, wanted: IntoBase, tagger: Tagger | None) -> str:
    """Return what the card's code tells ``from_pretrained`` besides the folder."""
    told = f", dtype={_DTYPES[wanted.dtype]}"
    return told + "".join(f", {k}={v}" for k, v in _class(spec, tagger)[1].items())


def _class(spec: ModelSpec, tagger: Tagger | None) -> tuple[Any, dict[str, Any]]:
    """Return the class that loads what is written, and what it is told."""
    if spec.kind == "causal-lm":
        return AutoModelForCausalLM, {}
    if tagger is not None:
        return AutoModelForTokenClassification, {}
    return AutoModel, models.class_options(spec, models.skeleton(spec).config)


def _check(
    folder: Path, trained: Trained, wanted: IntoBase, logits: list[Tensor], tagger: Tagger | None
) -> Agreement:
    """Load what was written, and compare what it computes with base model and adapter.

    Raises:
        MergeIsOff: if it is not the same.
    """
    spec = trained.spec
    auto, told = _class(spec, tagger)
    with models.quiet():
        written, info = auto.from_pretrained(
            folder, dtype=_DTYPES[wanted.dtype], output_loading_info=True, **told
        )
    if unlike := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise MergeIsOff(f"the written files and transformers' model differ in {unlike[0]}")
    head = load_file(folder / HEAD) if (folder / HEAD).exists() else {}
    found = logits_of(written.eval() if tagger else task_model(written, spec, head), spec)
    given = {n: t for n, t in trained.tensors.items() if n.startswith("head.")}
    plain = logits_of(task_model(models.load(spec).backbone, spec, given), spec)
    return agreement(found, logits, plain, spec, wanted.dtype)
