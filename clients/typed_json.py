"""Frozen dataclasses as JSON and back, by the types of their fields.

For bytes of strangers: what does not fit its type is refused with a sentence, nothing is converted,
and whole numbers stay whole, so that what is read has the digest of what was written. Mappings of
tensors stand in the JSON as names of parts, which lie beside it.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from clients.assignment import Assignment
from strategies.base import Broadcast, Tensors

Named: TypeAlias = Callable[[Tensors], str]
"""Returns the name of the part that holds tensors, of which there is at least one."""

Part: TypeAlias = Callable[[str], Tensors]
"""Returns the tensors of the part of a name; raises :class:`Unfit`."""

_DEEPEST = 16
_LARGEST = 2**63
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_MALFORMED = (RecursionError, UnicodeDecodeError, ValueError)


class Unfit(ValueError):
    """A document that is not of its type."""


def canonical(document: Any) -> bytes:
    """Return a document as JSON of which there is one spelling.

    Raises:
        ValueError: if a number in it is not finite.
        TypeError: if something in it is nothing that JSON has.
    """
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_as_dict
    )
    return text.encode()


def parsed(data: bytes) -> Any:
    """Return what canonical JSON says, nested at most 16 deep.

    Raises:
        Unfit: if it is anything else, such as JSON in another spelling or with a key twice.
    """
    try:
        document = json.loads(data.decode(), parse_constant=_refuse_constant)
        _check(document, "it", _DEEPEST)
        if canonical(document) != data:
            raise Unfit("it is not in canonical form")
    except Unfit:
        raise
    except _MALFORMED as error:
        raise Unfit(f"it is not JSON ({type(error).__name__})") from error
    return document


def to_json(kind: Any, value: Any, named: Named) -> Any:
    """Return a value as JSON.

    Args:
        kind: the value's type: a dataclass, or what its fields are declared as.
        value: the value.
        named: puts tensors beside the JSON.
    """
    if kind == Tensors:
        return named(value) if value else ""
    if isinstance(kind, type) and is_dataclass(kind):
        return {
            name: to_json(own, getattr(value, name), named) for name, own in _hints(kind).items()
        }
    if _optional(kind) is not None:
        return None if value is None else to_json(_optional(kind), value, named)
    if get_origin(kind) is tuple:
        return [to_json(get_args(kind)[0], one, named) for one in value]
    return value


def from_json(kind: Any, value: Any, where: str, part: Part) -> Any:
    """Return the value of a type that :func:`to_json` gave.

    Args:
        kind: the type.
        value: what :func:`parsed` returned.
        where: what the value is, for messages.
        part: returns what lies beside the JSON.

    Raises:
        Unfit: if it is not of that type; the message says where.
    """
    if kind == Tensors:
        name = _scalar(str, value, where)
        return part(name) if name else {}
    if is_dataclass(kind):
        return _made(kind, value, where, part)
    if (inner := _optional(kind)) is not None:
        return None if value is None else from_json(inner, value, where, part)
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        _require(isinstance(value, list), where, "a list", value)
        return tuple(from_json(args[0], v, f"{where}[{i}]", part) for i, v in enumerate(value))
    if origin is Mapping:
        _require(isinstance(value, dict), where, "an object", value)
        return {k: from_json(args[1], v, f"{where}.{k}"[:120], part) for k, v in value.items()}
    return _scalar(kind, value, where)


def _scalar(kind: Any, value: Any, where: str) -> Any:
    """Return a value of a type without parts, as it is."""
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        words = f"one of {', '.join(map(str, allowed))}"
        _require(type(value) is str and value in allowed, where, words, value)
    elif kind is not Any:
        fits = type(value) is kind or (kind is float and type(value) is int)
        _require(fits, where, _WORDS[kind], value)
    return value


def _made(kind: Any, value: Any, where: str, part: Part) -> Any:
    _require(isinstance(value, dict), where, "an object", value)
    hints = _hints(kind)
    odd = sorted(value.keys() ^ hints.keys())
    if odd:
        wrong = "is not known here" if odd[0] in value else "is missing"
        raise Unfit(f"{where}.{shown(odd[0])} {wrong}")
    own = {name: from_json(h, value[name], f"{where}.{name}", part) for name, h in hints.items()}
    return kind(**own)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    own = {"Broadcast": Broadcast, "Tensors": Tensors} if kind is Assignment else {}
    hints = get_type_hints(kind, localns=own)
    return {f.name: hints[f.name] for f in fields(kind)}


def _optional(kind: Any) -> Any:
    """Return the type that a value has where it is not None; None for a type without None."""
    if get_origin(kind) not in (Union, types.UnionType):
        return None
    return next(one for one in get_args(kind) if one is not type(None))


def _check(value: Any, where: str, depth: int) -> None:
    """Refuse what no document of ours holds, whatever its type: huge numbers, broken text, depth.

    Raises:
        Unfit: naming it.
    """
    if depth == 0:
        raise Unfit(f"it is nested more than {_DEEPEST} deep")
    if isinstance(value, dict):
        for key, one in value.items():
            _check(key, "a key", depth)
            _check(one, key, depth - 1)
    elif isinstance(value, list):
        for one in value:
            _check(one, where, depth - 1)
    elif isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise Unfit(f"{shown(where)} is broken text")
    elif isinstance(value, (int, float)) and not abs(value) < _LARGEST:  # nor is NaN
        raise Unfit(f"{shown(where)} is a number beyond 2**63")


def shown(text: str) -> str:
    """Return what can be printed of a text, at most 60 letters."""
    return ascii(text)[1:-1][:60]


def _require(fits: bool, where: str, words: str, value: Any) -> None:
    if not fits:
        found = ascii(value)
        found = found if len(found) <= 60 else f"{found[:57]}..."
        raise Unfit(f"{shown(where)} must be {words}, got {found}")


def _refuse_constant(name: str) -> None:
    raise Unfit(f"it holds the number {name}")


def _as_dict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")
