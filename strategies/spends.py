"""What privacy costs: events that compose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrivacySpend:
    """One composable privacy event: a mechanism applied to one population's data.

    Attributes:
        mechanism: ``"gaussian"`` for DP-SGD (a Poisson-subsampled Gaussian mechanism), and for
            noise in a sum over clients (not subsampled).
        unit: whose presence is hidden: ``"example"``, a column name such as ``"patient_id"``, or
            ``"client"``.
        adjacency: ``"add-remove"``; or ``"zero-out"``, in which a client's every change is replaced
            by none, and who was asked and answered is no secret.
        parameters: for ``gaussian``: ``noise_multiplier`` (> 0), ``sample_rate`` (0..1],
            ``steps`` (a whole number >= 1).
    """

    mechanism: str
    unit: str
    adjacency: str
    parameters: Mapping[str, float]


CLIENT_UNIT, ZERO_OUT = "client", "zero-out"


@dataclass(frozen=True, slots=True)
class ClientLevel:
    """Client-level differential privacy: what one round does with all its clients' changes.

    Attributes:
        clip: norm of a client's whole change in a round, at most, > 0.
        noise_multiplier: standard deviation of the noise in the sum of the changes, over ``clip``,
            > 0.
        cohort: what the sum is divided by, however many answer, >= 1.
    """

    clip: float
    noise_multiplier: float
    cohort: int

    @property
    def spend(self) -> PrivacySpend:
        """What a round costs a client whose change is in its sum.

        Taking the change out moves the sum by at most ``clip``. Putting another in its place moves
        it by twice that, which costs what half the noise multiplier does. Nothing is gained from
        asking few of many clients: who was asked is known.
        """
        return PrivacySpend(
            mechanism="gaussian",
            unit=CLIENT_UNIT,
            adjacency=ZERO_OUT,
            parameters={
                "noise_multiplier": self.noise_multiplier,
                "sample_rate": 1.0,
                "steps": 1.0,
            },
        )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in every entry of the round's mean change."""
        return self.noise_multiplier * self.clip / self.cohort
