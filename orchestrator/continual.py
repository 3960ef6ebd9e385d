"""What a stream of tasks kept and lost, from its accuracy matrix: pure functions.

``R[i, j]`` is the score on task j after training on task i, both counted from 1; row 0 is before
training. Papers and libraries use the same words for different numbers, so every function here
names its variant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any, Literal, TypeAlias

Verdict: TypeAlias = Literal["holds", "falls", "unclear"]


class BadMatrix(ValueError):
    """Scores that are no accuracy matrix."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """The scores of a stream's versions on the test sets of its tasks.

    Attributes:
        tasks: their names, in order; a column each.
        after: of each row, how many tasks the version was trained on; 0 before training.
        rows: a score for each task, or None where there is none.
        lower_is_better: whether scores are losses and their like.
    """

    tasks: tuple[str, ...]
    after: tuple[int, ...]
    rows: tuple[tuple[float | None, ...], ...]
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        if len(self.after) != len(self.rows) or list(self.after) != sorted(set(self.after)):
            raise BadMatrix(
                f"a matrix of {len(self.rows)} rows needs as many rising numbers of tasks, got "
                f"{list(self.after)}"
            )
        for row in self.rows:
            if len(row) != len(self.tasks):
                raise BadMatrix(f"a row has {len(row)} scores for {len(self.tasks)} tasks")

    @property
    def done(self) -> int:
        """How many tasks the last version was trained on."""
        return self.after[-1] if self.after else 0

    def at(self, i: int, j: int) -> float | None:
        """Return R[i, j]: after ``i`` tasks, >= 0, on task ``j``, >= 1; None if not measured."""
        if i not in self.after or not 1 <= j <= len(self.tasks):
            return None
        return self.rows[self.after.index(i)][j - 1]

    def to_json(self) -> dict[str, Any]:
        """Return the scores and all that follows from them as JSON."""
        return {
            "tasks": list(self.tasks),
            "after": list(self.after),
            "rows": [list(row) for row in self.rows],
            "lower_is_better": self.lower_is_better,
            "average": average(self),
            "backward_transfer": backward_transfer(self),
            "forward_transfer": forward_transfer(self),
            "forgetting": forgetting(self),
            "learning_accuracy": learning_accuracy(self),
        }


def average(matrix: Matrix) -> float | None:
    """Return the mean score of the last version over the tasks it was trained on."""
    last = matrix.done
    return _mean(matrix.at(last, j) for j in range(1, last + 1))


def backward_transfer(matrix: Matrix) -> float | None:
    """Return GEM's BWT (1706.08840): the mean of ``R[T, j] - R[j, j]`` over j < T.

    Negative where tasks are forgotten, whichever way scores go. None for fewer than two tasks.
    """
    last = matrix.done
    return _mean(_gain(matrix, (j, j), (last, j)) for j in range(1, last))


def forward_transfer(matrix: Matrix) -> float | None:
    """Return GEM's FWT (1706.08840): the mean of ``R[j-1, j] - R[0, j]`` over j > 1.

    What a task gains by those before it, over the untrained model. None for fewer than two tasks.
    """
    return _mean(_gain(matrix, (0, j), (j - 1, j)) for j in range(2, matrix.done + 1))


def forgetting(matrix: Matrix) -> float | None:
    """Return Chaudhry's forgetting (1801.10112): the mean of ``max_l R[l, j] - R[T, j]``, j < T.

    The maximum is over l = 1 .. T-1, so that a task that goes on getting better is forgotten by a
    negative amount. None for fewer than two tasks.
    """
    last = matrix.done
    return _mean(_lost(matrix, j) for j in range(1, last))


def learning_accuracy(matrix: Matrix) -> float | None:
    """Return the mean of ``R[j, j]``: how well each task was learned when it was its turn."""
    return _mean(matrix.at(j, j) for j in range(1, matrix.done + 1))


def intransigence(matrix: Matrix, ceiling: Matrix) -> float | None:
    """Return the mean of ``C[T, j] - R[j, j]``: what tasks were learned worse than by ``ceiling``.

    Chaudhry's measure (1801.10112) with the ceiling that was trained on all tasks at once in place
    of one for each j. None where the ceiling lacks a task.

    Args:
        matrix: of a stream.
        ceiling: of joint training, on tasks of the same names.
    """
    places = {name: j for j, name in enumerate(ceiling.tasks, 1)}
    gaps: list[float | None] = []
    for j, name in enumerate(matrix.tasks[: matrix.done], 1):
        ours = matrix.at(j, j)
        best = ceiling.at(ceiling.done, places[name]) if name in places else None
        gaps.append(None if ours is None or best is None else _sign(matrix) * (best - ours))
    return _mean(gaps)


def _sign(matrix: Matrix) -> int:
    return -1 if matrix.lower_is_better else 1


def _gain(matrix: Matrix, before: tuple[int, int], after: tuple[int, int]) -> float | None:
    """Return by how much a score got better."""
    first, then = matrix.at(*before), matrix.at(*after)
    return None if first is None or then is None else _sign(matrix) * (then - first)


def _lost(matrix: Matrix, j: int) -> float | None:
    now = matrix.at(matrix.done, j)
    past = [matrix.at(i, j) for i in matrix.after if 1 <= i < matrix.done]
    known = [_sign(matrix) * score for score in past if score is not None]
    return (
        None
        if now is None or len(known) < len(past) or not known
        else max(known) - (_sign(matrix) * now)
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None for none, and where one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None


# --- the gate ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """Which share of a test set was answered right: ``share`` of ``size`` examples."""

    share: float
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.size < 1:
            raise BadMatrix(
                f"a share must be between 0 and 1, of one example or more; got {self.share} of "
                f"{self.size}"
            )


@dataclass(frozen=True, slots=True)
class Fall:
    """By how much a past task fell, and what that says.

    Attributes:
        task: its name.
        fall: before minus after; negative if it rose.
        low: lower end of the confidence interval.
        high: its upper end.
        verdict: ``holds`` if the whole interval is at most the tolerance, ``falls`` if it is all
            above, and ``unclear`` if the test set is too small to say.
    """

    task: str
    fall: float
    low: float
    high: float
    verdict: Verdict


def fallen(
    task: str,
    before: Share,
    after: Share,
    tolerance: float,
    confidence: float = 0.95,
    noise: float = 0.0,
) -> Fall:
    """Return by how much the share of right answers fell from one version to the next.

    The interval is Newcombe's hybrid score interval for the difference of two *independent*
    proportions (Statistics in Medicine 1998, method 10). Both versions answer the same questions,
    so it is wider than one of paired answers would be: what it says holds, holds.

    Args:
        task: its name.
        before: of the version that there was.
        after: of the version that is to follow.
        tolerance: the largest fall that is allowed, in [0, 1].
        confidence: of the two-sided interval, in (0, 1).
        noise: standard error of Gaussian noise in the fall, >= 0, which widens the interval.

    Raises:
        BadMatrix: if tolerance or confidence are out of range.
    """
    if not 0 <= tolerance <= 1 or not 0 < confidence < 1:
        raise BadMatrix(
            f"a tolerance must be in [0, 1] and a confidence in (0, 1), got {tolerance:g} and "
            f"{confidence:g}"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    (low1, high1), (low2, high2) = _wilson(before, z), _wilson(after, z)
    p1, p2 = before.share, after.share
    fall = p1 - p2
    low = max(-1.0, fall - math.hypot(p1 - low1, high2 - p2, z * noise))
    high = min(1.0, fall + math.hypot(high1 - p1, p2 - low2, z * noise))
    verdict: Verdict = "holds" if high <= tolerance else "falls" if low > tolerance else "unclear"
    return Fall(task, fall, low, high, verdict)


def verdict_of(falls: Sequence[Fall]) -> Verdict:
    """Return what falls say together: the worst of them; ``holds`` for none."""
    found = {one.verdict for one in falls}
    return "falls" if "falls" in found else "unclear" if "unclear" in found else "holds"


def _wilson(given: Share, z: float) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion."""
    n, p = given.size, given.share
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
