"""The model that a task trains: a base model with its adapter, and a head over the label set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from clients.assignment import ModelSpec
from strategies.base import Tensors

if TYPE_CHECKING:
    from clients.data import Batch

HEAD_STD = 0.02
"""Of a new head's weights: as BERT and most transformers initialise."""


def is_decoder(config: Any) -> bool:
    """Return whether a transformers model with this config sees only what precedes a token."""
    kind = config.model_type
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # BERT and its like are listed as both; they look both ways unless they are told otherwise.
    both_ways = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    return causal and not both_ways


def pooling(spec: ModelSpec, config: Any) -> str:
    """Return how a sequence becomes one vector: ``mean``, ``cls`` or ``last``.

    ``auto`` is the mean for encoders and the last token for decoders, where only that one has
    seen the whole text.

    Raises:
        ValueError: if ``spec.pooling`` is none of these.
    """
    if spec.pooling == "auto":
        return "last" if is_decoder(config) else "mean"
    if spec.pooling not in ("mean", "cls", "last"):
        raise ValueError(f"pooling must be 'auto', 'mean', 'cls' or 'last', got {spec.pooling!r}")
    return spec.pooling


def pooled(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """Return what stands for each sequence, ``[batch, hidden]``.

    Args:
        hidden: ``[batch, length, hidden]``.
        mask: ``[batch, length]``, 0 on padding.
        how: ``mean``, ``cls`` or ``last``; ``none`` returns ``hidden``: tags need all.
    """
    if how == "none":
        return hidden
    if how == "cls":
        return hidden[:, 0]
    if how == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(1)  # right on either side of padding
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class TaskModel(nn.Module):
    """A base model with its adapter, and for classification a linear head over the label set.

    Token-classification has the same head, at every token instead of on the pooled text.

    The head is float32: weights from N(0, 0.02²), drawn from torch's global generator (seed it
    before), and a zero bias.

    Args:
        backbone: what :meth:`clients.adapters.Adapter.attach` returned.
        spec: the task.

    Raises:
        ValueError: if a classification has fewer than two labels, or repeated ones.
    """

    def __init__(self, backbone: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: nn.Linear | None = None
        self._spec = spec
        if spec.kind == "causal-lm":
            return
        if len(set(spec.labels)) != len(spec.labels) or len(spec.labels) < 2:
            raise ValueError(
                f"{spec.kind} needs two or more different labels, got {list(spec.labels)}"
            )
        config: Any = backbone.config
        self._pooling = "none" if spec.kind == "token-classification" else pooling(spec, config)
        self.head = nn.Linear(config.get_text_config().hidden_size, len(spec.labels))
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Return float32 logits: ``[batch, labels]``, or of each token.

        These are ``[batch, length, labels]``, for causal-lm ``[batch, length, vocabulary]``.
        """
        if self.head is not None:
            scores: Tensor = self.head(self.features(batch))
            return scores
        outputs = self.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        logits: Tensor = outputs.logits.float()
        return logits

    def features(self, batch: Batch) -> Tensor:
        """Return what the head sees, float32: ``[batch, hidden]``, of tags for each token."""
        outputs = self.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return pooled(outputs.last_hidden_state.float(), batch.attention_mask, self._pooling)

    def example_losses(self, logits: Tensor, batch: Batch, allowed: Tensor | None = None) -> Tensor:
        """Return the cross entropy of each example, ``[batch]``.

        For tags and ``causal-lm`` it is the mean over an example's target tokens (those whose label
        is not -100), of ``causal-lm`` each predicted from what precedes it; 0 where there is none.
        A mean per example, not per batch, is what makes per-example gradients well defined.

        Args:
            logits: what :meth:`forward` returned for ``batch``.
            batch: the examples.
            allowed: label indices that take part in the softmax (classification), or None for
                all; an example whose label is not among them has infinite loss.
        """
        if self.head is not None:
            logits = self.barred(logits, allowed)
            if self._spec.kind == "classification":
                return functional.cross_entropy(logits, batch.labels, reduction="none")
            targets = batch.labels
        else:
            logits, targets = logits[:, :-1], batch.labels[:, 1:]
        losses = functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )
        return losses.sum(1) / (targets != -100).sum(1).clamp(min=1)

    def barred(self, logits: Tensor, allowed: Tensor | None) -> Tensor:
        """Return logits that are -inf for all labels but ``allowed``; as they are where it is None.

        Args:
            logits: ``[..., labels]``.
            allowed: label indices.
        """
        if allowed is None:
            return logits
        barred = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        barred[allowed.to(logits.device)] = False
        return logits.masked_fill(barred, float("-inf"))

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Return the live parameters of the head; empty for ``causal-lm``."""
        if self.head is None:
            return {}
        return {f"head.{name}": value for name, value in self.head.named_parameters()}

    def head_tensors(self) -> dict[str, Tensor]:
        """Return a copy of ``head.weight`` ``[labels, hidden]`` and ``head.bias``, on the CPU."""
        return {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.head_parameters().items()
        }

    def write_head(self, tensors: Tensors) -> None:
        """Put ``head.weight`` and ``head.bias`` into the head.

        Raises:
            ValueError: if one is missing or not of the head's shape; nothing is written then.
        """
        parameters = self.head_parameters()
        if set(tensors) != set(parameters):
            raise ValueError(
                f"a {self._spec.kind} model has the head {sorted(parameters) or 'none'}, "
                f"got {sorted(tensors)}"
            )
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} must be {list(parameter.shape)} for the labels "
                    f"{', '.join(self._spec.labels)}, got {list(tensors[name].shape)}"
                )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
