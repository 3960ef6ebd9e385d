"""Tokens as text while they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"


class Wording:
    """The text of one answer, said piece by piece.

    All pieces together are the answer up to the first stop text, which is not in it.

    Args:
        tokenizer: the base model's.
        prompt: the tokens before the answer; how its first token is written may depend on them.
        stops: texts at which the answer ends.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens = list(prompt[-6:])
        self._from, self._read = 0, len(self._tokens)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return what a further token adds to what may be said; empty as long as it may not."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before = self._text(self._from, self._read)
        now = self._text(self._from, len(self._tokens))
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        return self._said(now[len(before) :])

    def end(self) -> str:
        """Return what was held back: the answer is over."""
        if self.stopped:
            return ""
        before = self._text(self._from, self._read)
        rest = self._text(self._from, len(self._tokens))[len(before) :]
        said = self._said(rest)
        held, self._held = self._held, ""
        return said if self.stopped else said + held

    def _text(self, start: int, stop: int) -> str:
        text: str = self._tokenizer.decode(
            self._tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _said(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            said, self._held = self._held[: min(found)], ""
            return said
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        said, self._held = self._held[:cut], self._held[cut:]
        return said


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of ``text`` may be the beginning of ``stop``."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
