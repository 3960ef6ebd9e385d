"""Adapters of the store that a strategy starts from: what of them fits the run's adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from strategies.base import Tensors
from strategies.cores import Cored
from strategies.tensors import Factors, lora_layers


class BadLibrary(ValueError):
    """These adapters of the store are no library for this strategy and adapter."""


def library_layers(
    library: Sequence[Tensors], like: Mapping[str, Factors] | Mapping[str, Cored]
) -> dict[str, list[Factors]]:
    """Return the library's layers that the run's adapter has too, by name: one of each that has it.

    Args:
        library: plain low-rank adapters, of any ranks.
        like: the layers of the run's adapter.

    Raises:
        BadLibrary: if an adapter has none of these layers, or one of another shape.
        NotLowRank: if one is not made of plain factors.
    """
    found: dict[str, list[Factors]] = {}
    for number, adapter in enumerate(library, 1):
        layers = lora_layers(adapter)
        for name, own in layers.items():
            if name not in like:
                continue
            shape, wanted = ([len(one.b), one.a.shape[1]] for one in (own, like[name]))
            if shape != wanted:
                raise BadLibrary(
                    f"adapter {number} of the library has layer {name!r} of shape {shape}, and the "
                    f"run's adapter has it of {wanted}; give adapters of one base model"
                )
            found.setdefault(name, []).append(own)
        if not layers.keys() & like.keys():
            raise BadLibrary(
                f"adapter {number} of the library has none of the run's layers (it has "
                f"{min(layers)!r}, the run {min(like)!r}); set adapter.target_modules and layers "
                "to those of the library"
            )
    return found
