"""DARE: entries of a product are dropped at random, and the others grow to make up for them.

Source: arXiv 2311.03099. Its mask rate is 1 - density.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from strategies.entrywise import Rows
from strategies.tensors import Factors
from strategies.uplink import derived


def dropped(rows: Rows, density: float, seed: int) -> Tensor:
    """Return ``rows.values``, each entry kept with probability ``density`` and divided by it.

    Which entries are kept depends on the seed and on the adapter itself, its values and its layer,
    and on nothing else: not on its place among the adapters.

    Args:
        rows: of all adapters.
        density: in (0, 1]; 1 keeps all as they are.
        seed: any integer.
    """
    if density >= 1:
        return rows.values
    kept = torch.empty_like(rows.values, dtype=torch.bool)
    for place, term in enumerate(rows.terms):
        name = f"dare/{rows.layer}/{rows.start}/{_digest(term.factors)}"
        generator = torch.Generator().manual_seed(derived(seed, name))
        kept[place] = torch.rand(rows.values[place].shape, generator=generator) < density
    return torch.where(kept, rows.values / density, 0.0)


def _digest(factors: Factors) -> str:
    found = hashlib.sha256()
    for tensor in factors:
        found.update(tensor.double().contiguous().numpy().tobytes())
    return found.hexdigest()
