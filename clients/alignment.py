"""Which of a tokenizer's pieces stands for a word: the first of those that it is cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clients.examples import Example
from clients.tags import IGNORED, Places
from clients.weights import UnsupportedBase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Aligned:
    """A text in pieces, with its words' places among them.

    Attributes:
        input_ids: the pieces.
        places: for each word the index of its first piece; None where it has none: the text was
            cut before it, the tokenizer makes nothing of it, or its piece began with another word.
    """

    input_ids: list[int]
    places: list[int | None]

    def targets(self, tags: Sequence[int]) -> list[int]:
        """Return what is learned at each piece: its word's tag, or -100."""
        found = [IGNORED] * len(self.input_ids)
        for place, tag in zip(self.places, tags, strict=True):
            if place is not None:
                found[place] = tag
        return found


def refuse_blind(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot say where in a text its pieces come from.

    Raises:
        UnsupportedBase: naming it.
    """
    if not tokenizer.is_fast:
        raise UnsupportedBase(
            f"token-classification needs to know where in a text each token stands, which a "
            f"{type(tokenizer).__name__} does not say; use a base model with a fast tokenizer"
        )


def aligned(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[Aligned]:
    """Return the texts of ``examples`` in at most ``limit`` pieces, special ones included.

    Raises:
        UnsupportedBase: as :func:`refuse_blind`.
    """
    if not examples:
        return []
    refuse_blind(tokenizer)
    found = tokenizer(
        [example.text for example in examples],
        truncation=True,
        max_length=limit,
        return_offsets_mapping=True,
    )
    return [
        Aligned(ids, _first_pieces(example.words, offsets))
        for example, ids, offsets in zip(
            examples, found["input_ids"], found["offset_mapping"], strict=True
        )
    ]


def _first_pieces(words: Places, offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Return for each word the first piece that has a part of it, and of no word before it."""
    pieces = [(start, end, i) for i, (start, end) in enumerate(offsets) if start < end]
    found: list[int | None] = []
    next_piece = 0
    for start, end in words:
        while next_piece < len(pieces) and pieces[next_piece][1] <= start:
            next_piece += 1
        if next_piece < len(pieces) and pieces[next_piece][0] < end:
            found.append(pieces[next_piece][2])
            next_piece += 1  # a piece stands for one word
        else:
            found.append(None)
    return found
