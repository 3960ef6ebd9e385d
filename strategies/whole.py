"""Changes of whole parameters as layers that any merge takes, exactly.

A change of a bias or of a whole matrix is no product. Written as one column it is a product of rank
1, ``[size, 1] @ [1, 1]``, whose entries are the parameter's: merges that sum, choose by entry or
turn do to it what they do to a layer, at any rank and with nothing lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from strategies.base import Tensors
from strategies.tensors import Factors, lora_layers, lora_tensors


def as_layers(tensors: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
    """Return ``tensors`` with those of ``names`` as layers of one column, of scaling 1."""
    columns = {
        name: Factors(
            torch.ones(1, 1, dtype=tensors[name].dtype),
            tensors[name].reshape(-1, 1),
            torch.tensor(1.0),
        )
        for name in names
    }
    return {n: t for n, t in tensors.items() if n not in columns} | lora_tensors(columns)


def from_layers(tensors: Tensors, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return ``tensors`` with the layers of these names as parameters of these shapes again.

    >>> both = {"bias": torch.tensor([1.0, 2.0])}
    >>> from_layers(as_layers(both, ["bias"]), {"bias": [2]})
    {'bias': tensor([1., 2.])}
    """
    if not shapes:
        return dict(tensors)
    layers = lora_layers(tensors)
    found = dict(tensors)
    for name, shape in shapes.items():
        own = layers[name]
        for part in lora_tensors({name: own}):
            del found[part]
        product = own.scaling.double() * own.b.double() @ own.a.double()
        found[name] = product.reshape(list(shape)).to(own.b.dtype)
    return found
