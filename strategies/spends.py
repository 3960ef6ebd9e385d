"""What privacy costs: events that compose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace


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


def of_a_share(spend: PrivacySpend, shares: int) -> PrivacySpend:
    """Return what a noised sum costs against whoever sees each client's part of it by itself.

    Args:
        spend: of the sum, a Gaussian mechanism.
        shares: how many clients' parts have its noise together, in equal parts; >= 1.
    """
    noise = float(spend.parameters["noise_multiplier"]) / math.sqrt(shares)
    return replace(spend, parameters={**spend.parameters, "noise_multiplier": noise})


@dataclass(frozen=True, slots=True)
class ClientLevel:
    """Client-level differential privacy: what one round does with all its clients' changes.

    Attributes:
        clip: norm of a client's whole change in a round, at most, > 0.
        noise_multiplier: standard deviation of the noise in the sum of the changes, over ``clip``,
            > 0.
        cohort: what the sum is divided by, however many answer, >= 1.
        quantile: the share of changes that ``clip`` is to be at least as long as, in (0, 1): it
            moves there from round to round (arXiv 1905.03871). None leaves it where it is.
    """

    clip: float
    noise_multiplier: float
    cohort: int
    quantile: float | None = None

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
    def bound(self) -> float:
        """To what a client shortens its change itself: if what it cuts is not to be counted."""
        return self.clip if self.quantile is None else math.inf

    @property
    def count_std(self) -> float:
        """Standard deviation of the noise in how many changes are within ``clip``.

        The paper's twentieth of the cohort, and never so little that the changes get no room.
        """
        return max(self.cohort / 20, self.noise_multiplier)

    @property
    def sum_std(self) -> float:
        """Standard deviation of the noise in every entry of the sum.

        With a quantile the count has a share of the privacy: each client moves it by a half (it
        counts 1/2 or -1/2). Sum and count together are one Gaussian mechanism of
        ``noise_multiplier`` (theorem 1 of the paper), so that the spend is the same.
        """
        if self.quantile is None:
            return self.noise_multiplier * self.clip
        left = self.noise_multiplier**-2 - (2 * self.count_std) ** -2
        return self.clip / math.sqrt(left)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in every entry of the round's mean change."""
        return self.sum_std / self.cohort

    def after(self, share: float) -> ClientLevel:
        """Return the next round's, where ``share`` of the changes were within ``clip``.

        The paper's geometric step, at its rate of 0.2.
        """
        if self.quantile is None:
            return self
        return replace(self, clip=self.clip * math.exp(-0.2 * (share - self.quantile)))
