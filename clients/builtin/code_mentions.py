"""Code mentions: in a parameter's description, find the words that are code, and of what kind.

``The axis of x, or None`` has two, the parameter ``x`` and the value ``None``. The rows are the
descriptions of :mod:`clients.builtin.parameter_types`' packages: their authors marked what is code
with backticks, which are cut from the text. What a mention is follows from the docstring it stands
in: the name of one of its parameters, a value that Python can read, or any other code. It is what
entity recognition is in practice: many words outside, names that look like plain words, and tags by
people who were not always of one mind.

Honesty of the task:

- Train and test share no source file, and a description that occurs anywhere in training is not
  tested.
- A description without any mark is left out: its author may not have marked at all.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, TypedDict

from clients.builtin.docstrings import (
    CLIENTS,
    OPTIONS,
    by_split,
    cache_file,
    chosen,
    files_of,
    googledoc,
    kept,
    numpydoc,
)
from clients.tags import BadTags, spans_to_tags

__all__ = ["LABELS", "OPTIONS", "rows"]

LABELS = ("O", "B-PARAM", "I-PARAM", "B-VALUE", "I-VALUE", "B-CODE", "I-CODE")

_MAX_ROWS = 600  # of one client, both splits together: no library drowns the others
_MAX_CHARS = 300
_MIN_CHARS = 25
_MARKED = re.compile(r"(?::[\w:]+:)?(`{1,2})~?(?P<code>[^`\n]{1,60})\1(?:_{1,2}(?!\w))?")
_LINK = re.compile(r"\s*<[^>]*>$")
_END = re.compile(r"(?<=[.;])\s")


class Span(TypedDict):
    """One mention: characters of the text, the end not being part of it."""

    start: int
    end: int
    label: str


class Row(TypedDict):
    """One description with its mentions; ``file`` is relative to the package."""

    text: str
    spans: list[Span]
    client: str
    file: str


def rows(split: Literal["train", "test"] = "train", client: str | None = None) -> list[Row]:
    """Return the rows of a split, of one client or of all, in an order that is always the same.

    Raises:
        ValueError: if there is no such split or client.
    """
    return chosen(_load, split, client)


@lru_cache(maxsize=1)
def _load() -> dict[str, list[Row]]:
    def made() -> dict[str, list[Row]]:
        return split_rows([row for client in CLIENTS for row in parse_package(client)])

    return kept(cache_file("code-mentions", __file__), made)


def split_rows(found: list[Row]) -> dict[str, list[Row]]:
    """Return ``found`` by split; rows of one text are the same."""
    return by_split(found, lambda row: row["text"].lower())


def parse_package(client: str) -> list[Row]:
    """Return at most 600 rows of an installed package; none if it is not installed."""
    found: dict[str, Row] = {}
    for file, documents in files_of(client):
        for docstring in documents:
            for text, spans in mentions(docstring):
                row = Row(text=text, spans=spans, client=client, file=file)
                found.setdefault(text.lower(), row)
        if len(found) >= _MAX_ROWS:
            break
    return list(found.values())[:_MAX_ROWS]


def mentions(docstring: str) -> Iterator[tuple[str, list[Span]]]:
    """Yield the descriptions of a docstring's parameters that mention code, without the marks."""
    entries = [*numpydoc(docstring), *googledoc(docstring)]
    names = {name.strip(" *") for listed, _, _ in entries for name in listed.split(",")}
    for _, _, description in entries:
        text, spans = unmarked(" ".join(description.split()), names)
        if spans and len(text) >= _MIN_CHARS and "`" not in text and "::" not in text:
            try:
                spans_to_tags(text, spans, LABELS)
            except BadTags:  # such as the plural in `array`s
                continue
            yield text, spans


def unmarked(description: str, names: set[str]) -> tuple[str, list[Span]]:
    """Return a description without its marks, cut at a sentence's end, and what they were around.

    >>> unmarked("The axis of `x`, or ``None``.", {"x"})[0]
    'The axis of x, or None.'

    Args:
        description: on one line.
        names: the parameters of the docstring that it stands in.
    """
    parts: list[str] = []
    spans: list[Span] = []
    length = last = 0
    for mark in _MARKED.finditer(description):
        before, code = description[last : mark.start()], _LINK.sub("", mark["code"]).strip()
        if code:
            start = length + len(before)
            spans.append(Span(start=start, end=start + len(code), label=_kind(code, names)))
        parts += [before, code]
        length += len(before) + len(code)
        last = mark.end()
    text = "".join([*parts, description[last:]])
    ends = [m.start() for m in _END.finditer(text) if m.start() <= _MAX_CHARS]
    if len(text) > _MAX_CHARS:
        text = text[: ends[-1] if ends else 0]
    return text, [span for span in spans if span["end"] <= len(text)]


def _kind(code: str, names: set[str]) -> str:
    if code.strip("*") in names:
        return "PARAM"
    try:
        ast.literal_eval(code)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return "CODE"
    return "VALUE"
