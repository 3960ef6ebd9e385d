"""What of a client's data is held out: never trained on, and what its scores are measured on.

A client names another data set for it, or splits a share off. Which records that is follows from a
keyed hash of what a record says, or of whose it is, so that it is the same in every run, whatever
the order, the labels and the task, and stays so when records come or go. The key is the site's own
and never leaves it: nobody else can tell on which side somebody's record is.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clients.assignment import Assignment, DataSpec
from clients.keys import data_key
from clients.sources import absolute, is_public

_BITS = 64


class BadHoldout(ValueError):
    """What is said of a client's holdout is no share and no data set."""


@dataclass(frozen=True, slots=True)
class Holdout:
    """What a client holds out.

    Attributes:
        share: of its own records, in (0, 1); 0 where ``data`` has them.
        by: the source's own name of the column whose values are held out whole; empty for records.
        data: URI of another data set that holds them, of the same columns; empty with a share.
    """

    share: float = 0.0
    by: str = ""
    data: str = ""

    @staticmethod
    def of(text: str) -> Holdout:
        """Return what a text says: ``0.1``, ``0.1:patient_id``, or a data set's URI.

        Raises:
            BadHoldout: if it is neither.

        >>> Holdout.of("0.1:patient_id")
        Holdout(share=0.1, by='patient_id', data='')
        """
        head, colon, tail = text.partition(":")
        try:
            share = float(head)
        except ValueError:
            if colon and tail:
                return Holdout(data=text)
            raise BadHoldout(
                f"a holdout is a share such as 0.1, a share of the people that a column names such "
                f"as 0.1:patient_id, or a data set such as jsonl:/data/held.jsonl, got {text!r}"
            ) from None
        if not 0 < share < 1 or (colon and not tail):
            raise BadHoldout(
                f"a holdout's share must be above 0 and below 1, and what follows ':' a column, "
                f"got {text!r}"
            )
        return Holdout(share, tail)

    def __str__(self) -> str:
        if self.data:
            return self.data
        return f"{self.share:g}:{self.by}" if self.by else f"{self.share:g}"

    def anchored(self) -> Holdout:
        """Return it with an absolute path, where it has one."""
        return replace(self, data=absolute(self.data)) if self.data else self

    def parts(self, whole: DataSpec) -> tuple[DataSpec, DataSpec]:
        """Return what of a client's data is trained on, and what its scores are measured on."""
        if self.data:
            return whole, replace(whole, uri=self.data)
        split = replace(whole, holdout=self.share, holdout_by=self.by)
        return replace(split, part="train"), replace(split, part="holdout")


def identity(texts: Sequence[str]) -> bytes:
    """Return what a record is known by here, 16 bytes: its words, whatever their case and space.

    Args:
        texts: what it says, or whose it is.
    """
    words = [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]
    return hashlib.sha256(b"weft:holdout:identity:1:" + json.dumps(words).encode()).digest()[:16]


def held_out(known_by: bytes, share: float, key: bytes | None) -> bool:
    """Return whether a record is held out; what a share holds out, a larger one does too.

    Args:
        known_by: what :func:`identity` gives.
        share: of all records there could be, in (0, 1): of those there are it is about as many.
        key: the site's secret; None for public data, which are split alike everywhere.
    """
    message = b"weft:holdout:1:" + known_by
    keyed = hashlib.sha256(message).digest() if key is None else hmac.digest(key, message, "sha256")
    return int.from_bytes(keyed[: _BITS // 8], "big") < share * 2.0**_BITS


def split_key(assignment: Assignment) -> bytes | None:
    """Return the key by which an assignment's data are split; None where nothing is, or secret.

    The site's own, whatever the run's ``insecure_seed``: every run must hold out the same.
    """
    spec = assignment.data
    if spec.part == "all" or assignment.public or is_public(spec.uri):
        return None
    return data_key(Path(assignment.site))
