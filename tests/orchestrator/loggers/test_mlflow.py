"""MLflow's own client finds what was logged."""

import pytest

pytest.importorskip("mlflow", reason="extra 'mlflow' is not installed")

import mlflow

from orchestrator.loggers import LOGGERS, LoggedRun
from strategies.plugins import BadOptions


@pytest.fixture
def uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


@pytest.fixture
def run(tmp_path):
    return LoggedRun("run-1", "task-1", 0, tmp_path)


def test_parameters_metrics_and_the_end_are_in_one_run(uri, run):
    config = {"adapter": {"options": {"r": 8}}, **{f"key-{n}": n for n in range(150)}}
    logger = LOGGERS.get("mlflow").build(run, uri=uri, experiment="mine")
    logger.log_params(config)
    logger.log_metrics({"eval/accuracy": 0.25, "epsilon": 1.0}, 1)
    logger.log_metrics({"eval/accuracy": 0.5}, 2)
    logger.close(completed=True)

    client = mlflow.MlflowClient(tracking_uri=uri)
    home = client.get_experiment_by_name("mine")
    [found] = client.search_runs([home.experiment_id])
    assert (found.info.run_name, found.info.status) == ("task-1", "FINISHED")
    assert found.data.params["adapter.options.r"] == "8"
    assert len(found.data.params) == 151
    history = client.get_metric_history(found.info.run_id, "eval/accuracy")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5)]


def test_a_run_that_is_resumed_goes_on_in_its_mlflow_run(uri, run):
    for step, completed in ((1, False), (2, True)):
        logger = LOGGERS.get("mlflow").build(run, uri=uri)
        logger.log_params({"rounds": step})  # extended in between
        logger.log_metrics({"updates": 3.0}, step)
        logger.close(completed)
        client = mlflow.MlflowClient(tracking_uri=uri)
        [found] = client.search_runs([client.get_experiment_by_name("weft").experiment_id])
        assert found.info.status == ("FINISHED" if completed else "FAILED")

    assert len(client.get_metric_history(found.info.run_id, "updates")) == 2


@pytest.mark.parametrize(
    "uri",
    ["https://me:s3cret@mlflow.example", "https://s3cret@host", "postgresql://me:s3cret@db/x"],
)
def test_a_password_in_the_address_is_refused_and_not_repeated(run, uri):
    with pytest.raises(BadOptions, match="MLFLOW_TRACKING_PASSWORD") as caught:
        LOGGERS.get("mlflow").build(run, uri=uri)

    assert "s3cret" not in str(caught.value)
