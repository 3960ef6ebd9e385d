"""The README of an exported folder: what the Hub indexes, what there is to say, code that runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clients.assignment import ModelSpec

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
_LOAD_WHOLE = """\
import torch
from transformers import {auto}, AutoTokenizer

folder = "."  # this folder
model = {auto}.from_pretrained(folder{options}).eval()
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
_TAG = """\
import json
from pathlib import Path
{imports}
labels = json.loads(Path(folder, "weft.json").read_text(encoding="utf-8"))["labels"]

text = "a first text with some words"
batch = tokenizer(
    text, truncation=True, max_length={max_length}, return_offsets_mapping=True,
    return_tensors="pt",
)
with torch.no_grad():
    {logits}
# a word has the tag of the first of its pieces; what its other pieces say was never learned
for (start, end), tag in zip(batch["offset_mapping"][0].tolist(), logits[0].argmax(-1).tolist()):
    if start < end:
        print(text[start:end], labels[tag])
"""
_TAG_LOGITS = """\
logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits"""
_TAG_HEAD = """\
hidden = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state.float()
    logits = hidden @ head["head.weight"].T + head["head.bias"]"""
_TAG_IMPORT = """\

from safetensors.torch import load_file

head = load_file(f"{folder}/head.safetensors")"""
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


_AUTO = {
    "classification": "AutoModel",
    "token-classification": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
}
_PIPELINE = {
    "classification": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
}


def model_card(
    spec: ModelSpec, facts: Mapping[str, Any], card: str, head_inside: bool = False
) -> str:
    """Return the README of an adapter that weft trains: ``card``, and code that runs as it is.

    Args:
        spec: the base model and the task.
        facts: what ``weft.json`` says.
        card: what there is to say of the adapter, in Markdown.
        head_inside: whether the head over tags is among PEFT's tensors.
    """
    dtype = _DTYPE[spec.compute_dtype]
    quantized = _QUANTIZED[spec.quantization].format(dtype=dtype)
    options = f",\n    dtype={dtype}" + (
        f",\n    quantization_config={quantized}" if quantized else ""
    )
    if head_inside:
        options += f",\n    num_labels={len(spec.labels)}"
    code = _LOAD.format(
        auto="AutoModelForTokenClassification" if head_inside else _AUTO[spec.kind],
        imports=", BitsAndBytesConfig" if quantized else "",
        options=options,
    )
    code += _use(spec, facts, head_inside)
    return front_matter(facts, spec.kind) + (
        f"{card.strip()}\n\n## Use\n\nThe adapter belongs to the base model "
        f"`{facts['base']['id']}`.\n\n```python\n{code}```\n"
    )


def whole_card(
    spec: ModelSpec, facts: Mapping[str, Any], card: str, head_inside: bool, options: str
) -> str:
    """Return the README of a base model with an adapter in its weights.

    Args:
        spec: the base model and the task.
        facts: what ``weft.json`` says.
        card: what there is to say of the adapter, in Markdown.
        head_inside: whether the head over tags is among the weights.
        options: further arguments of ``from_pretrained``, each after a comma.
    """
    auto = "AutoModelForTokenClassification" if head_inside else _AUTO[spec.kind]
    code = _LOAD_WHOLE.format(auto=auto, options=options) + _use(spec, facts, head_inside)
    return front_matter(facts, spec.kind, None) + (
        f"{card.strip()}\n\n## Use\n\nThe adapter is in the weights of the base model "
        f"`{facts['base']['id']}`.\n\n```python\n{code}```\n"
    )


def _use(spec: ModelSpec, facts: Mapping[str, Any], head_inside: bool) -> str:
    """Return code that uses ``model`` and ``tokenizer``."""
    if spec.kind == "causal-lm":
        return "\n" + _GENERATE
    if spec.kind == "token-classification":
        return "\n" + _TAG.format(
            imports="" if head_inside else _TAG_IMPORT,
            logits=_TAG_LOGITS if head_inside else _TAG_HEAD,
            max_length=spec.max_length,
        )
    return "\n" + _CLASSIFY.format(pooling=_POOLING[facts["pooling"]], max_length=spec.max_length)


def front_matter(facts: Mapping[str, Any], kind: str, method: str | None = "lora") -> str:
    """Return the YAML that the Hub reads of a card.

    Args:
        facts: what ``weft.json`` says.
        kind: the task.
        method: PEFT's name of it, in lower case; None of a whole model.
    """
    base = facts["base"]["id"]
    library, relation = ("peft", "adapter") if method else ("transformers", "finetune")
    on_hub = not Path(base).is_absolute()  # the Hub refuses a card that names a path
    lines = [
        f"library_name: {library}",
        *([f"base_model: {base}", f"base_model_relation: {relation}"] if on_hub else []),
        f"pipeline_tag: {_PIPELINE[kind]}",
        f"tags: [{', '.join(filter(None, ('weft', method)))}]",
    ]
    return "---\n" + "\n".join(lines) + "\n---\n\n"
