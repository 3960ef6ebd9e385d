"""Import: a PEFT adapter folder as weft's own tensors, or as PEFT wrote it where weft has no place.

What weft can train, stack, merge and score it takes apart: LoRA, rsLoRA, DoRA, aLoRA and BD-LoRA
with any ranks and alphas by layer. Everything else that PEFT knows is kept in PEFT's own format,
tensor by tensor, with the reason. A folder is somebody else's: nothing in it is run or unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from clients import models, placement
from clients.assignment import ModelSpec, PluginChoice, Task
from clients.export import CONFIG, FACTS, HEAD, PEFT_PREFIX, WEIGHTS
from clients.peft_layers import (
    Foreign,
    NotImportable,
    changes_of,
    choice_of,
    is_factor,
    layers_of,
    sizes,
)
from clients.tagger import tagger_of

__all__ = ["Imported", "NotImportable", "read_peft"]

_KINDS: Mapping[str, Task] = {
    "CAUSAL_LM": "causal-lm",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "classification",
}
_SCORE = f"{PEFT_PREFIX}score.weight"
_ON_THE_BASE_ITSELF = ("pissa", "olora", "corda", "lora_ga", "loftq")
_ELSEWHERE = {
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it adapts bare parameters",
    "trainable_token_indices": "it trains rows of an embedding",
    "arrow_config": "it routes between other adapters",
    "use_qalora": "it is for GPTQ weights",
    "lora_bias": "its factors have biases",
    "kasa_config": "it truncates the base weights",
    "monteclora_config": "it samples",
}


@dataclass(frozen=True, slots=True)
class Imported:
    """An adapter that was read.

    Attributes:
        tensors: by weft's names, a head's among them; by PEFT's where ``peft`` is set.
        adapter: the method and its options; PEFT's name of it where ``peft`` is set.
        model: the base model, with its hash, and the task.
        seen_labels: what its head can tell apart.
        files: sha256 of what was read, by name.
        peft: PEFT's config, without the base model's place, where the adapter stays in PEFT's own
            format, else None.
        why: the reason for that, or "".
        facts: what the folder's ``weft.json`` says; empty where there is none.
    """

    tensors: dict[str, Tensor]
    adapter: PluginChoice
    model: ModelSpec
    seen_labels: tuple[str, ...]
    files: Mapping[str, str]
    peft: Mapping[str, Any] | None = None
    why: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Folder:
    """A folder's files, each read once: what is hashed is what is used."""

    path: Path
    digests: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        data = (self.path / name).read_bytes()
        self.digests[name] = hashlib.sha256(data).hexdigest()
        return data

    def json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise NotImportable(f"{self.path / name} is not JSON ({error})") from None
        if not isinstance(found, dict):
            raise NotImportable(f"{self.path / name} must hold a JSON object")
        return found

    def tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return dict(sorted(load(self.read(name)).items()))
        except SafetensorError as error:
            raise NotImportable(
                f"{self.path / name} is truncated or altered: it is no safetensors file ({error}); "
                "copy it again"
            ) from None


def read_peft(folder: Path, base: str | None = None, labels: Sequence[str] = ()) -> Imported:
    """Read a PEFT adapter folder.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``; what
            :func:`clients.export.export_peft` writes beside them is used too.
        base: where the base model is; by default where the config says.
        labels: the label set of a sequence classifier's head, in index order; needed for one that
            weft did not export.

    Raises:
        NotImportable: if it is not an adapter that PEFT reads, is a pickle, or does not fit the
            base model.
        clients.models.ModelNotFound, clients.models.UnsupportedBase: if the base model cannot be
            had.
        clients.models.BaseMismatch: if it is not the one that weft exported the adapter for.
    """
    files = _Folder(folder)
    config = _config(files)
    facts = files.json(FACTS) if (folder / FACTS).is_file() else {}
    tensors = files.tensors(WEIGHTS)
    if not tensors:
        raise NotImportable(f"{folder / WEIGHTS} holds no tensor")
    spec = _base(config, facts, base)
    method = str(config["peft_type"]).lower()
    try:
        return _native(files, config, facts, replace(spec, labels=tuple(labels)), tensors)
    except Foreign as reason:
        left_out = ("base_model_name_or_path", "revision")  # a place; the recipe has the hash
        kept = {key: value for key, value in sorted(config.items()) if key not in left_out}
        plain, adapter = replace(spec, labels=()), PluginChoice(method)
        return Imported(
            tensors, adapter, plain, (), files.digests, kept, str(reason), _known(facts)
        )


def _config(files: _Folder) -> dict[str, Any]:
    """Return PEFT's config; what cannot be an adapter of PEFT's, or would be unpickled, is refused.

    Raises:
        NotImportable: with the reason.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KNOWN

    folder = files.path
    if not (folder / CONFIG).is_file():
        raise NotImportable(f"{folder} has no {CONFIG}; give the folder of a PEFT adapter")
    config = files.json(CONFIG)
    types = sorted(kind.value for kind in KNOWN)
    if config.get("peft_type") not in types:
        raise NotImportable(
            f"{folder / CONFIG}: PEFT has no method called {config.get('peft_type')!r} "
            f"(there are {', '.join(types)})"
        )
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.glob("adapter_model.*"))
        if pickles:
            raise NotImportable(
                f"{folder} has its weights only as a pickle ({pickles[0]}), which can run any code "
                f"when it is read; load it where you trust it, and save {WEIGHTS} with "
                "save_pretrained"
            )
        raise NotImportable(f"{folder} has no {WEIGHTS}")
    return config


def _base(config: Mapping[str, Any], facts: Mapping[str, Any], base: str | None) -> ModelSpec:
    """Return the base model with its hash, without labels.

    Raises:
        NotImportable: if nobody says which it is.
        models.BaseMismatch: if weft exported the adapter for another.
    """
    said = _known(facts).get("base", {})
    place = base or config.get("base_model_name_or_path")
    if not isinstance(place, str) or not place:
        raise NotImportable("the adapter does not say its base model; give --base MODEL")
    revision = config.get("revision") if base is None else None
    spec = ModelSpec(
        id=place,
        kind=_kind(config, _known(facts)),
        revision=revision if isinstance(revision, str) else None,
        quantization=said.get("quantization", "none"),
        compute_dtype=said.get("compute_dtype", "float32"),
        max_length=_known(facts).get("max_length", 128),
        pooling=_known(facts).get("pooling") or "auto",
    )
    spec = replace(spec, hash=models.base_hash(spec))
    if said.get("hash", spec.hash) != spec.hash:
        raise models.BaseMismatch(
            f"the base model at {models.locate(spec.id, spec.revision)} has hash "
            f"{spec.hash[:12]}…, the adapter was trained on {str(said['hash'])[:12]}…; give that "
            "one with --base"
        )
    return spec


def _kind(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Task:
    """Return the task; PEFT's type is the same for both kinds of heads that weft keeps apart."""
    found = _KINDS.get(str(config.get("task_type")), "classification")
    tags = found == "classification" and facts.get("kind") == "token-classification"
    return "token-classification" if tags else found


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a ``weft.json`` has the form that weft writes.

    Raises:
        NotImportable: if a part of it has another.
    """
    forms: dict[str, Any] = {
        "kind": str,
        "version": str,
        "base": dict,
        "labels": list,
        "seen_labels": list,
        "max_length": int,
        "pooling": (str, type(None)),
    }
    for key, form in forms.items():
        if key in facts and not isinstance(facts[key], form):
            raise NotImportable(f"{FACTS}: {key} cannot be {facts[key]!r}; export the adapter anew")
    return {key: facts[key] for key in forms if key in facts}


def _native(
    files: _Folder,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    spec: ModelSpec,
    tensors: dict[str, Tensor],
) -> Imported:
    """Return the adapter by weft's names.

    Raises:
        Foreign: if weft has no place for it.
        NotImportable: if it is damaged or does not fit.
    """
    _refuse_unknown_settings(config)
    head, spec, seen = _head(files, config, _known(facts), spec, tensors)
    skeleton = models.skeleton(spec)
    factors = {name: tensor for name, tensor in tensors.items() if is_factor(name)}
    others = {name: tensor for name, tensor in tensors.items() if name not in factors}
    layers = layers_of(factors, placement.linear_layers(skeleton), skeleton.base_model_prefix)
    changes, more = changes_of(others, layers, config, spec)
    ranks, alphas = sizes(layers, config)
    power = 0.5 if config.get("use_rslora") else 1.0
    named: dict[str, Tensor] = {}
    for layer, parts in layers.items():
        named |= {f"{layer}.{part}": tensor.float() for part, tensor in parts.items()}
        named[f"{layer}.scaling"] = torch.tensor(alphas[layer] / ranks[layer] ** power)
        if tokens := config.get("alora_invocation_tokens"):
            named[f"{layer}.invocation"] = torch.tensor(tokens, dtype=torch.int64)
    choice = choice_of(config, layers, ranks, alphas, more)
    return Imported(named | changes | head, choice, spec, seen, files.digests, facts=_known(facts))


def _refuse_unknown_settings(config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise Foreign(f"weft trains no {config['peft_type']}")
    for setting, why in _ELSEWHERE.items():
        if config.get(setting):
            raise Foreign(f"{setting} is set: {why}")
    started = str(config.get("init_lora_weights", True)).lower()
    if started.startswith(_ON_THE_BASE_ITSELF):
        raise Foreign(f"init_lora_weights is {started!r}: PEFT changes the base weights for it")


def _head(
    files: _Folder,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    spec: ModelSpec,
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], ModelSpec, tuple[str, ...]]:
    """Return the head by weft's names (taken out of ``tensors``), the task, and the labels seen."""
    task = config.get("task_type")
    if task == "SEQ_CLS" and _SCORE in tensors:
        # a decoder's classifier is what weft's head is: one linear layer on the last token
        weight = tensors.pop(_SCORE).float()
        if len(spec.labels) != len(weight):
            raise NotImportable(
                f"the classifier has {len(weight)} labels, and {len(spec.labels)} are given; name "
                "all of them in order with --labels a,b,…"
            )
        head = {"head.weight": weight, "head.bias": torch.zeros(len(weight))}
        return head, replace(spec, pooling="last"), spec.labels
    if task == "TOKEN_CLS":
        return _tags_head(facts, spec, tensors)
    if not isinstance(task, str) or task not in _KINDS:
        raise Foreign(f"its task type is {task}, whose model has a head that weft has not")
    if _KINDS[task] == "causal-lm":
        return {}, replace(spec, labels=()), ()
    if not facts.get("labels") or not (files.path / HEAD).is_file():
        raise Foreign(f"it has no head ({FACTS} and {HEAD}, as weft exports them)")
    labels = _labels(facts)
    head = {name: t.float() for name, t in files.tensors(HEAD).items()}
    if sorted(head) != ["head.bias", "head.weight"] or len(head["head.weight"]) != len(labels):
        raise NotImportable(f"{HEAD} is not the head of the {len(labels)} labels in {FACTS}")
    return head, replace(spec, labels=labels), _labels(facts, "seen_labels") or labels


def _tags_head(
    facts: Mapping[str, Any], spec: ModelSpec, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], ModelSpec, tuple[str, ...]]:
    """Return what :func:`_head` does, of an adapter whose head over tags PEFT saved with it."""
    labels = spec.labels or _labels(facts)
    spec = replace(spec, labels=labels)
    tagger = tagger_of(spec)
    places = {n: f"{PEFT_PREFIX}{tagger.head}.{n}" for n in ("weight", "bias")} if tagger else {}
    if not places or not set(places.values()) <= tensors.keys():
        raise Foreign("its head over tags is not one linear layer on the base model's last states")
    head = {f"head.{name}": tensors.pop(place).float() for name, place in places.items()}
    if len(head["head.weight"]) != len(labels):
        raise NotImportable(
            f"the tagger has {len(head['head.weight'])} tags, and {len(labels)} are given; name "
            "all of them in order with --labels O,B-NAME,…"
        )
    seen = _labels(facts, "seen_labels") if labels == _labels(facts) else ()
    return head, spec, seen or labels


def _labels(facts: Mapping[str, Any], key: str = "labels") -> tuple[str, ...]:
    return tuple(str(label) for label in facts.get(key, ()))
