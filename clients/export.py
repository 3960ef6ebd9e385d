"""Export: an adapter as the folder that PEFT, vLLM and the Hub load as it is."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from clients import placement
from clients.assignment import ModelSpec
from clients.models import skeleton
from clients.task_model import pooling
from clients.weights import MINILM, locate
from strategies.base import Tensors

if TYPE_CHECKING:  # peft takes seconds to import
    from peft import BdLoraConfig, LoraConfig

_TENSOR = re.compile(
    r"(?P<layer>.+)\."
    r"(?P<part>lora_[AB]\.(weight|blocks)|lora_magnitude_vector|scaling|invocation)"
)
_TRAINING_ONLY = ".lora_monteclora_sampler."  # MonteCLoRA is used by its mean, which is A
_PEFT_PREFIX = "base_model.model."
_TASK_TYPE = {"classification": "FEATURE_EXTRACTION", "causal-lm": "CAUSAL_LM"}


class FolderTaken(FileExistsError):
    """The folder to export to holds something already."""


class NotExportable(ValueError):
    """These tensors are not an adapter that PEFT has a file format for."""


def export_peft(
    folder: Path,
    *,
    tensors: Tensors,
    spec: ModelSpec,
    base_revision: str | None,
    card: str,
    extra: Mapping[str, Any],
) -> list[Path]:
    """Write an adapter as a PEFT folder, whole or not at all.

    The folder computes what weft's own model computes: every layer keeps its own rank and scaling.
    Beside PEFT's two files it holds the tokenizer, ``weft.json``, for classification the head
    (``head.safetensors``), and a ``README.md`` with the code that loads it.

    Args:
        folder: where to; it must not exist or be empty.
        tensors: adapter (and head) by weft's names, of any ranks and scalings.
        spec: the base model and the task.
        base_revision: the Hub's revision of the base model that the adapter was trained on.
        card: what the model card says of the adapter, in Markdown.
        extra: further facts for ``weft.json``, such as the version's id; JSON types.

    Returns:
        The files, sorted.

    Raises:
        FileExistsError: if ``folder`` has something in it.
        NotExportable: if ``tensors`` are not an adapter of PEFT's LoRA family with the head that
            the task needs.
        clients.models.ModelNotFound: if the base model is not here: its tokenizer is needed.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderTaken(f"{folder} is not empty; give a folder that is, or that is not there")
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
    _check_head(head, spec)
    layers = _layers({name: tensor for name, tensor in tensors.items() if name not in head})
    base = skeleton(spec, whole=True)
    config = _peft_config(layers, spec, base_revision, placement.linear_layers(base))
    facts = {
        "kind": spec.kind,
        "labels": list(spec.labels),
        "pooling": pooling(spec, base.config) if head else None,
        "max_length": spec.max_length,
        "base": {"id": _public_id(spec), "revision": base_revision, "hash": spec.hash},
        **extra,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch) / "export"  # not scratch itself, which only its owner may read
        made.mkdir()
        save_file(_peft_tensors(layers), made / "adapter_model.safetensors", {"format": "pt"})
        _write_json(made / "adapter_config.json", config.to_dict())
        _write_json(made / "weft.json", facts)
        if head:
            save_file(_plain(head), made / "head.safetensors", {"format": "pt"})
        tokenizer = AutoTokenizer.from_pretrained(locate(spec.id, spec.revision))
        tokenizer.save_pretrained(made)
        (made / "README.md").write_text(_model_card(spec, facts, card), encoding="utf-8")
        made.replace(folder)  # one rename, which an empty folder gives way to
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    # Sets (PEFT's target_modules) in order: the same adapter exports to the same bytes.
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, default=sorted)
    path.write_text(f"{text}\n", encoding="utf-8")


def _public_id(spec: ModelSpec) -> str:
    """Return what others call the base model: a Hub id, or an absolute path."""
    if spec.id in ("builtin:minilm", "all-MiniLM-L6-v2"):
        return MINILM
    folder = Path(spec.id).expanduser()
    return str(folder.resolve()) if folder.is_dir() else spec.id


def _check_head(head: Tensors, spec: ModelSpec) -> None:
    expected = ["head.bias", "head.weight"] if spec.kind == "classification" else []
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
    return _plain(
        {
            f"{_PEFT_PREFIX}{layer}.{part.replace('.blocks', '.weight')}": tensor
            for layer, parts in layers.items()
            for part, tensor in parts.items()
            if part not in ("scaling", "invocation")
        }
    )


def _plain(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _peft_config(
    layers: Mapping[str, Tensors],
    spec: ModelSpec,
    base_revision: str | None,
    linear: Mapping[str, nn.Module],
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
        task_type=_TASK_TYPE[spec.kind],
        base_model_name_or_path=_public_id(spec),
        revision=base_revision,
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


_POOLING = {
    "mean": "(hidden * mask).sum(1) / mask.sum(1)",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), mask.squeeze(-1).sum(1).long() - 1]",
}
_LOAD = """\
import torch
from peft import PeftConfig, PeftModel
from transformers import {auto}, AutoTokenizer{imports}

folder = "."  # this folder
config = PeftConfig.from_pretrained(folder)
base = {auto}.from_pretrained(
    config.base_model_name_or_path, revision=config.revision{options}
)
model = PeftModel.from_pretrained(base, folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
_CLASSIFY = """\
import json
from pathlib import Path

from safetensors.torch import load_file

labels = json.loads(Path(folder, "weft.json").read_text(encoding="utf-8"))["labels"]
head = load_file(f"{{folder}}/head.safetensors")

texts = ["a first text", "another, rather longer text"]
batch = tokenizer(
    texts, padding=True, padding_side="right", truncation=True, max_length={max_length},
    return_tensors="pt",
)
with torch.no_grad():
    hidden = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    pooled = {pooling}
    logits = pooled @ head["head.weight"].T + head["head.bias"]
print([labels[i] for i in logits.argmax(-1)])
"""
_GENERATE = """\
batch = tokenizer(["Once upon a time"], return_tensors="pt")
with torch.no_grad():
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    tokens = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=40
    )
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
"""
_QUANTIZED = {
    "none": "",
    "int8": "BitsAndBytesConfig(load_in_8bit=True)",
    "nf4": (
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype={dtype})"
    ),
}
_DTYPE = {"float32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


def _model_card(spec: ModelSpec, facts: Mapping[str, Any], card: str) -> str:
    """Return the folder's README: what the Hub indexes, ``card``, and code that runs as it is."""
    dtype = _DTYPE[spec.compute_dtype]
    quantized = _QUANTIZED[spec.quantization].format(dtype=dtype)
    options = f",\n    dtype={dtype}" + (
        f",\n    quantization_config={quantized}" if quantized else ""
    )
    code = _LOAD.format(
        auto="AutoModelForCausalLM" if spec.kind == "causal-lm" else "AutoModel",
        imports=", BitsAndBytesConfig" if quantized else "",
        options=options,
    )
    if spec.kind == "causal-lm":
        code += "\n" + _GENERATE
    else:
        code += "\n" + _CLASSIFY.format(
            pooling=_POOLING[facts["pooling"]], max_length=spec.max_length
        )
    base = facts["base"]["id"]
    on_hub = not Path(base).is_absolute()  # the Hub refuses a card that names a path
    front = [
        "library_name: peft",
        *([f"base_model: {base}"] if on_hub else []),
        "tags: [weft, lora]",
    ]
    header = "\n".join(front)
    return (
        f"---\n{header}\n---\n\n{card.strip()}\n\n## Use\n\n"
        f"The adapter belongs to the base model `{base}`.\n\n```python\n{code}```\n"
    )
