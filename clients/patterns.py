"""Regular expressions of strangers: which ones end.

Python's engine tries one way after the other, and of some patterns there are more ways than
anyone can wait for: ``(a*)*b`` takes a day for thirty letters. Nothing can stop it on the way. A
pattern is taken here where the number of ways is bounded by what it looks like: it repeats nothing
that is in parentheses, refers to nothing that it matched, and each of its alternatives repeats or
chooses a few times at most. What weft's own strategies and adapters say is of that kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from clients.assignment import Assignment

_LONGEST = 1000
_MOST_REPEATS, _MOST_CHOICES = 3, 8  # each multiplies the ways: by a name's length, or by two
_OF_LAYERS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "block_a",
)  # options of adapters
_LITERAL = re.compile(r"\\[^0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]")
_GROUP = re.compile(r"\(\?(?:[:=!]|<[=!])")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_REFERENCE = re.compile(r"\\[0-9]|\(\?")


def odd_pattern(pattern: str) -> str:
    """Return why a stranger's pattern is not taken; empty where it is.

    >>> odd_pattern(r"(?!.*[.]past_[AB][.]weight$)(?!.*[.]scaling$).*")
    ''
    >>> odd_pattern("(a*)*b")
    'it repeats what is in parentheses'

    Args:
        pattern: to be matched with ``re.fullmatch`` against the names of tensors or modules.
    """
    if len(pattern) > _LONGEST:
        return f"it has {len(pattern)} letters, and at most {_LONGEST} are read"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return "it is no regular expression"
    bare = _GROUP.sub("(", _LITERAL.sub("x", pattern))
    if _REFERENCE.search(bare):
        return "it refers to what it matched, or sets flags"
    if _REPEATED_GROUP.search(bare):
        return "it repeats what is in parentheses"
    for one in _alternatives(bare):
        if sum(one.count(sign) for sign in "*+{?") > _MOST_REPEATS:
            return f"it repeats something more than {_MOST_REPEATS} times in a row"
        if one.count("|") > _MOST_CHOICES:
            return f"it chooses in parentheses more than {_MOST_CHOICES} times in a row"
    return ""


def patterns_of(asked: Assignment) -> list[str]:
    """Return the regular expressions in an assignment: of tensors, and of the base's modules."""
    found = [asked.broadcast.trainable, asked.broadcast.personal]
    for name in _OF_LAYERS:
        given = asked.adapter.options.get(name)
        one_or_more = [given] if isinstance(given, str) else given
        if isinstance(one_or_more, (list, tuple, Mapping)):
            found += [one for one in one_or_more if isinstance(one, str)]
    return found


def _alternatives(bare: str) -> list[str]:
    """Return a pattern's parts between the ``|`` that are in no parentheses."""
    found, depth = [""], 0
    for letter in bare:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "|" and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found
