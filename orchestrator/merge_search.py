"""Weights of a merge, found by trying: on data that everyone may see, by a derivative-free search.

The search is scipy's COBYQA (Ragonneau and Zhang): a quadratic model in a trust region, for few
expensive trials of a smooth function within bounds. What it lowers is the loss, not the accuracy,
which is flat between steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clients.assignment import DataSpec, PluginChoice
from clients.evaluate import Evaluation
from orchestrator.backends.base import Backend, Failure, complete
from orchestrator.backends.inline import InlineBackend
from orchestrator.merge_draft import Draft, draft_of
from orchestrator.merge_parts import Parts
from orchestrator.versions import EvaluationFailed, using
from orchestrator.workspace import Workspace
from strategies.plugins import BadOptions

LOWEST, HIGHEST = -1.0, 2.0
"""Between what a weight is looked for."""

_FIRST_STEP, _LAST_STEP = 0.25, 1e-3


@dataclass(frozen=True, slots=True)
class Found:
    """The best weights of a search.

    Attributes:
        weights: one for each version.
        value: of the function there.
        first: of the function at the weights that it began with.
        trials: how often the function was asked.
    """

    weights: tuple[float, ...]
    value: float
    first: float
    trials: int


@dataclass(frozen=True, slots=True)
class Looking:
    """How weights are looked for.

    Attributes:
        data: public, what the loss is of.
        trials: how many merges to score at most, >= 3.
        rank: what converted versions were cut to.
        backend: where to score; None is this process.
    """

    data: DataSpec
    trials: int
    rank: int | None = None
    backend: Backend | None = None


def search(
    function: Callable[[Sequence[float]], float], start: Sequence[float], trials: int
) -> Found:
    """Look for the weights of the lowest value, from ``start``; deterministic.

    Args:
        function: of the weights; inf where there is no merge.
        start: in [-1, 2], one for each version.
        trials: how often to ask at most, >= 3.

    Returns:
        The best of all that was asked, the start included.
    """
    from scipy.optimize import Bounds, minimize

    asked: list[tuple[float, tuple[float, ...]]] = []

    def ask(weights: np.ndarray) -> float:
        rounded = tuple(round(float(w), 6) for w in weights)
        asked.append((float(function(rounded)), rounded))
        return min(asked[-1][0], 1e6)

    ask(np.asarray(start, dtype=float))
    minimize(
        ask,
        np.asarray(start, dtype=float),
        method="COBYQA",
        bounds=Bounds([LOWEST] * len(start), [HIGHEST] * len(start)),
        options={
            "maxfev": max(1, trials - 1),
            "initial_tr_radius": _FIRST_STEP,
            "final_tr_radius": _LAST_STEP,
        },
    )
    value, weights = min(asked)
    return Found(weights, value, asked[0][0], len(asked))


def searched_merge(
    workspace: Workspace,
    parts: Parts,
    method: PluginChoice,
    start: Sequence[float],
    looking: Looking,
) -> Draft:
    """Return the merge of the weights at which its loss on public data is lowest.

    Weights that the method cannot merge, and those whose merge has no finite loss, are passed over.
    Its metrics tell ``search_loss_before``, with the weights ``start``, ``search_loss_after`` and
    ``search_trials``. The weights are in its recipe, and all that its bytes depend on.

    Raises:
        BadOptions: as :func:`orchestrator.merge_draft.draft_of`, of the start.
        EvaluationFailed: if a merge cannot be scored, or that of the start has no finite loss.
    """
    used = looking.backend or InlineBackend()

    def made(weights: Sequence[float]) -> Draft:
        return draft_of(workspace, parts, method, weights, looking.rank)

    def loss(weights: Sequence[float]) -> float:
        try:
            one = made(weights)
        except BadOptions:
            return math.inf
        return _loss(workspace, one, looking.data, used)

    made(start)
    found = search(loss, start, looking.trials)
    if not math.isfinite(found.first):
        raise EvaluationFailed(
            f"the merge that the search begins with has no finite loss on {looking.data.uri}; give "
            "data of labels that all versions know, or other weights to begin with"
        )
    best = made(found.weights)
    told = {
        "search_loss_before": found.first,
        "search_loss_after": found.value,
        "search_trials": float(found.trials),
    }
    return replace(best, metrics={**best.metrics, **told})


def _loss(workspace: Workspace, made: Draft, data: DataSpec, backend: Backend) -> float:
    wanted = using(workspace, made.version, made.effective(workspace.store), data)
    for result in complete(backend, [wanted], 3600.0, lambda a: None):
        if isinstance(result, Evaluation):
            return result.metrics.get("loss", math.inf)
        if isinstance(result, Failure):
            raise EvaluationFailed(f"the merge cannot be scored: {result.reason}")
    raise EvaluationFailed("the merge was not scored")
