"""What a gate asks of a version, check by check: each says whether it passed, and by how much.

Pure, but for what :mod:`orchestrator.gating` has read and measured before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.client_scores import ERROR
from orchestrator.continual import BadMatrix, Share, fallen
from orchestrator.gate_file import (
    EVERY,
    LOWER_IS_BETTER,
    BaseCheck,
    Bounds,
    Ceiling,
    LicenceCheck,
    SizeCheck,
    TasksCheck,
)
from orchestrator.gate_suite import Scored


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found.

    Attributes:
        check: ``metrics``, ``tasks``, ``size``, ``base``, ``licences``, ``signature`` or
            ``epsilon``.
        subject: of what, such as ``mail accuracy``.
        passed: whether it holds.
        found: the value that was found; None where there is none.
        wanted: the bound that it is held against; None where it is no number.
        short: by how much it fails, > 0; 0 where it passed, None where it is no number.
        said: a sentence.
        error: the standard error that noise gives ``found``, where clients told it; 0 where it is
            exact.
    """

    check: str
    subject: str
    passed: bool
    found: float | None
    wanted: float | None
    short: float | None
    said: str
    error: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Size:
    """How large what is served is: values of all tensors, their bytes, and the largest rank."""

    num_bytes: int
    num_parameters: int
    rank: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a version cost a population at one unit; ``epsilon`` None where nothing bounds it."""

    population: str
    unit: str
    epsilon: float | None


def unknown(check: str, subject: str, why: str) -> Check:
    """Return a check that could not be made, which is one that failed."""
    return Check(check, subject, False, None, None, None, f"cannot be checked: {why}")


def metrics(
    asked: Mapping[str, Mapping[str, Bounds]], version: Scored, there: Scored | None
) -> Iterator[Check]:
    """Yield a check for each bound of each metric.

    Args:
        asked: by data set and metric.
        version: that is to be moved to.
        there: that the alias points at; None for none, where nothing can be worse.
    """
    for data, bounds in asked.items():
        for metric, bound in bounds.items():
            subject = f"{data} {metric}"
            found = version.scores.get(data, {}).get(metric)
            if found is None:
                yield unknown("metrics", subject, _missing(version, data, metric))
                continue
            error = _error(version, data, metric)
            if bound.at_least is not None:
                check = _bounded("metrics", subject, found, bound.at_least, at_least=True)
                yield _with_noise(check, error)
            if bound.at_most is not None:
                check = _bounded("metrics", subject, found, bound.at_most, at_least=False)
                yield _with_noise(check, error)
            if bound.worse_by is not None and there is not None:
                before = there.scores.get(data, {}).get(metric)
                if before is None:
                    why = f"of the version there is now, {_missing(there, data, metric)}"
                    yield unknown("metrics", subject, why)
                else:
                    check = _relative(subject, metric, (before, found), bound.worse_by)
                    yield _with_noise(check, math.hypot(error, _error(there, data, metric)))


def tasks(asked: TasksCheck, version: Scored, there: Scored | None) -> Iterator[Check]:
    """Yield a check for each data set that the version there is now was scored on.

    Args:
        asked: how far a score may fall.
        version: that is to be moved to.
        there: that the alias points at; None for none: then nothing is past.
    """
    if there is None:
        return
    for data in sorted({*there.scores, *there.problems}):
        pair = []
        noise = math.hypot(*(_error(one, data, asked.metric) for one in (there, version)))
        for one in (there, version):
            scores = one.scores.get(data, {})
            if asked.metric not in scores:
                yield unknown("tasks", data, _missing(one, data, asked.metric))
                break
            pair.append(Share(scores[asked.metric], max(1, int(scores["num_examples"]))))
        else:
            try:
                fall = fallen(data, pair[0], pair[1], asked.tau, asked.confidence, noise)
            except BadMatrix as error:
                yield unknown("tasks", data, str(error))
                continue
            passed = fall.verdict == "holds" or (
                fall.verdict == "unclear" and asked.unclear == "pass"
            )
            bound = fall.low if fall.verdict == "falls" else fall.high
            said = (
                f"{asked.metric} fell by {fall.fall:.4g} ({asked.confidence:.0%} between "
                f"{fall.low:.4g} and {fall.high:.4g}), and may by {asked.tau:g}"
            )
            if fall.verdict == "unclear":
                said += f"; {pair[1].size} examples are too few to tell"
            short = 0.0 if passed else bound - asked.tau
            check = Check("tasks", data, passed, fall.fall, asked.tau, short, said)
            yield _with_noise(check, noise)


def size(asked: SizeCheck, found: Size) -> Iterator[Check]:
    """Yield a check for each bound of the size."""
    for subject, value, most in (
        ("bytes", found.num_bytes, asked.max_bytes),
        ("parameters", found.num_parameters, asked.max_parameters),
        ("rank", found.rank, asked.max_rank),
    ):
        if most is not None:
            yield _bounded("size", subject, value, most, at_least=False)


def base(asked: BaseCheck, found: str, there: str | None) -> Iterator[Check]:
    """Yield checks of the base model's hash against those allowed, and what there is now."""
    if asked.hashes:
        passed = any(found.startswith(one) for one in asked.hashes)
        known = ", ".join(one[:12] for one in asked.hashes)
        said = f"the base model is {found[:12]}, and allowed is {known}"
        yield Check("base", "hash", passed, None, None, None, said)
    if asked.same and there is not None:
        said = f"the base model is {found[:12]}, and that of the version there is now {there[:12]}"
        yield Check("base", "same", found == there, None, None, None, said)


def licences(asked: LicenceCheck, base_hash: str, on_card: str | None) -> Check:
    """Return the check of the base model's licence.

    Args:
        asked: what is allowed, and known.
        base_hash: of the base model.
        on_card: what the card beside the model's files says; None where there is none.
    """
    stated = [one for begins, one in asked.known.items() if base_hash.startswith(begins)]
    licence = stated[0] if stated else on_card
    if licence is None:
        why = (
            f"the base model {base_hash[:12]} has no card with a licence here; state it under "
            "licences.known"
        )
        return unknown("licences", "base model", why)
    passed = licence.lower() in {one.lower() for one in asked.allowed}
    said = f"the base model's licence is {licence}, and allowed is {', '.join(asked.allowed)}"
    return Check("licences", "base model", passed, None, None, None, said)


def epsilon(asked: Sequence[Ceiling], costs: Sequence[Cost]) -> Iterator[Check]:
    """Yield a check for each population and unit that a version cost something.

    A population that has a ceiling of its own is held against that and not against ``*``. What no
    ceiling is for (another unit) is not known to be bounded, and fails.

    Args:
        asked: the ceilings.
        costs: each at the δ of its ceiling.
    """
    for cost in costs:
        ceiling = ceiling_of(asked, cost.population, cost.unit)
        subject = f"{cost.population} by {cost.unit}"
        if cost.epsilon is None:
            said = "was trained on these data without differential privacy, so that no ε bounds it"
            yield Check("epsilon", subject, False, None, None, None, said)
        elif ceiling is None:
            yield unknown("epsilon", subject, "no ceiling names this unit; add one")
        else:
            found = _bounded("epsilon", subject, cost.epsilon, ceiling.at_most, at_least=False)
            said = (
                f"ε = {cost.epsilon:.4g} (δ = {ceiling.delta:g}, unit {cost.unit}), and may be at "
                f"most {ceiling.at_most:g}"
            )
            yield replace(found, said=said)


def ceiling_of(asked: Sequence[Ceiling], population: str, unit: str) -> Ceiling | None:
    """Return the ceiling that is for a population's unit; its own before that for all."""
    for name in (population, EVERY):
        for one in asked:
            if (one.population, one.unit) == (name, unit):
                return one
    return None


def _bounded(check: str, subject: str, found: float, bound: float, *, at_least: bool) -> Check:
    short = max(0.0, bound - found if at_least else found - bound)
    word = "least" if at_least else "most"
    said = f"{subject} is {found:.6g}, and must be at {word} {bound:g}"
    return Check(check, subject, short == 0, float(found), float(bound), float(short), said)


def _relative(subject: str, metric: str, pair: tuple[float, float], worse_by: float) -> Check:
    before, after = pair
    worse = after - before if metric in LOWER_IS_BETTER else before - after
    short = max(0.0, worse - worse_by)
    said = (
        f"{subject} is {after:.6g}, {abs(worse):.4g} {'worse' if worse > 0 else 'better'} than "
        f"the {before:.6g} there is now, and may be worse by {worse_by:g}"
    )
    return Check("metrics", subject, short == 0, worse, worse_by, short, said)


def _error(version: Scored, data: str, metric: str) -> float:
    """Return the standard error that noise gives a score; 0 for an exact one."""
    return version.scores.get(data, {}).get(metric + ERROR, 0.0)


def _with_noise(check: Check, error: float) -> Check:
    """Return a check of a noised value, which says how far the noise may decide it."""
    if not error or check.found is None or check.wanted is None:
        return check
    said = f"{check.said}; its noise has a standard error of {error:.2g}"
    if abs(check.found - check.wanted) <= 2 * error:
        said += ", and the difference from the bound is within twice that: noise may have decided"
    return replace(check, said=said, error=error)


def _missing(version: Scored, data: str, metric: str) -> str:
    if data in version.problems:
        return version.problems[data]
    scores = version.scores.get(data, {})
    told = [k for k in scores if k != "num_examples" and not k.endswith(ERROR)]
    known = ", ".join(told) or "none"
    return f"{metric} was not measured on {data} ({known})"
