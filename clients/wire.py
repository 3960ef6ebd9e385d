"""An Update as bytes and back: safetensors and JSON only, never pickle.

The same bytes are what the client stores before it sends, what travels, what the coordinator spills
to disk and what the digest in a version's recipe is of.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from strategies.base import Tensors, Update
from strategies.spends import PrivacySpend

_FORMAT = "weft-update-1"
_MALFORMED = (
    SafetensorError,
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What reading hostile bytes raises: 1e999 for a count, a header nested a million deep, ..."""


class BadUpdate(ValueError):
    """Bytes that are no update."""


def pack(update: Update) -> bytes:
    """Return ``update`` as canonical bytes: equal updates give equal bytes."""
    header = {
        "format": _FORMAT,
        "client": update.client,
        "round": update.round,
        "base": update.base,
        "num_examples": update.num_examples,
        "metrics": dict(update.metrics),
        "fingerprint": update.fingerprint,
        "spends": [spend_json(s) for s in update.spends],
    }
    tensors = {f"tensors/{k}": v for k, v in update.tensors.items()}
    tensors |= {f"memory/{k}": v for k, v in update.memory.items()}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    data: bytes = save(apart(tensors), metadata={"update": text})
    return data


def apart(tensors: Tensors) -> dict[str, Tensor]:
    """Return tensors as safetensors writes them: in order, on the CPU, none in another's memory."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return found


def unpack(data: bytes) -> Update:
    """Return the update in ``data``.

    Raises:
        BadUpdate: if the bytes are anything else.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        text = json.loads(data[8 : 8 + length])["__metadata__"]["update"]
        header = json.loads(text, parse_constant=_refuse_constant)
        if header["format"] != _FORMAT:
            raise BadUpdate(f"the update has format {header['format']!r}, expected {_FORMAT!r}")
        named = load(data)
        return Update(
            client=str(header["client"]),
            round=int(header["round"]),
            base=str(header["base"]),
            tensors=_part(named, "tensors/"),
            num_examples=int(header["num_examples"]),
            metrics={str(k): _finite(str(k), float(v)) for k, v in header["metrics"].items()},
            memory=_part(named, "memory/"),
            spends=tuple(spend_from_json(s) for s in header["spends"]),
            fingerprint=str(header["fingerprint"]),
        )
    except BadUpdate:
        raise
    except _MALFORMED as error:
        raise BadUpdate(f"the bytes are not an update ({type(error).__name__})") from error


def digest(data: bytes) -> str:
    """Return the sha256 of an update's bytes."""
    return hashlib.sha256(data).hexdigest()


def spend_json(spend: PrivacySpend) -> dict[str, Any]:
    """Return ``spend`` as JSON."""
    return {
        "mechanism": spend.mechanism,
        "unit": spend.unit,
        "adjacency": spend.adjacency,
        "parameters": dict(spend.parameters),
    }


def spend_from_json(document: dict[str, Any]) -> PrivacySpend:
    """Return the spend that :func:`spend_json` gave."""
    return PrivacySpend(
        mechanism=str(document["mechanism"]),
        unit=str(document["unit"]),
        adjacency=str(document["adjacency"]),
        parameters={str(k): float(v) for k, v in document["parameters"].items()},
    )


def _refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python's reader takes and JSON does not have."""
    raise BadUpdate(f"the update holds the number {name}; a client leaves out what is not finite")


def _finite(name: str, value: float) -> float:
    """Refuse what JSON has and a float has not: 1e999."""
    if not math.isfinite(value):
        raise BadUpdate(f"metric {name!r} is {value}; a client leaves out what is not finite")
    return value


def _part(named: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
