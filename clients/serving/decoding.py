"""A batch of sequences that grow token by token, which others join and leave between two steps.

All keys and values lie right-aligned in one cache ``[batch, heads, length, size]``, with padding on
the left where a sequence is shorter than the longest. Who joins is computed alone first, then put
beside; who leaves is cut out, and padding that nobody needs any more with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clients.serving.bank import BASE, Bank
from clients.serving.changes import Unservable

_PROBE = ((1, 2, 3, 4, 5), (3, 1))


class Decoding:
    """The sequences that are being continued, and their cache.

    Args:
        backbone: a transformers causal model.
        bank: its adapters.
        pad: the token that fills, which is masked.
    """

    def __init__(self, backbone: Any, bank: Bank, pad: int) -> None:
        self._model, self._bank, self._pad = backbone, bank, pad
        accepted = inspect.signature(backbone.forward).parameters
        self._positions = "position_ids" in accepted
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._slots: list[int] = []
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=bank.device)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def length(self) -> int:
        """How many tokens the longest sequence has."""
        return int(self._mask.shape[1])

    def join(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Take sequences in, behind those that are there.

        Args:
            prompts: their tokens, at least one each.
            slots: the adapter of each.

        Returns:
            The logits of each one's next token, ``[len(prompts), vocabulary]`` float32.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the right, where the answer begins
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        mask = mask.to(self._mask.device)
        logits, cache = self._forward(ids, mask, slots, [])
        self._put_beside(cache, mask)
        self._slots += slots
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Put one more token at the end of each sequence.

        Returns:
            The logits of each one's next token, ``[batch, vocabulary]`` float32.
        """
        ids = torch.tensor(tokens, dtype=torch.long)[:, None]
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        logits, self._cache = self._forward(ids, self._mask, self._slots, self._cache)
        return logits

    def keep(self, places: Sequence[int]) -> None:
        """Let go of all sequences but those at these places, which stay in this order."""
        self._slots = [self._slots[i] for i in places]
        if not places:
            self._cache, self._mask = [], self._mask.new_zeros(0, 0)
            return
        index = torch.tensor(places, device=self._mask.device)
        mask = self._mask[index]
        first = int(mask.argmax(dim=1).min())  # what is padding in all of them
        self._mask = mask[:, first:]
        self._cache = [(k[index, :, first:], v[index, :, first:]) for k, v in self._cache]

    def check(self) -> None:
        """Refuse a base model that computes something else in a batch than alone.

        Raises:
            Unservable: saying which.
        """
        together = self._checked(_PROBE)
        alone = torch.cat([self._checked([one]) for one in _PROBE])
        loose = 1e-3 if alone.dtype == torch.float32 and self._is_float32 else 0.1
        scale = float(alone.abs().max()) or 1.0
        if float((together - alone).abs().max()) > loose * scale:
            raise Unservable(
                f"the base model ({self._model.config.model_type}) computes something else for a "
                "sequence in a batch than alone, so it cannot be served; export the adapter, and "
                "serve it with vLLM"
            )

    @property
    def _is_float32(self) -> bool:
        return all(p.dtype == torch.float32 for p in self._model.parameters())

    def _checked(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self.join(prompts, [BASE] * len(prompts))
        logits = self.step([2] * len(prompts))
        self.keep([])
        return logits

    def _put_beside(self, cache: list[tuple[Tensor, Tensor]], mask: Tensor) -> None:
        if not self._slots:
            self._cache, self._mask = cache, mask
            return
        length = max(self.length, mask.shape[1])
        self._mask = torch.cat([_padded(self._mask, length), _padded(mask, length)])
        self._cache = [
            (_joined(old[0], new[0], length), _joined(old[1], new[1], length))
            for old, new in zip(self._cache, cache, strict=True)
        ]

    @torch.inference_mode()
    def _forward(
        self, ids: Tensor, mask: Tensor, slots: Sequence[int], past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        # without a config: no layer forgets what lies outside its window; the mask hides it
        cache = DynamicCache(past) if past else DynamicCache()
        options: dict[str, Any] = dict(self._last_only)
        if self._positions:
            places = (mask.cumsum(dim=1) - 1).clamp(min=0)
            options["position_ids"] = places[:, -ids.shape[1] :]
        with self._bank.using(slots):
            outputs = self._model(
                input_ids=ids.to(mask.device),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        return outputs.logits[:, -1].float(), [_entry(layer) for layer in cache.layers]


def _entry(layer: Any) -> tuple[Tensor, Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.dim() != 4:
        raise Unservable(
            f"the base model keeps a {type(layer).__name__} of a sequence, and not its keys and "
            "values, so that sequences cannot join and leave a batch; serve it with vLLM"
        )
    return keys, values


def _padded(mask: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(mask, (length - mask.shape[1], 0))


def _joined(old: Tensor, new: Tensor, length: int) -> Tensor:
    """Return ``[batch, heads, length, size]`` of both, padded on the left."""
    shape = (len(old) + len(new), old.shape[1], length, old.shape[3])
    found = old.new_zeros(shape)
    found[: len(old), :, length - old.shape[2] :] = old
    found[len(old) :, :, length - new.shape[2] :] = new
    return found
