"""How a run's rounds go: whom they ask, what is enough, what late updates count, when to stop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """A section of a run's file: frozen, finite, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Cohort(Strict):
    """Whom a round asks. Without size and fraction: everybody."""

    size: int | None = Field(default=None, ge=1)
    fraction: float | None = Field(default=None, gt=0, le=1)
    weight: Literal["uniform", "examples"] = "uniform"
    where: dict[str, str] = Field(default_factory=dict)
    over_provision: float = Field(default=0.0, ge=0, le=10)
    available_only: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Cohort:
        if self.size is not None and self.fraction is not None:
            raise ValueError("give size or fraction, not both")
        if self.over_provision and self.size is None and self.fraction is None:
            raise ValueError("over_provision asks more than a round needs; give size or fraction")
        return self

    def goal(self, num_clients: int) -> int:
        """Return with how many updates a round closes, of ``num_clients`` that may be asked."""
        if self.fraction is not None:
            return share(self.fraction, num_clients)
        return min(self.size or num_clients, num_clients)

    def to_ask(self, num_clients: int) -> int:
        """Return how many a round asks, of ``num_clients`` that may be asked."""
        return min(share(1 + self.over_provision, self.goal(num_clients)), num_clients)


class Staleness(Strict):
    """What an update counts that was trained from an older version (arXiv 2106.06639, 5.1)."""

    power: float = Field(default=0.5, ge=0)
    max_staleness: int = Field(default=10, ge=1)

    def weight(self, staleness: int) -> float:
        """Return ``(1 + staleness) ** -power``: what its change is multiplied by.

        Args:
            staleness: versions committed since the one it was trained from, >= 0.
        """
        return float((1 + staleness) ** -self.power)


class Asynchronous(Staleness):
    """Buffered asynchrony: aggregate whenever so many updates are in (FedBuff, 2106.06639)."""

    buffer: int = Field(ge=1)
    concurrency: int = Field(ge=1)


class Stop(Strict):
    """When a metric has not improved for so many evaluations, or rounds, the run ends."""

    metric: str = Field(min_length=1)
    patience: int = Field(default=3, ge=1)
    min_delta: float = Field(default=0.0, ge=0)
    mode: Literal["max", "min"] | None = None

    @property
    def highest(self) -> bool:
        """Whether more is better; by itself true of all metrics but losses and their like."""
        return (self.mode or ("min" if self.metric in LOWER_IS_BETTER else "max")) == "max"


class Retention(Strict):
    """How long the bytes of accepted updates are kept; their digests are kept for ever.

    ``until-closed`` is until the run is completed or cancelled, ``none`` until their round is
    committed, ``last`` those of the last rounds.
    """

    keep: Literal["until-closed", "all", "last", "none"] = "until-closed"
    last: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Retention:
        if (self.keep == "last") != (self.last is not None):
            raise ValueError("give until-closed, all, none, or {last: K}, the last K rounds")
        return self


TRAIN_LOSS = "train_loss"
"""The mean of what a round's clients tell of their loss: what of a run needs no held-back data."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", TRAIN_LOSS})
METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "loss"),
    "token-classification": (
        *("entity_f1", "entity_precision", "entity_recall"),
        *("accuracy", "macro_f1", "loss"),
    ),
    "causal-lm": ("loss", "perplexity", "bits_per_byte"),
}
"""What an evaluation measures, by the kind of model; the first is what a best version has best."""
ANSWERS = ("exact_match", "rouge_l")
"""What it measures besides where a causal model is asked for answers."""


def _short_cohort(value: Any) -> Any:
    """Accept ``cohort: 8``, ``cohort: 0.25`` and ``cohort: null``, which is everybody."""
    if isinstance(value, (Mapping, Cohort)):
        return value
    if value is None:
        return {}
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            "must be a number of clients (8), a share of them (0.25), or a mapping such as "
            f"{{size: 8, weight: examples}}, got {value!r}"
        )
    return {"size" if isinstance(value, int) else "fraction": value}


def _short_retention(value: Any) -> Any:
    """Accept ``retention: all`` and ``retention: {last: 5}``."""
    if isinstance(value, Mapping) and "keep" not in value and "last" in value:
        return {"keep": "last", **value}
    return {"keep": value} if isinstance(value, str) else value


def _quorum(value: Any) -> Any:
    """Accept a whole number >= 1, a share in (0, 1], or nothing."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or (number and (value >= 1 if isinstance(value, int) else 0 < value <= 1)):
        return value
    raise ValueError(
        f"must be a number of updates (6) or a share of the cohort (0.8), got {value!r}"
    )


class Rounds(Strict):
    """What of a run's file says how its rounds go."""

    rounds: int = Field(default=10, ge=1)
    cohort: Annotated[Cohort, BeforeValidator(_short_cohort)] = Cohort()
    quorum: Annotated[int | float | None, BeforeValidator(_quorum)] = None
    downlink: Literal["whole", "held"] = "whole"
    deadline_s: float = Field(default=3600.0, gt=0)
    late: Literal["drop", "keep"] = "drop"
    staleness: Staleness | None = None
    asynchronous: Asynchronous | None = None
    max_update_norm: float | None = Field(default=None, gt=0)
    retries: int = Field(default=1, ge=0)
    quarantine_after: int | None = Field(default=5, ge=1)
    stop: Stop | None = None
    select: Literal["last", "best"] = "last"
    retention: Annotated[Retention, BeforeValidator(_short_retention)] = Retention()

    @property
    def stale(self) -> Staleness | None:
        """What an update of an older version counts; None where such updates are dropped."""
        if self.asynchronous is None and self.late == "drop":
            return None
        return self.asynchronous or self.staleness or Staleness()

    def one_sum_problems(self) -> Iterable[str]:
        """Yield a sentence for each rule that a noised sum of clients' changes does not go with."""
        if self.stale is not None:
            yield (
                "privacy.level: client hides one change of each client in a sum, and with late: "
                "keep or asynchronous two of one client can be in it; leave them out"
            )
        if self.max_update_norm is not None:
            yield (
                "max_update_norm: whom it refuses would be told, and depends on data; at "
                "privacy.level: client, privacy.clip bounds every change already"
            )
        if self.retention.keep != "none":
            yield (
                "retention: at privacy.level: client no update is kept, because they are private "
                "in their sum only; leave it out, or give none"
            )

    def round_problems(self) -> Iterable[str]:
        """Yield a sentence for each combination that makes no sense."""
        size, asynchronous = self.cohort.size, self.asynchronous
        if isinstance(self.quorum, int) and size is not None and self.quorum > size:
            yield f"quorum: {self.quorum} is more than the cohort of {size}"
        if self.staleness is not None and self.late == "drop":
            yield "staleness: late updates are dropped and weigh nothing; it needs late: keep"
        if asynchronous is None:
            return
        if self.late == "keep":
            yield "late: an asynchronous run keeps late updates by itself; leave late out"
        if size is not None or self.cohort.fraction is not None:
            yield (
                "cohort: an asynchronous run asks concurrency clients at a time; leave size and "
                "fraction out (weight and where may stay)"
            )
        if isinstance(self.quorum, int) and self.quorum > asynchronous.buffer:
            yield f"quorum: {self.quorum} is more than the buffer of {asynchronous.buffer}"


def share(fraction: float, count: int) -> int:
    """Return ``fraction`` of ``count``, rounded up; what is only rounding of a float is not.

    >>> share(0.7, 10), share(0.25, 9), share(1.25, 8)
    (7, 3, 10)
    """
    return math.ceil(round(fraction * count, 9))
