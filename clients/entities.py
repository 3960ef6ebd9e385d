"""Entities in tags, and how well predicted ones match: strict, by whole entities (CoNLL-2003).

An entity counts as found if its kind, its first and its last word are right. As in seqeval's strict
mode for IOB2, an ``I-`` that continues nothing of its kind is no entity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def entities(tags: Iterable[str]) -> set[tuple[str, int, int]]:
    """Return each entity's kind, first word and the word after its last.

    >>> sorted(entities(["B-A", "I-A", "O", "I-A", "B-B", "B-B"]))
    [('A', 0, 2), ('B', 4, 5), ('B', 5, 6)]
    """
    found: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    place = 0
    for place, tag in enumerate([*tags, ""]):
        if kind and tag != f"I-{kind}":
            found.add((kind, start, place))
            kind = ""
        if tag.startswith("B-"):
            kind, start = tag[2:], place
    return found


def entity_scores(
    truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]
) -> dict[str, float]:
    """Return ``entity_f1``, ``entity_precision`` and ``entity_recall`` over all texts together.

    Args:
        truth: each text's tags.
        predicted: each text's predicted tags, as many.

    Returns:
        Nothing where there is no entity to be found. Without any predicted one, all are 0.
    """
    wanted = found = right = 0
    for true, guess in zip(truth, predicted, strict=True):
        there, said = entities(true), entities(guess)
        wanted, found, right = wanted + len(there), found + len(said), right + len(there & said)
    if not wanted:
        return {}
    return {
        "entity_f1": 2 * right / (wanted + found),
        "entity_precision": right / found if found else 0.0,
        "entity_recall": right / wanted,
    }
