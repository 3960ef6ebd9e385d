"""Labels of texts, or of their words: each text by its own adapter and its own head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from clients.serving.bank import Bank
from clients.serving.changes import Unservable
from clients.task_model import pooled


@dataclass(frozen=True, slots=True)
class Head:
    """What makes labels of what the model computes.

    Attributes:
        weight: ``[labels, hidden]``.
        bias: ``[labels]``.
        allowed: by label, whether it may be answered: it was learned.
        pooling: ``mean``, ``cls`` or ``last``; ``none`` labels every token.
    """

    weight: Tensor
    bias: Tensor
    allowed: tuple[bool, ...]
    pooling: str


@dataclass(frozen=True, slots=True)
class Text:
    """What is to be labelled.

    Attributes:
        tokens: at least one, special ones included.
        slot: the adapter's.
        places: the tokens that are labelled, where the head labels tokens.
    """

    tokens: tuple[int, ...] = field(repr=False)
    slot: int
    places: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Labelled:
    """The probability of each label: of the text, or of each token that was asked for.

    Attributes:
        probabilities: ``[1, labels]``, or ``[places, labels]``; 0 for what was never learned.
    """

    probabilities: Tensor = field(repr=False)

    @property
    def is_last(self) -> bool:
        """Always: a text is labelled at once."""
        return True


class Classifier:
    """Labels texts. Not safe for several threads.

    Args:
        backbone: a transformers model without a head.
        bank: its adapters.
        pad: the token that fills, which is masked.
        largest: texts at once, >= 1.
        batch_tokens: tokens of a batch at most, padding included; one text is always taken.
    """

    def __init__(
        self, backbone: nn.Module, bank: Bank, pad: int, largest: int, batch_tokens: int
    ) -> None:
        self._model: Any = backbone
        self._bank, self._pad, self._largest = bank, pad, largest
        self._batch_tokens = batch_tokens
        self._heads: dict[int, Head] = {}
        self._rows: dict[int, int] = {}
        self._weight = self._bias = torch.zeros(0)

    num_running = 0
    """No text stays for a next step."""

    def put_head(self, slot: int, head: Head) -> None:
        """Give the adapter in ``slot`` its head.

        Raises:
            Unservable: if it is not of this model's width.
        """
        width = self._model.config.get_text_config().hidden_size
        if head.weight.shape[1:] != (width,) or len(head.weight) != len(head.bias):
            raise Unservable(f"a head has {width} inputs, got {list(head.weight.shape)}")
        self._stack({**self._heads, slot: head})

    def drop_head(self, slot: int) -> None:
        """Forget the head of ``slot``."""
        self._stack({i: head for i, head in self._heads.items() if i != slot})

    def fits(self, chosen: Sequence[Text], another: Text) -> bool:
        """Return whether ``another`` may be computed together with ``chosen``."""
        asked = [*chosen, another]
        longest = max(len(one.tokens) for one in asked)
        small = len(asked) <= self._largest and len(asked) * longest <= self._batch_tokens
        return small or len(asked) == 1

    @torch.inference_mode()
    def admit(self, asked: Sequence[tuple[int, Text]]) -> list[tuple[int, Labelled]]:
        """Label texts, and return the answers by the caller's keys."""
        texts = [text for _, text in asked]
        ids = [torch.tensor(text.tokens) for text in texts]
        device = self._bank.device
        mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).to(device)
        padded = pad_sequence(ids, batch_first=True, padding_value=self._pad).to(device)
        with self._bank.using([text.slot for text in texts]):
            outputs = self._model(input_ids=padded, attention_mask=mask)
        hidden = outputs.last_hidden_state.float()
        found: dict[int, Labelled] = {}
        heads = [self._heads[text.slot] for text in texts]
        for how in sorted({head.pooling for head in heads}):
            places = [i for i, head in enumerate(heads) if head.pooling == how]
            features = pooled(hidden[places], mask[places], how)
            rows = features if how == "none" else features.unsqueeze(1)
            scores = self._scores(rows, [texts[i].slot for i in places])
            for own, i in zip(scores, places, strict=True):
                wanted = own[list(texts[i].places)] if how == "none" else own
                found[asked[i][0]] = self._labelled(wanted, heads[i])
        return [(key, found[key]) for key, _ in asked]

    def step(self) -> list[tuple[int, Labelled]]:
        """Return nothing: all is answered when it begins."""
        return []

    def cancel(self, keys: Collection[int]) -> None:
        """Do nothing: nothing goes on."""

    def _scores(self, features: Tensor, slots: Sequence[int]) -> Tensor:
        """Return ``[batch, rows, labels]`` of ``[batch, rows, hidden]``; -inf where none may be."""
        rows = torch.tensor([self._rows[slot] for slot in slots], device=features.device)
        return torch.baddbmm(self._bias[rows].unsqueeze(1), features, self._weight[rows])

    def _labelled(self, scores: Tensor, head: Head) -> Labelled:
        return Labelled(torch.softmax(scores, dim=-1)[:, : len(head.bias)].cpu())

    def _stack(self, heads: Mapping[int, Head]) -> None:
        """Lay all heads side by side, padded with labels that have no chance."""
        self._heads = dict(heads)
        self._rows = {slot: row for row, slot in enumerate(self._heads)}
        most = max((len(head.bias) for head in heads.values()), default=0)
        width = self._model.config.get_text_config().hidden_size
        weight = torch.zeros(len(heads), width, most)
        bias = torch.full((len(heads), most), float("-inf"))
        for row, head in enumerate(heads.values()):
            count = len(head.bias)
            allowed = torch.tensor(head.allowed)
            weight[row, :, :count] = head.weight.float().T
            bias[row, :count] = head.bias.float().masked_fill(~allowed, float("-inf"))
        self._weight, self._bias = weight.to(self._bank.device), bias.to(self._bank.device)
