"""Requests in tokens, within the limits; what is asked of the engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clients.alignment import aligned
from clients.examples import Example
from clients.serving.classifying import Text
from clients.serving.generating import Prompt
from clients.serving.sampling import Sampling
from clients.tags import Places, words_of
from orchestrator.serving.protocol import (
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    Pair,
)
from orchestrator.serving.shelf import Served

DEFAULT_ANSWER = 16
"""Tokens of a completion where nobody says how many, as OpenAI has it."""
DEFAULT_CHAT_ANSWER = 256


class TooLong(ValueError):
    """A request asks for more tokens than may be, or has too many."""


class WrongKind(ValueError):
    """A version is for another kind of request."""


class BadPrompt(ValueError):
    """A prompt that this base model cannot be given."""


@dataclass(frozen=True, slots=True)
class TokenLimits:
    """How long a request may be.

    Attributes:
        prompt: tokens of a prompt or text at most.
        answer: tokens of an answer at most.
        context: of both together: what the base model can take.
        inputs: prompts or texts of one request at most.
    """

    prompt: int
    answer: int
    context: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Tagged:
    """A text that is labelled word by word.

    Attributes:
        text: what the worker is given.
        words: where each word of it lies, in characters.
        places: by word, its row among what the worker answers; None where the model does not see
            it.
    """

    text: Text
    words: Places
    places: tuple[int | None, ...]


class Asking:
    """Makes tokens of requests. For one thread: tokenizers keep how they were last called.

    Args:
        tokenizer: the base model's; a copy is kept.
        limits: how long a request may be.
        vocabulary: how many tokens the model has.
    """

    def __init__(self, tokenizer: Any, limits: TokenLimits, vocabulary: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._limits, self._vocabulary = limits, vocabulary

    def completions(self, request: CompletionRequest, served: Served) -> list[Prompt]:
        """Return what a completion asks for.

        Raises:
            WrongKind: if the version is no causal model.
            TooLong, BadPrompt: if it cannot be asked for.
        """
        _check_kind(served, ("causal-lm",), "/v1/completions")
        self._check_inputs(len(request.prompts))
        return [
            self._prompt(
                self._tokens(one),
                request.max_tokens or DEFAULT_ANSWER,
                request,
                request.logprobs,
                served,
            )
            for one in request.prompts
        ]

    def chat(self, request: ChatRequest, served: Served) -> list[Prompt]:
        """Return what a conversation asks for: the next turn.

        Raises:
            WrongKind: if the version is no causal model.
            TooLong, BadPrompt: if it cannot be asked for.
        """
        _check_kind(served, ("causal-lm",), "/v1/chat/completions")
        if self._tokenizer.chat_template is None:
            raise BadPrompt(
                "the base model's tokenizer has no chat template, so it was not trained on turns; "
                "ask /v1/completions"
            )
        turns = [{"role": one.role, "content": one.content} for one in request.messages]
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise BadPrompt(f"the chat template refuses these messages: {error}") from None
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = max(1, self._limits.context - len(tokens))
        most = request.most or min(DEFAULT_CHAT_ANSWER, self._limits.answer, room)
        alternatives = request.top_logprobs if request.logprobs else None
        return [self._prompt(tokens, most, request, alternatives, served)]

    def texts(self, request: ClassifyRequest, served: Served) -> list[Text | Tagged]:
        """Return what is to be labelled.

        Raises:
            WrongKind: if the version labels nothing, or words where a pair of texts is given.
            TooLong: if a text is longer than the version was trained with, and not to be cut.
        """
        _check_kind(served, ("classification", "token-classification"), "/v1/classify")
        self._check_inputs(len(request.inputs))
        limit = min(served.max_length, self._limits.prompt, self._limits.context)
        if served.kind == "token-classification":
            return [self._tagged(one, limit, request.truncate, served) for one in request.inputs]
        found: list[Text | Tagged] = []
        for one in request.inputs:
            texts = (one.text, one.text_pair) if isinstance(one, Pair) else (one,)
            tokens = self._cut(texts, limit, request.truncate)
            found.append(Text(tuple(tokens), served.slot))
        return found

    def _tokens(self, prompt: str | list[int]) -> Sequence[int]:
        if isinstance(prompt, str):
            tokens: list[int] = self._tokenizer(prompt, verbose=False)["input_ids"]
            if not tokens:
                raise BadPrompt("the prompt is empty, and there must be something to go on from")
            return tokens
        if any(not 0 <= token < self._vocabulary for token in prompt):
            raise BadPrompt(
                f"tokens are 0 to {self._vocabulary - 1}, got {min(prompt)} to {max(prompt)}"
            )
        return prompt

    def _prompt(
        self,
        tokens: Sequence[int],
        most: int,
        request: CompletionRequest | ChatRequest,
        alternatives: int | None,
        served: Served,
    ) -> Prompt:
        limits = self._limits
        if len(tokens) > limits.prompt:
            raise TooLong(f"the prompt has {len(tokens)} tokens, and {limits.prompt} are allowed")
        if most > limits.answer:
            raise TooLong(f"max_tokens is {most}, and {limits.answer} are allowed")
        if len(tokens) + most > limits.context:
            raise TooLong(
                f"the prompt has {len(tokens)} tokens and max_tokens is {most}, and the base model "
                f"takes {limits.context} together; shorten one of them"
            )
        sampling = Sampling(request.temperature, request.top_p, request.seed)
        return Prompt(tuple(tokens), served.slot, most, sampling, request.stops, alternatives)

    def _tagged(self, one: str | Pair, limit: int, truncate: bool, served: Served) -> Tagged:
        if isinstance(one, Pair):
            raise WrongKind("words are labelled in one text, got a pair of texts")
        tokens = self._cut((one,), limit, truncate)
        words = words_of(one)
        (found,) = aligned([Example(text=one, words=words)], self._tokenizer, limit)
        seen = [place for place in found.places if place is not None]
        rows = {place: row for row, place in enumerate(seen)}
        places = tuple(None if p is None else rows[p] for p in found.places)
        return Tagged(Text(tuple(tokens), served.slot, tuple(seen)), words, places)

    def _cut(self, texts: Sequence[str], limit: int, truncate: bool) -> list[int]:
        tokens: list[int] = self._tokenizer(*texts, verbose=False)["input_ids"]
        if len(tokens) > limit:
            if not truncate:
                raise TooLong(
                    f"the text has {len(tokens)} tokens, and {limit} are allowed; shorten it, or "
                    "say truncate: true"
                )
            tokens = self._tokenizer(*texts, truncation=True, max_length=limit)["input_ids"]
        return tokens

    def _check_inputs(self, count: int) -> None:
        if count > self._limits.inputs:
            raise TooLong(
                f"a request has {self._limits.inputs} inputs at most, got {count}; send several"
            )


def _check_kind(served: Served, kinds: Sequence[str], path: str) -> None:
    if served.kind not in kinds:
        other = "/v1/completions" if served.kind == "causal-lm" else "/v1/classify"
        raise WrongKind(
            f"{path} is for {' and '.join(kinds)}, and version {served.version[:12]} is for "
            f"{served.kind}; ask {other}"
        )
