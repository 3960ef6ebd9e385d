"""Which task an input is of, by the frozen base model alone: the nearest mean of what is public.

Nearest class mean (as in iCaRL, 1611.07725, section 2.1), over the pooled features of the base
model without any adapter: nothing is trained, and a new task moves no mean of another. Where texts
have no class, as those with tags and prompts have none, a task has one mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clients import data, models
from clients.assignment import ModelSpec
from clients.tags import IGNORED

_BATCH = 32


@dataclass(frozen=True, slots=True)
class Router:
    """The means of each task's classes.

    Attributes:
        means: ``[classes, hidden]``, of length 1.
        tasks: ``[classes]``: which task each is of, from 0.
    """

    means: Tensor
    tasks: Tensor

    def route(self, inputs: Tensor, known: int) -> Tensor:
        """Return the task of each input, ``[examples]``: that of the most similar class mean.

        Args:
            inputs: features, ``[examples, hidden]``.
            known: among how many tasks, the first of all, >= 1.
        """
        similar = functional.normalize(inputs, dim=1) @ self.means.T
        similar = similar.masked_fill(self.tasks >= known, float("-inf"))
        return self.tasks[similar.argmax(dim=1)]


def router(spec: ModelSpec, tasks: Sequence[Sequence[data.Example]]) -> Router:
    """Return the router of tasks by examples that everyone may see; a task needs one example.

    Args:
        spec: the base model, with the label set.
        tasks: examples of each task, in order.
    """
    means, owners = [], []
    for number, examples in enumerate(tasks):
        found = embedded(spec, examples)
        labels = torch.tensor([example.label or 0 for example in examples])
        for label in sorted(set(labels.tolist())):
            means.append(found[labels == label].mean(dim=0))
            owners.append(number)
    return Router(functional.normalize(torch.stack(means), dim=1), torch.tensor(owners))


def embedded(spec: ModelSpec, examples: Sequence[data.Example]) -> Tensor:
    """Return the frozen base model's pooled features of examples, ``[examples, hidden]``.

    Of classified texts as the head would see them; else the mean over the positions of what the
    model is given, which of a prompt with its completion is the prompt.
    """
    base = models.load(spec)
    model = models.TaskModel(base.backbone, spec)
    model.eval()
    encoded = data.encode(examples, base.tokenizer, spec)
    if spec.kind == "causal-lm":
        encoded = [_prompt(one) for one in encoded]
    pad = data.padding_id(base.tokenizer)
    found = torch.empty(len(encoded), base.backbone.config.get_text_config().hidden_size)
    with torch.no_grad():
        for chunk in data.by_length(encoded, range(len(encoded)), _BATCH):
            found[chunk] = _features(model, spec, data.collate([encoded[i] for i in chunk], pad))
    return found


def _prompt(encoded: data.Encoded) -> data.Encoded:
    """Return the prompt of an example; all of it where there is none to speak of."""
    given = encoded.labels == IGNORED
    if int(given.sum()) < 2:  # a text: what begins a sequence may be all that is not learned
        return encoded
    return data.Encoded(encoded.input_ids[given], encoded.labels[given])


def _features(model: models.TaskModel, spec: ModelSpec, batch: data.Batch) -> Tensor:
    """Return ``[batch, hidden]``."""
    if spec.kind == "classification":
        return model.features(batch)
    backbone: Any = model.backbone
    if spec.kind == "causal-lm":
        backbone = backbone.base_model  # without the head over the vocabulary
    outputs = backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    weights = batch.attention_mask.unsqueeze(-1).float()
    hidden: Tensor = outputs.last_hidden_state.float()
    return (hidden * weights).sum(1) / weights.sum(1)
