"""Parameter types: read what a function parameter is for, predict its documented type.

``verbose: whether to print progress`` is a ``bool``. The rows are parsed with :mod:`ast` from the
docstrings of packages that weft depends on: nothing is downloaded, imported or executed. A client
is a library, so the clients differ as real ones do: in vocabulary, in habits, in which types they
use.

Honesty of the task:

- Train and test share no source file, and a description that occurs anywhere in training is not
  tested, whatever the parameter is called.
- The text does not spell the answer: the type, a stated default (``defaults to False``) and a
  leading type (``list of``) are cut from the description. What remains is what a person would
  write, which may still say much (``whether to …``).
- A parameter that takes several of the types (``int or list of int``) has no one answer and is left
  out.

The rows depend on the packages' versions and on nothing else. Parsing takes seconds, so the rows
are kept in the user's cache folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
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

__all__ = ["LABELS", "OPTIONS", "rows"]

LABELS = ("int", "float", "bool", "str", "array", "callable", "sequence", "mapping")

_MAX_ROWS = 1500  # of one client, both splits together: no library drowns the others
_MAX_CHARS = 300
_MIN_CHARS = 15


class Row(TypedDict):
    """One labelled parameter: ``label`` is one of LABELS, ``file`` relative to the package."""

    text: str
    label: str
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
    """Return the rows by split, from the cache where it has them."""

    def made() -> dict[str, list[Row]]:
        return _split([row for client in CLIENTS for row in _parse_package(client)])

    return kept(_cache_file(), made)


def _split(found: list[Row]) -> dict[str, list[Row]]:
    """Return ``found`` by split; rows of one description are the same, whatever the parameter."""
    return by_split(found, _description)


def _description(row: Row) -> str:
    return row["text"].partition(": ")[2].lower()


def _cache_file() -> Path | None:
    return cache_file("parameter-types", __file__)


def _parse_package(client: str) -> list[Row]:
    """Return at most ``_MAX_ROWS`` rows of an installed package; none if it is not installed."""
    found: dict[str, Row] = {}
    for file, documents in files_of(client):
        for name, kind, description in _parameters(documents):
            label, text = label_of(kind), clean(name, description)
            if label and text:
                found.setdefault(
                    text.lower(), Row(text=text, label=label, client=client, file=file)
                )
        if len(found) >= _MAX_ROWS:
            break
    return list(found.values())[:_MAX_ROWS]


def _parameters(documents: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the name, type and description of every parameter that docstrings document."""
    for docstring in documents:
        yield from numpydoc(docstring)
        yield from googledoc(docstring)


# --- parameters to rows ----------------------------------------------------------------------

_NOUNS = {
    "int": "int integer long",
    "float": "float double real number scalar",
    "bool": "bool boolean",
    "str": "str string path pathlike path-like filename",
    "array": "array ndarray array_like array-like arraylike tensor matrix",
    "callable": "callable function func",
    "sequence": "list tuple sequence iterable set container iterator collection",
    "mapping": "dict dictionary mapping mutablemapping ordereddict",
}
_LABEL_OF_NOUN = {noun: label for label, nouns in _NOUNS.items() for noun in nouns.split()}
_NOT_A_TYPE = re.compile(
    r"\b(?:optional(?!\[)|defaults?|keyword-only|required|if not|e\.g)\b.*", re.DOTALL
)
_CHOICES = re.compile(r"\{[^{}]*['\"\u2018\u201c][^{}]*\}|literal\[\s*['\"][^\]]*\]")


def label_of(kind: str) -> str | None:
    """Return the label of a documented type, or None if it has none or several.

    >>> label_of("`int`, *optional*, defaults to 8"), label_of("dict[str, int]")
    ('int', 'mapping')
    >>> label_of("int or list of int"), label_of("torch.dtype")
    (None, None)
    """
    text = kind.lower().translate({ord(mark): None for mark in "`~*"})
    text = _CHOICES.sub("str", text)
    text = re.sub(r":\w+:", "", _NOT_A_TYPE.sub("", text))
    text = re.sub(r"\b(?:typing\.)?(?:optional|union)\[(.*)\]", r"\1", text)
    while (flat := re.sub(r"\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}", " ", text)) != text:
        text = flat
    alternatives = [part.strip(" .:;") for part in re.split(r",|\bor\b|\|", text)]
    nouns = [_head_noun(part) for part in alternatives if part not in ("", "none")]
    labels = {_LABEL_OF_NOUN.get(noun) for noun in nouns} - {None}
    first = _LABEL_OF_NOUN.get(nouns[0]) if nouns else None
    return first if len(labels) == 1 else None


def _head_noun(phrase: str) -> str:
    """Return the noun that a type's phrase is about: ``sparse 2-d arrays of ints`` → ``array``."""
    words = re.split(r" (?:of|with|containing|from|to|like|in|that|which|representing)\b", phrase)
    noun = (words[0].split() or [""])[-1].rpartition(".")[2]
    noun = "tensor" if noun.endswith("tensor") else noun
    return noun if noun in _LABEL_OF_NOUN else noun.removesuffix("s")


_DIRECTIVE = re.compile(r"\.\. \w+::.*", re.DOTALL)
_ROLE = re.compile(r":\w+:(?=[`~])")
_DEFAULT = re.compile(
    r"[\s,;([]*\b(?:the )?defaults?(?: value)?"
    r"(?: is| are| to|[:=]| (?=['\"\d.-]|true|false|none)).*"
    r"| \(default\)"
    r"|\S+ by default\b.*",
    re.IGNORECASE,
)
_LEADING_TYPE = re.compile(
    r"\A(?:(?:an?|the|optional|python|\(?optional\)?[,:]?) )*"
    r"\(?(?:lists?|tuples?|sequences?|iterables?|dict(?:ionary|ionaries)?|mappings?|callables?"
    r"|functions?|(?:nd|numpy )?arrays?|array[_-]like|matrix|[\w.]*tensors?|str(?:ings?)?"
    r"|bool(?:eans?)?|int(?:egers?)?|floats?)\)?"
    r"(?: ?[,:;-]| of| containing| that| which| with)? +",
    re.IGNORECASE,
)


def clean(name: str, description: str) -> str | None:
    """Return ``name: description`` without markup or answer, or None if too little is left.

    >>> clean("tol", "Relative `tolerance` of the solver. Defaults to 1e-3.")
    'tol: Relative tolerance of the solver.'
    >>> clean("nodes", "list of nodes to start from, default: None")
    'nodes: nodes to start from'
    >>> clean("x", "the input") is None
    True
    """
    text = _DIRECTIVE.sub("", description)
    text = _ROLE.sub("", text).translate({ord(mark): None for mark in "`*~"})
    text = " ".join(text.split())
    sentences = [_DEFAULT.sub("", part) for part in re.split(r"(?<=[.;])\s+", text)]
    text = " ".join(part for part in sentences if len(part) > 1)
    text = _LEADING_TYPE.sub("", text)
    name = name.replace("*", "").strip()
    return f"{name}: {text}"[:_MAX_CHARS] if len(text) >= _MIN_CHARS else None
