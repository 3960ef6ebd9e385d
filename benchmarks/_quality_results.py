"""What the runs of a quality benchmark found: scores at equal steps and bytes, and orderings.

*Equal steps*: after the plan's rounds, for everybody. *Equal bytes*: the last score within what the
reference (FedAvg) moved up and down in those rounds; a run that moves less has gone on for longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from _quality_plan import Cell, Method
from scipy.stats import t as student

from storage.ledger import Event

Kind = Literal["steps", "bytes"]
KINDS: tuple[Kind, ...] = ("steps", "bytes")
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Score:
    """A score of a run, and what it had sent until then, all clients together, in bytes."""

    round: int
    accuracy: float
    up: int
    down: int


def curve(events: Iterable[Event]) -> list[Score]:
    """Return a run's scores with what was sent up to then.

    A client that was asked twice in a round, because the run was interrupted, counts once: how
    often the benchmark was stopped is no property of a method.
    """
    up: dict[tuple[int, str], int] = {}
    down: dict[tuple[int, str], int] = {}
    found = []
    for event in events:
        data = event.data
        if event.kind == "accepted":
            up[data["round"], data["client"]] = data["bytes"]
        elif event.kind == "assigned":
            for client in data["assigned"]:
                down[data["round"], client] = data["bytes"] // len(data["assigned"])
        elif event.kind == "evaluated":
            spent = sum(up.values()), sum(down.values())
            found.append(Score(data["round"], data["accuracy"], *spent))
    return found


def within(points: Sequence[Score], budget: int) -> Score | None:
    """Return the last score for which no more than ``budget`` bytes had moved."""
    affordable = [point for point in points if point.up + point.down <= budget]
    return affordable[-1] if affordable else None


def affordable_rounds(last: Score, budget: int) -> int:
    """Return how many rounds ``budget`` bytes are, at what a round has cost so far."""
    return budget * last.round // (last.up + last.down)


@dataclass(frozen=True, slots=True)
class Result:
    """What one run reached.

    Attributes:
        cell: on what.
        seed: its seed.
        method: its method's name.
        steps: its score after the plan's rounds.
        bytes: its score within the reference's bytes; None if there is none yet, or none so early.
    """

    cell: Cell
    seed: int
    method: str
    steps: Score
    bytes: Score | None

    def score(self, kind: Kind) -> float | None:
        """Return its accuracy at equal steps or bytes."""
        point = self.steps if kind == "steps" else self.bytes
        return None if point is None else point.accuracy


@dataclass(frozen=True, slots=True)
class Summary:
    """Scores over seeds: their mean, their sample standard deviation if several, their number."""

    mean: float
    spread: float | None
    n: int

    def __str__(self) -> str:
        """Return it in per cent, with the number of seeds where it is one."""
        spread = " (1 seed)" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


def summary(scores: Sequence[float]) -> Summary | None:
    """Return scores as a summary; None of none."""
    if not scores:
        return None
    return Summary(mean(scores), stdev(scores) if len(scores) > 1 else None, len(scores))


def summaries(results: Iterable[Result], kind: Kind) -> dict[tuple[Cell, str], Summary]:
    """Return the scores of each cell and method, over its seeds."""
    grouped: dict[tuple[Cell, str], list[float]] = {}
    for result in results:
        if (score := result.score(kind)) is not None:
            grouped.setdefault((result.cell, result.method), []).append(score)
    return {key: made for key, scores in grouped.items() if (made := summary(scores)) is not None}


@dataclass(frozen=True, slots=True)
class Claim:
    """A published ordering.

    Attributes:
        better: a method.
        worse: that is published to be worse.
        source: where.
        about: for what, and by how much.
        cells: which it is about; none for all.
    """

    better: str
    worse: str
    source: str
    about: str
    cells: tuple[Cell, ...] = ()


CLAIMS: tuple[Claim, ...] = (
    Claim("fedsvd", "ffa-lora", "2505.12805", "RoBERTa-large, GLUE, alpha = 0.5: 86.2 and 84.6"),
    Claim("fedsvd", "ffa-lora, orthonormal", "2505.12805", "MNLI at ε = 6: 71.7 and 55.6"),
    Claim("fedsvd", "fedavg", "2505.12805", "RoBERTa-large, GLUE, alpha = 0.5: 86.2 and 75.5"),
    Claim("ffa-lora", "fedavg", "2505.12805", "as a baseline there: 84.6 and 75.5"),
    Claim("fedavg", "ffa-lora", "2410.22815", "BANKING77, Dir(0.01), r = 8: 61.0 and 40.9"),
    Claim("flexlora", "fedavg", "2410.22815", "BANKING77, Dir(0.01), r = 8: 69.8 and 61.0"),
    Claim("fedex-lora", "fedavg", "2410.09432", "commonsense, 3 clients: 86.0 and 83.6"),
    Claim("fedex-lora", "ffa-lora", "2410.09432", "commonsense, 3 clients: 86.0 and 77.4"),
    Claim("fedavg", "fedex-lora", "2505.12805", "as a baseline there: 75.5 and 62.3"),
    Claim("flora", "fedavg", "2409.05976", "its abstract; the FedIT of its code is broken"),
    Claim("fedavg", "flora", "2505.12805", "as a baseline there: 75.5 and 57.1"),
    Claim("lora-fair", "fedavg", "2411.14961", "DomainNet, ViT: 77.1 and 75.8"),
    Claim("lora-fair", "flora", "2411.14961", "DomainNet, ViT: 77.1 and 75.5"),
    Claim("lora-fair", "flexlora", "2411.14961", "DomainNet, ViT: 77.1 and 76.0"),
    Claim("rolora", "fedavg", "2502.01755", "RoBERTa-large, 50 clients: 85.8 and 70.7"),
    Claim("rolora", "ffa-lora", "2502.01755", "RoBERTa-large, 50 clients: 85.8 and 76.5"),
    Claim("rolora", "flexlora", "2502.01755", "RoBERTa-large, 50 clients: 85.8 and 54.7"),
    Claim("scaffold, sgd", "fedavg, sgd", "1910.06378", "unlike clients, many local steps"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        claim: the claim.
        word: ``holds`` or ``reversed`` where the interval leaves 0 out, else ``undecided``;
            ``not measured`` with fewer than three pairs.
        difference: mean of the pairs' differences, better minus worse; None without a pair.
        margin: half of the 95 % interval of that mean, by Student's t; None with one pair.
        n: pairs: runs of both methods in the same cell with the same seed.
    """

    claim: Claim
    word: str
    difference: float | None
    margin: float | None
    n: int

    def __str__(self) -> str:
        """Return the difference in points, as people read it."""
        if self.difference is None:
            return "-"
        margin = "" if self.margin is None else f" ± {100 * self.margin:.1f}"
        return f"{100 * self.difference:+.1f}{margin} (n = {self.n})"


def judged(claim: Claim, results: Iterable[Result], kind: Kind) -> Verdict:
    """Return what results say of a claim, in pairs that share data, split and seed."""
    scores: dict[tuple[Cell, int], dict[str, float]] = {}
    for result in results:
        here = not claim.cells or result.cell in claim.cells
        if here and (score := result.score(kind)) is not None:
            scores.setdefault((result.cell, result.seed), {})[result.method] = score
    pairs = [
        found[claim.better] - found[claim.worse]
        for found in scores.values()
        if {claim.better, claim.worse} <= found.keys()
    ]
    if len(pairs) < 2:
        return Verdict(claim, "not measured", pairs[0] if pairs else None, None, len(pairs))
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1))
    margin = quantile * stdev(pairs) / math.sqrt(len(pairs))
    return Verdict(claim, _word(mean(pairs), margin, len(pairs)), mean(pairs), margin, len(pairs))


def _word(difference: float, margin: float, pairs: int) -> str:
    if pairs < 3:
        return "not measured"
    if abs(difference) <= margin:
        return "undecided"
    return "holds" if difference > 0 else "reversed"


@dataclass(frozen=True, slots=True)
class Tuned:
    """How a method's learning rate was chosen.

    Attributes:
        method: its name.
        accuracy: by rate, on held-back training rows; None where the run failed.
        missing: rates whose runs have not ended.
    """

    method: str
    accuracy: Mapping[float, float | None]
    missing: tuple[float, ...] = ()

    @property
    def rate(self) -> float | None:
        """The rate with the best score, the lowest of equals; None before all have ended."""
        scored = [(-score, rate) for rate, score in self.accuracy.items() if score is not None]
        return None if self.missing or not scored else min(scored)[1]

    def at_an_edge(self, method: Method) -> bool:
        """Return whether the best rate is the lowest or highest that was tried."""
        return self.rate in (min(method.rates), max(method.rates))
