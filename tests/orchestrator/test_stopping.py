"""When a run ends early, and which version is the best."""

import pytest

from orchestrator.history import Score
from orchestrator.policy import Stop
from orchestrator.stopping import best, exhausted


def scores(*values, metric="accuracy"):
    return [Score(r, f"v{r}", {} if v is None else {metric: v}) for r, v in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([], False),
        ([0.5, 0.5], False),
        ([0.5, 0.5, 0.5], True),  # two after the first that are no better
        ([0.5, 0.4, 0.6], False),
        ([0.5, 0.4, 0.6, 0.6, 0.5], True),
        ([0.5, 0.4, None], True),
        ([None, 0.5], False),
    ],
)
def test_a_run_stops_after_so_many_scores_without_a_better_one(values, stops):
    assert exhausted(scores(*values), Stop(metric="accuracy", patience=2)) is stops


def test_better_is_by_more_than_the_smallest_difference():
    slow = scores(0.50, 0.51, 0.52)

    assert not exhausted(slow, Stop(metric="accuracy", patience=2))
    assert exhausted(slow, Stop(metric="accuracy", patience=2, min_delta=0.02))
    assert not exhausted(
        scores(0.50, 0.51, 0.53), Stop(metric="accuracy", patience=2, min_delta=0.02)
    )


def test_of_a_loss_less_is_better_unless_it_is_said_otherwise():
    falling = scores(3.0, 2.0, 1.0, metric="loss")

    assert not exhausted(falling, Stop(metric="loss", patience=2))
    assert exhausted(falling, Stop(metric="loss", patience=2, mode="max"))
    assert best(falling, Stop(metric="loss")).version == "v3"


def test_the_best_is_the_earliest_of_the_highest():
    assert best(scores(0.1, 0.9, 0.3, 0.9), Stop(metric="accuracy")).version == "v2"
    assert best(scores(None, None), Stop(metric="accuracy")) is None
