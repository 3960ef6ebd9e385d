"""One way to write a JSON document, so that equal documents have equal hashes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


class NotJson(ValueError):
    """A value that should be JSON is not."""


class RecordCorrupt(RuntimeError):
    """What the database has of something cannot be read: it was changed from outside."""


def canonical_json(value: Any, what: str) -> str:
    """Return ``value`` as JSON text: sorted keys, no spaces, UTF-8 as it is, no NaN.

    Deterministic in its argument; mappings count as objects and tuples as arrays.

    Args:
        value: nested mappings with string keys, lists, strings, finite numbers, booleans, None.
        what: what the value is, for the error message.

    Raises:
        NotJson: naming the first place that holds something else.
    """
    plain = _plain(value, what)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def read_json(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object that was stored as ``text``.

    Args:
        text: as :func:`canonical_json` wrote it.
        what: what it belongs to, for the error message.

    Raises:
        RecordCorrupt: if it is no JSON object any more.
    """
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RecordCorrupt(
            f"the database's record of {what} is damaged: it holds something other than a JSON "
            "object; restore the database from a backup"
        )
    return found


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            # json would write the key 1 as "1": two different documents, one text
            if not isinstance(key, str):
                raise NotJson(f"{where} has the key {key!r}, and keys must be strings")
            _plain(key, f"a key of {where}")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise NotJson(f"{where} must be text that UTF-8 can write, got {value!r}")
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise NotJson(f"{where} must be a finite number, got {value!r}; leave it out")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    kind = type(value).__name__
    raise NotJson(f"{where} must be JSON (text, number, boolean, null, list, object), got a {kind}")
