"""Export: an adapter as the folder that PEFT, vLLM and the Hub load as it is."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from clients import placement, shifts
from clients.assignment import ModelSpec
from clients.base_columns import spelled_out
from clients.card import front_matter, model_card
from clients.models import load, skeleton
from clients.tagger import Tagger, tagger_of
from clients.task_model import pooling
from clients.weights import MINILM, hub_revision, locate
from strategies.base import Tensors

if TYPE_CHECKING:  # peft takes seconds to import
    from peft import BdLoraConfig, LoraConfig

_TENSOR = re.compile(
    r"(?P<layer>.+)\."
    r"(?P<part>lora_[AB]\.(weight|blocks)|lora_magnitude_vector|scaling|invocation)"
)
_TRAINING_ONLY = ".lora_monteclora_sampler."  # MonteCLoRA is used by its mean, which is A
PEFT_PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD, FACTS = "head.safetensors", "weft.json"
TASK_TYPE = {
    "classification": "FEATURE_EXTRACTION",
    "token-classification": "FEATURE_EXTRACTION",  # TOKEN_CLS where transformers has weft's head
    "causal-lm": "CAUSAL_LM",
}


class NotExportable(ValueError):
    """These tensors are not an adapter that PEFT has a file format for."""


def export_peft(
    folder: Path, *, tensors: Tensors, spec: ModelSpec, card: str, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Fill an empty folder with an adapter as PEFT has it.

    The folder computes what weft's own model computes: every layer keeps its own rank and scaling.
    Beside PEFT's two files it holds the tokenizer, ``weft.json``, for classification the head
    (``head.safetensors``), and a ``README.md`` with the code that loads it. The head over tags is
    among PEFT's tensors where ``AutoModelForTokenClassification`` has the same.

    Args:
        folder: where to; empty (:func:`clients.folders.whole_folder` makes it appear at once).
        tensors: adapter (and head) by weft's names, of any ranks and scalings.
        spec: the base model, with its revision, and the task.
        card: what the model card says of the adapter, in Markdown.
        extra: further facts for ``weft.json``, such as the version's id; JSON types.

    Returns:
        What ``weft.json`` says.

    Raises:
        NotExportable: if ``tensors`` are not an adapter of PEFT's LoRA family with the head that
            the task needs.
        clients.models.ModelNotFound: if the base model is not here: its tokenizer is needed.
    """
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
    check_head(head, spec)
    adapter = {name: tensor for name, tensor in tensors.items() if name not in head}
    tagger = tagger_of(spec) if spec.kind == "token-classification" else None
    named, config = peft_files(adapter, spec, tagger)
    if tagger is not None:
        named |= plain({f"{PEFT_PREFIX}{tagger.head}{n[4:]}": t for n, t in head.items()})
    save_file(named, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, config)
    if head and tagger is None:
        save_file(plain(head), folder / HEAD, {"format": "pt"})
    facts = {**task_facts(folder, spec), **extra}
    write_json(folder / FACTS, facts)
    (folder / "README.md").write_text(
        model_card(spec, facts, card, tagger is not None), encoding="utf-8"
    )
    return facts


def task_facts(folder: Path, spec: ModelSpec) -> dict[str, Any]:
    """Write the base model's tokenizer into ``folder``; return task and base for ``weft.json``.

    Raises:
        clients.models.ModelNotFound: if the base model is not here.
    """
    return {
        "kind": spec.kind,
        "labels": list(spec.labels),
        "pooling": _pooling(spec),
        "max_length": spec.max_length,
        **base_facts(folder, spec),
    }


def _pooling(spec: ModelSpec) -> str | None:
    if spec.kind != "classification":
        return None
    return pooling(spec, skeleton(spec, whole=True).config)


def peft_files(
    tensors: Tensors, spec: ModelSpec, tagger: Tagger | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter as PEFT's two files have it: tensors by PEFT's names, and the config.

    Args:
        tensors: by weft's names, without a head.
        spec: the base model.
        tagger: transformers' class around it that is adapted, or None for the body alone.

    Raises:
        NotExportable: if they are not an adapter of PEFT's LoRA family for this base model.
        clients.models.ModelNotFound: if the base model is not here.
    """
    factors, changes = shifts.split(spelled_out(tensors, spec))
    layered = _layers(factors)
    prefix = "" if tagger is None else tagger.prefix
    layers = {f"{prefix}{name}": parts for name, parts in layered.items()}
    whole = skeleton(spec, whole=True) if tagger is None else tagger.model
    config = _peft_config(layers, spec, placement.linear_layers(whole))
    saved: list[str] = []
    if tagger is not None:
        config.task_type, saved = "TOKEN_CLS", [tagger.head]
    named = _peft_tensors(layers)
    if changes:
        backbone = load(spec).backbone
        config.bias, modules = _trained_whole(backbone, changes, layered)
        saved += [f"{prefix}{name}" for name in modules]
        named |= _peft_parameters(shifts.sums(backbone, changes), layered, prefix)
    config.modules_to_save = saved or None
    return named, config.to_dict()


def _trained_whole(
    backbone: nn.Module, changes: Tensors, adapted: Collection[str]
) -> tuple[str, list[str]]:
    """Return PEFT's ``bias`` and ``modules_to_save`` for these changes of whole parameters."""
    parts: dict[str, set[str]] = {}
    for name in changes:
        layer, _, part = name.rpartition(shifts.SHIFT)
        parts.setdefault(layer, set()).add(part)
    whole = [
        layer
        for layer, found in parts.items()
        if found == {n for n, _ in backbone.get_submodule(layer).named_parameters(recurse=False)}
    ]
    biased = parts.keys() - set(whole)
    bias = "all" if biased - set(adapted) else "lora_only" if biased else "none"
    return bias, sorted(whole)


def _peft_parameters(changed: Tensors, adapted: Collection[str], prefix: str) -> dict[str, Tensor]:
    """Return whole parameters by PEFT's names; those of an adapted layer are within its wrapper."""
    found = {}
    for name, tensor in changed.items():
        layer, _, part = name.rpartition(".")
        inner = ".base_layer" if layer in adapted else ""
        found[f"{PEFT_PREFIX}{prefix}{layer}{inner}.{part}"] = tensor
    return plain(found)


def export_kept(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any],
    spec: ModelSpec,
    card: str,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Fill an empty folder with an adapter that was kept in PEFT's own format.

    Args:
        folder: where to; empty.
        tensors: by PEFT's names.
        config: PEFT's; the base model's place is put into it.
        spec: the base model.
        card: what the model card says of the adapter, in Markdown.
        extra: further facts for ``weft.json``; JSON types.

    Returns:
        What ``weft.json`` says.

    Raises:
        clients.models.ModelNotFound: if the base model is not here: its tokenizer is needed.
    """
    facts = {"kind": spec.kind, "labels": [], **base_facts(folder, spec), **extra}
    place = {"base_model_name_or_path": public_id(spec), "revision": hub_revision(spec)}
    save_file(plain(tensors), folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, {**config, **place})
    write_json(folder / FACTS, facts)
    front = front_matter(facts, spec.kind, str(config["peft_type"]).lower())
    (folder / "README.md").write_text(f"{front}{card.strip()}\n", encoding="utf-8")
    return facts


def base_facts(folder: Path, spec: ModelSpec) -> dict[str, Any]:
    """Write the base model's tokenizer into ``folder``; return both as ``weft.json`` names them.

    Raises:
        clients.models.ModelNotFound: if the base model is not here.
    """
    tokenizer = AutoTokenizer.from_pretrained(locate(spec.id, spec.revision))
    written = sorted(Path(name) for name in tokenizer.save_pretrained(folder))
    total = hashlib.sha256()
    for path in written:
        if path.is_file():  # some tokenizers name files that they do not write
            total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    base = {
        "id": public_id(spec),
        "revision": hub_revision(spec),
        "hash": spec.hash,
        "quantization": spec.quantization,
        "compute_dtype": spec.compute_dtype,
    }
    return {"base": base, "tokenizer": total.hexdigest()}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document`` so that equal documents give equal bytes."""
    # Sets (PEFT's target_modules) in order: the same adapter exports to the same bytes.
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, default=sorted)
    path.write_text(f"{text}\n", encoding="utf-8")


def public_id(spec: ModelSpec) -> str:
    """Return what others call the base model: a Hub id, or an absolute path."""
    if spec.id in ("builtin:minilm", "all-MiniLM-L6-v2"):
        return MINILM
    folder = Path(spec.id).expanduser()
    return str(folder.resolve()) if folder.is_dir() else spec.id


def check_head(head: Tensors, spec: ModelSpec) -> None:
    """Refuse a head that is not the one that the task needs.

    Raises:
        NotExportable: if it is not.
    """
    expected = [] if spec.kind == "causal-lm" else ["head.bias", "head.weight"]
    if sorted(head) != expected:
        raise NotExportable(
            f"a {spec.kind} adapter has the head {expected or 'none'}, this one has "
            f"{sorted(head) or 'none'}; a personal head stays at its client and cannot be exported"
        )
    for name, tensor in head.items():
        if tensor.shape[0] != len(spec.labels):
            raise NotExportable(
                f"{name} has {tensor.shape[0]} rows for {len(spec.labels)} labels "
                f"({', '.join(spec.labels)})"
            )


def _layers(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Return each layer's tensors by part, layers sorted by name, but for what only trains."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name in sorted(name for name in tensors if _TRAINING_ONLY not in name):
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise NotExportable(f"{name} has no place in PEFT's LoRA files")
        layers.setdefault(found["layer"], {})[found["part"]] = tensors[name]
    if not layers:
        raise NotExportable("there is no adapter among the tensors")
    with_magnitude = sum("lora_magnitude_vector" in parts for parts in layers.values())
    for layer, parts in layers.items():
        whole = {part.replace(".blocks", ".weight") for part in parts}
        lacking = {"lora_A.weight", "lora_B.weight", "scaling"} - whole
        if 0 < with_magnitude < len(layers):  # PEFT's config says it once for all layers
            lacking |= {"lora_magnitude_vector"} - set(parts)
        if lacking:
            raise NotExportable(f"{layer} lacks its {' and '.join(sorted(lacking))}")
    return layers


def _peft_tensors(layers: Mapping[str, Tensors]) -> dict[str, Tensor]:
    return plain(
        {
            f"{PEFT_PREFIX}{layer}.{part.replace('.blocks', '.weight')}": tensor
            for layer, parts in layers.items()
            for part, tensor in parts.items()
            if part not in ("scaling", "invocation")
        }
    )


def plain(tensors: Tensors) -> dict[str, Tensor]:
    """Return tensors as safetensors writes them: on the CPU, without gaps."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _peft_config(
    layers: Mapping[str, Tensors], spec: ModelSpec, linear: Mapping[str, nn.Module]
) -> LoraConfig:
    """Return PEFT's config: the most common rank and alpha, and where a layer differs.

    Alpha is what gives the layer its scaling at its rank, so that rsLoRA's and merged adapters'
    scalings need no flag that a reader might not know.
    """
    from peft import LoraConfig

    ranks = {layer: _rank(parts) for layer, parts in layers.items()}
    _check_fit(layers, linear)
    alphas = {layer: _alpha(layers[layer]["scaling"], rank) for layer, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        task_type=TASK_TYPE[spec.kind],
        base_model_name_or_path=public_id(spec),
        revision=hub_revision(spec),
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        target_modules=_target_modules(layers, linear),
        fan_in_fan_out=placement.transposed({layer: linear[layer] for layer in layers}),
        use_dora="lora_magnitude_vector" in next(iter(layers.values())),
        use_bdlora=_blocks(layers, linear),
        alora_invocation_tokens=_invocation(layers),
    )


def _rank(parts: Tensors) -> int:
    return parts["lora_A.blocks" if "lora_A.blocks" in parts else "lora_A.weight"].shape[0]


def _check_fit(layers: Mapping[str, Tensors], linear: Mapping[str, nn.Module]) -> None:
    for layer, parts in layers.items():
        if layer not in linear:
            raise NotExportable(f"the base model has no layer {layer}; the adapter is another's")
        out_features, in_features = placement.shape(linear[layer])
        rank = _rank(parts)
        for part, shape in (
            ("lora_A.weight", (rank, in_features)),
            ("lora_B.weight", (out_features, rank)),
        ):
            if part in parts and tuple(parts[part].shape) != shape:
                got = list(parts[part].shape)
                raise NotExportable(f"{layer}.{part} must be {list(shape)}, got {got}")


def _invocation(layers: Mapping[str, Tensors]) -> list[int] | None:
    """Return the tokens from which on the adapter acts, or None where it always does."""
    found = {
        tuple(parts["invocation"].tolist()) if "invocation" in parts else None
        for parts in layers.values()
    }
    if len(found) > 1:  # PEFT's config says it once for all layers
        raise NotExportable("the layers have different invocations; one adapter has one")
    (ids,) = found
    return None if ids is None else list(ids)


def _blocks(layers: Mapping[str, Tensors], linear: Mapping[str, nn.Module]) -> BdLoraConfig | None:
    """Return which layers have a block-diagonal factor, or None where none has."""
    from peft import BdLoraConfig

    side_a = {n: p["lora_A.blocks"] for n, p in layers.items() if "lora_A.blocks" in p}
    side_b = {n: p["lora_B.blocks"] for n, p in layers.items() if "lora_B.blocks" in p}
    if not side_a and not side_b:
        return None
    counts = {n: placement.shape(linear[n])[1] / t.shape[1] for n, t in side_a.items()}
    counts |= {n: _rank(layers[n]) / t.shape[1] for n, t in side_b.items()}
    if len(set(counts.values())) > 1:  # PEFT's config says it once for all layers
        raise NotExportable(f"the layers have different numbers of blocks: {counts}")
    return BdLoraConfig(
        target_modules_bd_a=sorted(side_a),
        target_modules_bd_b=sorted(side_b),
        nblocks=int(next(iter(counts.values()))),
        match_strict=False,
    )


def _alpha(scaling: Tensor, rank: int) -> float:
    """Return the alpha that gives ``scaling`` at ``rank``: a whole number where one does."""
    alpha = float(scaling) * rank
    whole = round(alpha)
    same = torch.tensor(whole / rank, dtype=torch.float32) == scaling.float()
    return whole if same else alpha


def _target_modules(layers: Mapping[str, Tensors], linear: Mapping[str, nn.Module]) -> list[str]:
    """Return the short names of the layers where these reach no other, else the full names."""
    endings = {layer.rpartition(".")[2] for layer in layers}
    reached = {name for name in linear if name.rpartition(".")[2] in endings}
    return sorted(endings if reached == set(layers) else layers)
