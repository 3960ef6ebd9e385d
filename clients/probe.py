"""The bar that an adapter must clear: a linear head on the frozen base model, over texts or words.

Of words those count that the model sees, each by the features of its first token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from clients import data, models
from clients.assignment import ModelSpec
from clients.tags import IGNORED

_BATCH = 32
_L2 = 1e-3


def frozen_probe(
    spec: ModelSpec, train: Sequence[data.Example], test: Sequence[data.Example]
) -> tuple[float, float]:
    """Return the accuracies on ``test`` of a linear head on frozen features, and of the majority.

    The head is an L2-regularised multinomial logistic regression on standardised pooled features,
    fitted to the optimum. Deterministic.

    Args:
        spec: the base model, with the label set.
        train: what the head is fitted on.
        test: what it is scored on.
    """
    (seen, labels), (wanted, truth) = _features(spec, train), _features(spec, test)
    mean, deviation = seen.mean(0), seen.std(0).clamp(min=1e-6)
    weight = _fitted((seen - mean) / deviation, labels, len(spec.labels))
    inputs = functional.pad((wanted - mean) / deviation, (0, 1), value=1.0)
    predicted = (inputs @ weight).argmax(1)
    majority = int(labels.bincount().argmax())
    return (
        float((predicted == truth).double().mean()),
        float((truth == majority).double().mean()),
    )


def _features(spec: ModelSpec, examples: Sequence[data.Example]) -> tuple[Tensor, Tensor]:
    """Return the frozen base model's features ``[rows, hidden]``, and the label of each row."""
    base = models.load(spec)
    model = models.TaskModel(base.backbone, spec)
    model.eval()
    encoded = data.encode(examples, base.tokenizer, spec)
    pad = data.padding_id(base.tokenizer)
    features, labels = [], []
    with torch.no_grad():
        for chunk in data.by_length(encoded, range(len(encoded)), _BATCH):
            batch = data.collate([encoded[i] for i in chunk], pad)
            counted = batch.labels != IGNORED
            features.append(model.features(batch)[counted])
            labels.append(batch.labels[counted])
    return torch.cat(features), torch.cat(labels)


def _fitted(features: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Return the head's weights with the bias as last row, ``[hidden + 1, labels]``."""
    inputs = functional.pad(features, (0, 1), value=1.0)
    weight = torch.zeros(inputs.shape[1], num_labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weight, labels)
        loss = loss + _L2 * weight[:-1].square().sum()
        torch.autograd.backward(loss)
        return loss

    # torch leaves LBFGS.step untyped
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach()
