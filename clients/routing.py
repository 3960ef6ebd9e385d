"""Which task an input is of, by the frozen base model alone: the nearest mean of what is public.

Nearest class mean (as in iCaRL, 1611.07725, section 2.1), over the pooled features of the base
model without any adapter: nothing is trained, and a new task moves no mean of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clients import data, models
from clients.assignment import Assignment, ModelSpec
from clients.session import allowed_labels, move, opened

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
        labels = torch.tensor([example.label for example in examples])
        for label in sorted(set(labels.tolist())):
            means.append(found[labels == label].mean(dim=0))
            owners.append(number)
    return Router(functional.normalize(torch.stack(means), dim=1), torch.tensor(owners))


def embedded(spec: ModelSpec, examples: Sequence[data.Example]) -> Tensor:
    """Return the frozen base model's pooled features of examples, ``[examples, hidden]``."""
    base = models.load(spec)
    model = models.TaskModel(base.backbone, spec)
    model.eval()
    encoded = data.encode(examples, base.tokenizer, spec)
    pad = data.padding_id(base.tokenizer)
    found = torch.empty(len(encoded), base.backbone.config.get_text_config().hidden_size)
    with torch.no_grad():
        for chunk in data.by_length(encoded, range(len(encoded)), _BATCH):
            found[chunk] = model.features(data.collate([encoded[i] for i in chunk], pad))
    return found


def predicted(assignment: Assignment, examples: Sequence[data.Example]) -> Tensor:
    """Return the label index that a version answers to each example, ``[examples]``.

    Of data that whoever asks may read: answers tell of examples, and do not leave a client.

    Args:
        assignment: an evaluation; its ``labels`` may be answered.
        examples: classified ones.
    """
    with opened(assignment) as session, torch.no_grad():
        session.write(assignment.broadcast.tensors)
        session.model.eval()
        encoded = data.encode(examples, session.base.tokenizer, assignment.model)
        pad, allowed = data.padding_id(session.base.tokenizer), allowed_labels(assignment)
        found = torch.empty(len(encoded), dtype=torch.long)
        for chunk in data.by_length(encoded, range(len(encoded)), assignment.microbatch):
            batch = move(data.collate([encoded[i] for i in chunk], pad), assignment.device)
            logits = session.model.barred(session.model(batch), allowed)
            found[chunk] = logits.argmax(dim=1).cpu()
        return found
