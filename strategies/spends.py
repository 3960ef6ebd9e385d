"""What privacy costs: events that compose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrivacySpend:
    """One composable privacy event: a mechanism applied to one population's data.

    Attributes:
        mechanism: ``"gaussian"`` for DP-SGD (a Poisson-subsampled Gaussian mechanism).
        unit: whose presence is hidden: ``"example"`` or a column name such as ``"patient_id"``.
        adjacency: ``"add-remove"``.
        parameters: for ``gaussian``: ``noise_multiplier`` (> 0), ``sample_rate`` (0..1],
            ``steps`` (a whole number >= 1).
    """

    mechanism: str
    unit: str
    adjacency: str
    parameters: Mapping[str, float]
