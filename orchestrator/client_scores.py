"""What clients say of a version, on what they hold out: one weighted table. Pure.

Without privacy the scores are exact, and a mean counts each client by its examples. Under privacy
each tells noised sums (:mod:`clients.private_scores`), which are pooled: each unit counts alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from clients.assignment import Assignment, ModelSpec, Privacy, Report
from clients.evaluate import Evaluation
from orchestrator.backends.base import Failure, Result
from orchestrator.plan import Participant
from orchestrator.policy import LOWER_IS_BETTER
from strategies.pooled import COUNT, Estimate, Sums, kinds, scores_of, weighted

ERROR = "_error"
"""What the name of a score's standard error ends with."""

_MOST = 1e12  # of examples that a client can claim: more is no count, and drowns all others


@dataclass(frozen=True, slots=True)
class Row:
    """What one client says.

    Attributes:
        client: who.
        num_examples: how many examples, or under privacy units: noised, and never below 0.
        scores: by metric; none where it says nothing, or nothing that its noise does not hide.
        reason: why it says nothing, or empty.
    """

    client: str
    num_examples: float = 0.0
    scores: Mapping[str, Estimate] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """What all clients say.

    Attributes:
        rows: of each client, by name.
        mean: over all examples, or units.
        num_examples: of all clients; under privacy the sum of what they told, and not below 0.
        private: whether all of it is noised.
    """

    rows: tuple[Row, ...]
    mean: Mapping[str, Estimate]
    num_examples: float
    private: bool

    @property
    def metrics(self) -> dict[str, float]:
        """The means as numbers by name; those with noise with their standard errors."""
        found = {name: one.value for name, one in self.mean.items()}
        errors = {name + ERROR: one.error for name, one in self.mean.items() if self.private}
        return found | errors

    @property
    def failed(self) -> dict[str, str]:
        """Why clients say nothing, by name."""
        return {row.client: row.reason for row in self.rows if row.reason}

    def worst(self, metric: str) -> Row | None:
        """Return the client with the worst of a score; None if nobody has it."""
        having = [row for row in self.rows if metric in row.scores]
        choose = max if metric in LOWER_IS_BETTER else min
        return choose(having, key=lambda row: row.scores[metric].value, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON."""
        worst = {name: self.worst(name) for name in self.mean}
        return {
            **asdict(self),
            "worst": {name: row.client for name, row in worst.items() if row is not None},
        }


def private_scores(
    noise_multiplier: float, unit: str, bound: float, insecure_seed: int | None
) -> Privacy:
    """Return how a client tells its scores: one Gaussian without sampling.

    Args:
        noise_multiplier: > 0.
        unit: whose presence is hidden.
        bound: where losses are cut off, > 0.
        insecure_seed: replaces the secret key, for tests.
    """
    return Privacy(
        noise_multiplier,
        max_grad_norm=1.0,  # there is no gradient
        sample_rate=1.0,
        unit=unit,
        insecure_seed=insecure_seed,
        report=Report(loss=bound, count=True),
    )


def default_bound(model: ModelSpec) -> float:
    """Return where losses are cut off if nobody says: twice what guessing costs, chosen blindly."""
    return 10.0 if model.kind == "causal-lm" else 2 * math.log(len(model.labels))


def asked_of(
    base: Assignment, people: Iterable[Participant], private: Mapping[str, Privacy]
) -> list[Assignment]:
    """Return what clients are asked to score.

    Args:
        base: an evaluation; each gets it with its own data.
        people: each with a holdout.
        private: by client, how it tells its scores; those that are not named tell exact ones.
    """
    made = []
    for who in people:
        assert who.holdout is not None
        one = replace(
            base,
            client=who.name,
            data=replace(who.holdout, labels=base.data.labels),
            public=who.public,
            num_examples=0,
            steps=1,  # none is taken; with privacy a site wants a number
        )
        if who.name in private:  # answers of a causal model have no place among what is summed
            one = replace(one, privacy=private[who.name], answer_tokens=0)
        made.append(one)
    return made


def refusal(found: Evaluation, asked: Assignment) -> str | None:
    """Return why a client's answer is none, or None: it comes from outside."""
    values = list(found.metrics.values())
    if asked.privacy is not None:
        wanted = kinds(asked.model.kind)
        if set(found.sums) != set(wanted):
            return f"its scores are not the sums {', '.join(wanted)} that were asked for"
        values = list(found.sums.values())
        if any(abs(value) > _MOST for value in values):
            return f"a sum of its scores is beyond {_MOST:g}, which no data set has"
    elif not 0 < found.num_examples <= _MOST:
        return f"its number of examples must be 1 to {_MOST:g}, got {found.num_examples}"
    if not all(math.isfinite(value) for value in values):
        return "a score of it is no finite number"
    return None


def table(
    results: Iterable[Result],
    asked: Sequence[Assignment],
    refused: Mapping[str, str] | None = None,
) -> Table:
    """Return what clients say as one table.

    Args:
        results: of the assignments, in any order.
        asked: all of them with privacy, or none.
        refused: why others were not asked, by name.
    """
    known = {one.client: one for one in asked}
    rows = {client: Row(client, reason=why) for client, why in (refused or {}).items()}
    sums: dict[str, Sums] = {}
    exact: dict[str, tuple[float, Mapping[str, float]]] = {}
    for result in results:
        one, name = known[result.client], result.client
        if not isinstance(result, Evaluation):
            why = result.reason if isinstance(result, Failure) else "it sent an update"
            rows[name] = Row(name, reason=why)
        elif (why_not := refusal(result, one)) is not None:
            rows[name] = Row(name, reason=why_not)
        elif one.privacy is not None:
            assert one.privacy.report is not None
            noise, bound = one.privacy.noise_multiplier, one.privacy.report.loss
            sums[name] = Sums(result.sums, noise, bound)
            rows[name] = Row(name, max(result.sums[COUNT], 0.0), scores_of([sums[name]]))
        else:
            exact[name] = float(result.num_examples), result.metrics
            rows[name] = Row(name, exact[name][0], _exactly(result.metrics))
    ordered = tuple(rows[name] for name in sorted(rows))
    private = any(one.privacy is not None for one in asked)
    if private:
        told = [sums[name] for name in sorted(sums)]
        number = max(sum(one.sums[COUNT] for one in told), 0.0)  # each cut off adds up to more
        return Table(ordered, scores_of(told) if told else {}, number, private)
    means = weighted([exact[name] for name in sorted(exact)])
    return Table(ordered, _exactly(means), sum(row.num_examples for row in ordered), private)


def _exactly(scores: Mapping[str, float]) -> dict[str, Estimate]:
    return {name: Estimate(value) for name, value in scores.items()}
