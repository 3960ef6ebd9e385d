"""One example: its text and its digest."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Example:
    """One validated record; its text is left out of ``repr``, and so out of logs.

    Classification has ``text``, maybe ``text_pair``, and ``label``; token-classification ``text``,
    ``words`` and ``tags``; causal-lm has ``text``, or ``prompt`` and ``completion``.

    Attributes:
        text: what is classified, or learned as a whole.
        text_pair: the second text of a pair.
        label: index into the model's label set.
        prompt: what the model is given.
        completion: what it learns to answer.
        words: where each word of the text begins and ends, in characters.
        tags: of the words, indices into the model's label set; -100 is neither learned nor scored.
        unit: whose it is, where that was asked for; no part of what it says.
    """

    text: str = field(default="", repr=False)
    text_pair: str | None = field(default=None, repr=False)
    label: int | None = None
    prompt: str | None = field(default=None, repr=False)
    completion: str | None = field(default=None, repr=False)
    words: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    tags: tuple[int, ...] = field(default=(), repr=False)
    unit: str | None = field(default=None, repr=False, compare=False)


def record_digest(example: Example, key: bytes | None) -> bytes:
    """Return the digest of one example, 32 bytes: the same wherever the same record stands.

    With a ``key`` it is an HMAC-SHA256, which tells nothing to who lacks the key. Without, anyone
    who has the record can confirm that it is there: for public data only.
    """
    record: list[object] = [
        *(example.text, example.text_pair, example.label, example.prompt, example.completion)
    ]
    if example.words:
        record += [example.words, example.tags]
    message = b"weft:record:1:" + json.dumps(record).encode()
    if key is None:
        return hashlib.sha256(message).digest()
    return hmac.digest(key, message, "sha256")


def digest(examples: Sequence[Example], key: bytes | None) -> str:
    """Return the digest of ``examples`` in hex; their order does not matter, repeats do."""
    records = b"".join(sorted(record_digest(example, key) for example in examples))
    message = b"weft:records:1:" + records
    if key is None:
        return hashlib.sha256(message).hexdigest()
    return hmac.digest(key, message, "sha256").hex()
