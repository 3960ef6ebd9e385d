"""Answers in OpenAI's shapes, each with the version that gave it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clients.serving.classifying import Labelled
from clients.serving.generating import Piece, Token
from orchestrator.serving.asking import Tagged
from orchestrator.serving.shelf import Served

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Answer:
    """What was said so far to one prompt."""

    text: list[str] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take a further piece in."""
        self.text.append(piece.text)
        self.pieces.append(piece)


@dataclass(frozen=True, slots=True)
class Shape:
    """How the answers to one request look.

    Attributes:
        model: as it was asked for.
        version: id of the version that answers.
        chat: whether it is a conversation's next turn.
        prompt_tokens: of all prompts.
        id: of the answer.
        created: seconds since 1970.
    """

    model: str
    version: str
    chat: bool
    prompt_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the answer to a request that is not streamed."""
        return {
            **self._about(""),
            "choices": [self._choice(i, one) for i, one in enumerate(answers)],
            "usage": self.usage([one.pieces[-1].num_tokens for one in answers]),
        }

    def chunk(self, index: int, piece: Piece) -> bytes:
        """Return a server-sent event: a further piece of one answer."""
        choice: dict[str, Any] = {"index": index, "finish_reason": piece.finish}
        choice["logprobs"] = self._logprobs([piece])
        if self.chat:
            role = {"role": "assistant"} if piece.num_tokens == 1 else {}
            choice["delta"] = {**role, "content": piece.text}
        else:
            choice["text"] = piece.text
        return sse({**self._about(".chunk"), "choices": [choice]})

    def last(self, tokens: Sequence[int]) -> bytes:
        """Return the server-sent event that says what a stream used."""
        return sse({**self._about(".chunk"), "choices": [], "usage": self.usage(tokens)})

    def usage(self, tokens: Sequence[int]) -> dict[str, int]:
        """Return what was used, given the tokens of each answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": sum(tokens),
            "total_tokens": self.prompt_tokens + sum(tokens),
        }

    def _about(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "version": self.version,
        }

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        text = "".join(answer.text)
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"message": {"role": "assistant", "content": text}}
        finish = answer.pieces[-1].finish
        logprobs = self._logprobs(answer.pieces)
        return {"index": index, **said, "finish_reason": finish, "logprobs": logprobs}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        told = [(piece.token, piece.alternatives) for piece in pieces if piece.token is not None]
        if not told:
            return None
        if self.chat:
            content = [
                {**_token(token), "top_logprobs": [_token(one) for one in others]}
                for token, others in told
            ]
            return {"content": content}
        return {
            "tokens": [token.text for token, _ in told],
            "token_logprobs": [token.logprob for token, _ in told],
            # half characters look alike: the likeliest of them counts
            "top_logprobs": [{o.text: o.logprob for o in reversed(others)} for _, others in told],
        }


def sse(document: dict[str, Any]) -> bytes:
    """Return a document as a server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def _token(one: Token) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.text.encode())}


def classified(
    model: str, served: Served, asked: Sequence[Any], found: Sequence[Labelled]
) -> dict[str, Any]:
    """Return the labels of texts, or of the words of texts.

    Args:
        model: as it was asked for.
        served: the version that answered.
        asked: the texts, tagged or not.
        found: the probabilities, by text.
    """
    data = []
    for index, (one, labelled) in enumerate(zip(asked, found, strict=True)):
        rows = labelled.probabilities.tolist()
        if isinstance(one, Tagged):
            data.append({"index": index, "words": _words(one, rows, served.labels)})
        else:
            scores = dict(zip(served.labels, rows[0], strict=True))
            data.append({"index": index, "label": _best(scores), "scores": scores})
    tokens = sum(len((one.text if isinstance(one, Tagged) else one).tokens) for one in asked)
    return {
        "object": "list",
        "model": model,
        "version": served.version,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _words(
    one: Tagged, rows: Sequence[Sequence[float]], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return each word's place and label; one that the model does not see has the label null."""
    said = []
    for (start, end), place in zip(one.words, one.places, strict=True):
        scores = {} if place is None else dict(zip(labels, rows[place], strict=True))
        label = _best(scores) if scores else None
        said.append(
            {"start": start, "end": end, "label": label, "score": scores.get(label or "", None)}
        )
    return said


def _best(scores: dict[str, float]) -> str:
    return max(scores, key=lambda label: scores[label])
