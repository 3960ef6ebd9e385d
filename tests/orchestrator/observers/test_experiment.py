"""What an experiment logger is told: parameters first, then a round's metrics, then the end."""

import pytest

from orchestrator.observers.experiment import Experiment


class Noting:
    def __init__(self):
        self.params, self.metrics, self.ended = None, [], []

    def log_params(self, config):
        self.params = config

    def log_metrics(self, values, step):
        self.metrics.append((step, dict(values)))

    def close(self, completed):
        self.ended.append(completed)


@pytest.fixture
def told(events):
    """Return a function that tells events and returns what the logger was told."""

    def tell(these):
        logger = Noting()
        observer = Experiment("noting", logger)
        for kind, data in these:
            observer(kind, data)
        observer.close()
        observer.close()
        return logger

    return tell


def test_metrics_are_told_by_round(told, events):
    logger = told(events)

    assert logger.params["name"] == "task-1"
    assert logger.metrics == [
        (1, {"updates": 1.0, "train/loss": 0.5, "epsilon": 2.0}),
        (1, {"eval/accuracy": 0.25, "eval/loss": 1.0}),
        (2, {"updates": 2.0, "train/loss": 1.0, "epsilon": 3.0}),
        (2, {"eval/accuracy": 0.5, "eval/loss": 1.0}),
    ]
    assert logger.ended == [True]


def test_a_run_that_does_not_complete_is_ended_as_such(told, events):
    assert told(events[:8]).ended == [False]
    assert told([*events[:8], ("failed", {"reason": "oh"})]).ended == [False]


def test_under_privacy_there_is_no_loss_to_tell(told, events):
    private = [(k, {n: v for n, v in d.items() if n != "loss"}) for k, d in events]

    assert all("train/loss" not in values for _, values in told(private).metrics)
