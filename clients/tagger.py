"""The classes of transformers for token classification, where their head is weft's.

Their head is called ``classifier`` or ``score``. Where it is one linear layer on the body's last
hidden states, and nothing else lies between, it is what weft trains, and an adapter that is saved
with it is loaded by ``AutoModelForTokenClassification`` and PEFT alone. Some architectures have
more there (ModernBERT a dense layer and a norm).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForTokenClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from clients import models
from clients.assignment import ModelSpec
from clients.models import skeleton

HEADS = ("classifier", "score")  # the names that PEFT looks for


@dataclass(frozen=True, slots=True)
class Tagger:
    """A base model as transformers tags words with it.

    Attributes:
        model: without weights, on torch's meta device.
        head: the name of its head, ``[labels, hidden]`` with a bias.
        prefix: what the names of the body's layers begin with, with the dot.
    """

    model: Any
    head: str
    prefix: str


def tagger_of(spec: ModelSpec) -> Tagger | None:
    """Return the base model of ``spec`` as a tagger, or None where its head would be another.

    Raises:
        clients.models.ModelNotFound, clients.models.UnsupportedBase: as
            :func:`clients.models.skeleton`.
    """
    config = skeleton(replace(spec, kind="token-classification")).config
    if type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        return None
    config.num_labels = max(len(spec.labels), 1)
    with torch.device("meta"), models.quiet():
        model = AutoModelForTokenClassification.from_config(config)
    prefix = f"{model.base_model_prefix}."
    outside = {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    for head in HEADS:
        layer = getattr(model, head, None)
        if isinstance(layer, nn.Linear) and outside == {f"{head}.weight", f"{head}.bias"}:
            return Tagger(model, head, prefix)
    return None
