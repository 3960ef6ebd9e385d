"""TensorBoard's own reader finds what was logged."""

import pytest

pytest.importorskip("tensorboard", reason="extra 'tensorboard' is not installed")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchestrator.loggers import LOGGERS, LoggedRun


@pytest.fixture
def log(tmp_path):
    """Return a function that logs rounds in a process that began after ``done`` rounds."""

    def write(rounds, done=0):
        run = LoggedRun("run-1", "task-1", done, tmp_path)
        logger = LOGGERS.get("tensorboard").build(run)
        assert done or list(tmp_path.iterdir()) == []  # making it writes nothing
        logger.log_params({"name": "task-1", "adapter": {"name": "lora"}})
        for number in rounds:
            logger.log_metrics({"eval/accuracy": number / 10 + done}, number)
        logger.close(completed=True)
        found = EventAccumulator(str(tmp_path / "tensorboard" / "task-1-run-1"))
        found.Reload()
        return found

    return write


def test_scalars_and_the_config_are_in_the_files(log):
    found = log([1, 2])

    assert [(e.step, round(e.value, 3)) for e in found.Scalars("eval/accuracy")] == [
        (1, 0.1),
        (2, 0.2),
    ]
    [config] = found.Tensors("config/text_summary")
    assert b"name: lora" in config.tensor_proto.string_val[0]


def test_a_round_that_is_run_again_after_a_crash_is_there_once(log):
    log([1, 2, 3])
    found = log([3, 4], done=2)

    values = [(e.step, round(e.value, 3)) for e in found.Scalars("eval/accuracy")]
    assert values == [(1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4)]
