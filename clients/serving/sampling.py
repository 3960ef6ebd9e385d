"""The next token of each sequence of a batch, each by its own temperature, top-p and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

COLDEST = 1e-5
"""Below it a temperature is as good as 0, and logits over it would be infinite."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence's tokens are chosen.

    Attributes:
        temperature: below :data:`COLDEST` the likeliest token is taken; above, logits are divided
            by it.
        top_p: in (0, 1]: only the likeliest tokens that together have this probability.
        seed: the same seed and prompt give the same tokens, whatever else is in the batch, as far
            as rounding does; None draws a new one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def source(self) -> Random:
        """Return where the sequence's random numbers come from."""
        return Random(self.seed)


def choose(logits: Tensor, wanted: Sequence[Sampling], sources: Sequence[Random]) -> Tensor:
    """Return the next token of each sequence, ``[batch]``.

    Each sequence that samples draws one number of its source, from [0, 1), and takes the token at
    which the sum of the probabilities, likeliest first, passes it.

    Args:
        logits: ``[batch, vocabulary]`` float32.
        wanted: how, by sequence.
        sources: random numbers, by sequence.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [i for i, one in enumerate(wanted) if one.temperature >= COLDEST]
    if not drawn:
        return tokens

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    temperatures = column([wanted[i].temperature for i in drawn])
    kept = column([wanted[i].top_p for i in drawn])
    numbers = column([sources[i].random() for i in drawn])
    probabilities = torch.softmax(logits[drawn] / temperatures, dim=-1)
    ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered  # of what is likelier
    ordered = ordered.masked_fill(before >= kept, 0.0)  # the first always stays: nothing before it
    total = ordered.cumsum(dim=-1)
    passed = (total <= numbers * total[:, -1:]).sum(dim=-1, keepdim=True)
    last = ((ordered > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # none > 0: NaN, top-p ~ 0
    tokens[drawn] = places.gather(1, torch.minimum(passed, last)).squeeze(1)
    return tokens
