"""Answers of a causal model, many at once, each of its own adapter: begun and ended at any step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clients.serving.bank import Bank
from clients.serving.decoding import Decoding
from clients.serving.sampling import Sampling, choose
from clients.serving.wording import Wording
from clients.tokens import padding_id

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be answered, and how.

    Attributes:
        tokens: at least one.
        slot: the adapter's.
        most: tokens of the answer at most, >= 1.
        sampling: how they are chosen.
        stops: texts at which it ends.
        alternatives: how many tokens are told at each place with their log-probabilities, besides
            the one that was chosen; None for none, and not of that one either.
    """

    tokens: tuple[int, ...] = field(repr=False)
    slot: int
    most: int
    sampling: Sampling
    stops: tuple[str, ...] = field(default=(), repr=False)
    alternatives: int | None = None

    @property
    def reserved(self) -> int:
        """How long it may become, with its answer."""
        return len(self.tokens) + self.most


@dataclass(frozen=True, slots=True)
class Token:
    """A token and its log-probability (nats, of the model's own distribution)."""

    text: str = field(repr=False)
    logprob: float


@dataclass(frozen=True, slots=True)
class Piece:
    """What a step adds to an answer.

    Attributes:
        text: may be empty.
        num_tokens: of the answer so far; an end of sequence is one.
        finish: why it ends with this, or None.
        token: the token that was chosen, where it was asked for.
        alternatives: the likeliest tokens there, likeliest first.
    """

    text: str = field(repr=False)
    num_tokens: int
    finish: Finish | None = None
    token: Token | None = None
    alternatives: tuple[Token, ...] = field(default=(), repr=False)

    @property
    def is_last(self) -> bool:
        """Whether the answer ends with this."""
        return self.finish is not None


@dataclass(slots=True)
class _Answer:
    key: int
    prompt: Prompt
    wording: Wording
    source: Random
    tokens: int = 0
    last: int = 0


class Generator:
    """Continues prompts. Not safe for several threads.

    Args:
        backbone: a transformers causal model.
        tokenizer: its own.
        bank: its adapters.
        largest: sequences at once, >= 1.
        cache_tokens: tokens of the cache at most, padding included, as far as it can be told when
            a sequence begins; one sequence alone is always taken.

    Raises:
        Unservable: if sequences of this model cannot be batched.
    """

    def __init__(
        self, backbone: nn.Module, tokenizer: Any, bank: Bank, largest: int, cache_tokens: int
    ) -> None:
        self._tokenizer, self._largest, self._cache_tokens = tokenizer, largest, cache_tokens
        self._decoding = Decoding(backbone, bank, padding_id(tokenizer))
        self._decoding.check()
        self._answers: list[_Answer] = []
        self._ends = _ends(backbone, tokenizer)

    @property
    def num_running(self) -> int:
        """How many answers are going on."""
        return len(self._answers)

    def fits(self, chosen: Sequence[Prompt], another: Prompt) -> bool:
        """Return whether ``another`` may begin now, with those that run and are ``chosen``."""
        asked = [*(one.prompt for one in self._answers), *chosen, another]
        longest = max(one.reserved for one in asked)
        small = len(asked) <= self._largest and len(asked) * longest <= self._cache_tokens
        return small or len(asked) == 1

    def admit(self, asked: Sequence[tuple[int, Prompt]]) -> list[tuple[int, Piece]]:
        """Begin answers, and return the first piece of each, by the caller's keys."""
        begun = [
            _Answer(
                key,
                prompt,
                Wording(self._tokenizer, prompt.tokens, prompt.stops),
                prompt.sampling.source(),
            )
            for key, prompt in asked
        ]
        prompts = [prompt for _, prompt in asked]
        logits = self._decoding.join([p.tokens for p in prompts], [p.slot for p in prompts])
        self._answers += begun
        return self._taken(begun, logits)

    def step(self) -> list[tuple[int, Piece]]:
        """Put one token to every answer, and return what that adds, by key."""
        if not self._answers:
            return []
        logits = self._decoding.step([one.last for one in self._answers])
        return self._taken(list(self._answers), logits)

    def cancel(self, keys: Collection[int]) -> None:
        """End answers that nobody waits for."""
        places = [i for i, one in enumerate(self._answers) if one.key not in keys]
        if len(places) < len(self._answers):
            self._decoding.keep(places)
            self._answers = [self._answers[i] for i in places]

    def _taken(self, answers: Sequence[_Answer], logits: Tensor) -> list[tuple[int, Piece]]:
        ways = [one.prompt.sampling for one in answers]
        tokens = choose(logits, ways, [one.source for one in answers]).tolist()
        told = self._told(answers, logits, tokens)
        pieces = [
            (one.key, self._piece(one, token, told.get(one.key)))
            for one, token in zip(answers, tokens, strict=True)
        ]
        self.cancel({key for key, piece in pieces if piece.is_last})
        return pieces

    def _piece(self, one: _Answer, token: int, told: tuple[Token, ...] | None) -> Piece:
        one.tokens, one.last = one.tokens + 1, token
        finish: Finish | None = None
        if token in self._ends:
            text, finish = one.wording.end(), "stop"
        else:
            text = one.wording.add(token)
            if one.wording.stopped:
                finish = "stop"
            elif one.tokens >= one.prompt.most:
                text += one.wording.end()
                finish = "stop" if one.wording.stopped else "length"
        if told is None:
            return Piece(text, one.tokens, finish)
        return Piece(text, one.tokens, finish, told[0], told[1:])

    def _told(
        self, answers: Sequence[_Answer], logits: Tensor, tokens: Sequence[int]
    ) -> dict[int, tuple[Token, ...]]:
        """Return the chosen token and its alternatives, where they are asked for."""
        found = {}
        for row, one in enumerate(answers):
            count = one.prompt.alternatives
            if count is None:
                continue
            known = torch.log_softmax(logits[row], dim=-1)
            values, places = known.topk(min(count, len(known)))
            pairs = [(tokens[row], float(known[tokens[row]]))]
            pairs += zip(places.tolist(), values.tolist(), strict=True)
            found[one.key] = tuple(Token(self._tokenizer.decode([t]), p) for t, p in pairs)
        return found


def _ends(backbone: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer, as transformers' own ``generate`` has them."""
    own = getattr(getattr(backbone, "generation_config", None), "eos_token_id", None)
    own = tokenizer.eos_token_id if own is None else own
    return frozenset([own] if isinstance(own, int) else own or [])
