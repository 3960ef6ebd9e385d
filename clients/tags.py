"""Tags of words: which words a record has, and which tag each of them has.

The declared label set is the set of tags. Where it is ``O`` with ``B-NAME`` and ``I-NAME``, they
mark entities in the scheme BIO (also IOB2): ``B-`` on an entity's first word, ``I-`` on its others.
Any other label set is of tags that each stand for themselves, such as parts of speech.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OUTSIDE = "O"
IGNORED = -100  # the tag of a word that is neither learned nor scored

Places = tuple[tuple[int, int], ...]
"""Where the words of a text begin and end, in characters, in order."""


class BadTags(ValueError):
    """A record's tags do not fit its words; the message says nothing of what the words are."""


def is_bio(labels: Sequence[str]) -> bool:
    """Return whether these tags mark entities: ``O``, and no ``I-NAME`` without its ``B-NAME``.

    >>> is_bio(["O", "B-DRUG", "I-DRUG"]), is_bio(["NOUN", "VERB"]), is_bio(["O", "I-DRUG"])
    (True, False, False)
    """
    known = set(labels)
    return OUTSIDE in known and all(
        tag == OUTSIDE or (tag[:2] in ("B-", "I-") and f"B-{tag[2:]}" in known) for tag in known
    )


def scheme_problem(labels: Sequence[str], task_labels: Sequence[str] = ()) -> str | None:
    """Return what is wrong with a set of tags, or with a task's part of it; None if nothing is."""
    odd = [tag for tag in labels if tag[:2] in ("B-", "I-")]
    if odd and not is_bio(labels):
        return (
            f"labels: {odd[0]!r} marks entities, whose tags are 'O', 'B-NAME' and 'I-NAME' (BIO), "
            f"and the label set is {', '.join(labels)}; convert the tags, or name them otherwise"
        )
    if not task_labels or not odd:
        return None
    wanted = {OUTSIDE} | {f"{b}-{t[2:]}" for t in task_labels if t != OUTSIDE for b in "BI"}
    lacking = sorted((wanted & set(labels)) - set(task_labels))
    if lacking:
        return (
            f"task_labels: without {lacking[0]!r} entities cannot be told from what is around "
            "them; give 'O', and of each kind both tags"
        )
    return None


def words_of(text: str) -> Places:
    """Return the words of a text: runs of letters, runs of digits, and any other sign by itself.

    In scripts that put no spaces between words, Chinese and Japanese, each sign is a word.

    >>> [ "5mg at night"[a:b] for a, b in words_of("5mg at night") ]
    ['5', 'mg', 'at', 'night']
    """
    found: list[tuple[int, int]] = []
    before = ""
    for place, sign in enumerate(text):
        kind = _kind(sign)
        if kind == "joiner":
            kind = "letter" if before == "letter" else ""
        if kind and kind == before and kind != "alone":
            found[-1] = (found[-1][0], place + 1)
        elif kind:
            found.append((place, place + 1))
        before = kind
    return tuple(found)


def _kind(sign: str) -> str:
    category = unicodedata.category(sign)
    if "\u3040" <= sign <= "\u30ff" or "\u3400" <= sign <= "\u9fff" or sign >= "\U00020000":
        return "alone"
    if category[0] in "LM":
        return "letter"
    if category == "Cf":
        return "joiner"
    if category[0] in "ZC":
        return ""
    return "digit" if category == "Nd" else "alone"


def joined(tokens: Sequence[str]) -> tuple[str, Places]:
    """Return ``tokens`` as one text with a space between each two, and where each lies in it."""
    places, end = [], -1
    for token in tokens:
        places.append((end + 1, end + 1 + len(token)))
        end += 1 + len(token)
    return " ".join(tokens), tuple(places)


def refuse_broken(tags: Sequence[str]) -> None:
    """Refuse entities that begin in their middle.

    Raises:
        BadTags: naming the first tag that continues nothing.
    """
    before = OUTSIDE
    for number, tag in enumerate(tags, start=1):
        if tag.startswith("I-") and before[2:] != tag[2:]:
            raise BadTags(
                f"tag {number} ({tag}) continues no entity of its kind; one begins with B-{tag[2:]}"
            )
        before = tag


def spans_to_tags(
    text: str, spans: Sequence[Any], labels: Sequence[str]
) -> tuple[Places, tuple[str, ...]]:
    """Return the words of ``text`` and their tags, from spans of characters.

    Args:
        text: of the record.
        spans: ``{"start": 0, "end": 4, "label": "DRUG"}``, the end not being part of it; in any
            order.
        labels: the tags; a span's label is one of them, or in BIO what follows ``B-``.

    Raises:
        BadTags: naming the first span that is none, overlaps another, or cuts a word.
    """
    words = words_of(text)
    if not words:
        raise BadTags("the text has no word")
    tags = [OUTSIDE] * len(words)
    taken: dict[int, int] = {}
    for number, (start, end, label) in enumerate(_spans(spans, len(text), labels), start=1):
        inside = [i for i, (a, b) in enumerate(words) if a < end and b > start]
        if not inside:
            raise BadTags(f"span {number} covers no word")
        if words[inside[0]][0] < start or words[inside[-1]][1] > end:
            cut = "begins" if words[inside[0]][0] < start else "ends"
            raise BadTags(
                f"span {number} {cut} inside a word (characters {start} to {end}); widen it to "
                "whole words, or give tokens and tags"
            )
        for index in inside:
            if index in taken:
                raise BadTags(f"spans {taken[index]} and {number} overlap; a word has one tag")
            taken[index] = number
            tags[index] = label
            if f"B-{label}" in labels:
                tags[index] = f"{'B' if index == inside[0] else 'I'}-{label}"
    return words, tuple(tags)


def _spans(
    spans: Sequence[Any], length: int, labels: Sequence[str]
) -> Iterator[tuple[int, int, str]]:
    kinds = [tag.removeprefix("B-") for tag in labels if tag[:2] != "I-" and tag != OUTSIDE]
    for number, span in enumerate(spans, start=1):
        if not isinstance(span, Mapping) or not {"start", "end", "label"} <= span.keys():
            raise BadTags(f"span {number} must be an object with start, end and label")
        start, end, label = span["start"], span["end"], span["label"]
        if type(start) is not int or type(end) is not int or not 0 <= start < end <= length:
            raise BadTags(
                f"span {number} must have 0 <= start < end <= {length}, the text's characters"
            )
        if label not in kinds:
            shown = repr(label) if len(str(label)) <= 40 else f"of {len(str(label))} characters"
            raise BadTags(
                f"span {number}: label {shown} is outside the label set ({', '.join(kinds)})"
            )
        yield start, end, label
