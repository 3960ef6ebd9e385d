"""MLflow: parameters, and metrics a round, at a tracking server or in a database. No paper."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from orchestrator.loggers import LoggedRun, flat, missing

_BATCH = 100  # parameters that MLflow takes in one call
_LONGEST = 6000  # characters of one


class MLflow:
    """Log to an MLflow experiment; a run that is resumed goes on in its MLflow run.

    Args:
        run: the run.
        uri: of the tracking server; by default ``$MLFLOW_TRACKING_URI``. Its password belongs into
            ``$MLFLOW_TRACKING_PASSWORD`` or ``$MLFLOW_TRACKING_TOKEN``.
        experiment: which one; it is made where there is none.

    Raises:
        LoggerUnavailable: if MLflow is not installed.
        ValueError: if ``uri`` holds a password or token.
    """

    def __init__(self, run: LoggedRun, uri: str | None = None, experiment: str = "weft") -> None:
        if uri is not None and _holds_secret(uri):
            raise ValueError(
                "uri holds a password or token, and the config is on the run's record; take it out "
                "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or leave uri out "
                "and set MLFLOW_TRACKING_URI"
            )
        try:
            import mlflow
        except ImportError:
            raise missing("mlflow", "mlflow-skinny (or mlflow)") from None
        self._mlflow, self._run = mlflow, run
        self._uri, self._experiment = uri, experiment
        self._client: Any = None
        self._id = ""

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Find or make the MLflow run, and log the config's dotted keys."""
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        self._id, new = self._found()
        if not new:  # MLflow takes a parameter once, and a run may have been extended
            return
        param = self._mlflow.entities.Param
        values = [param(k, str(v)[:_LONGEST]) for k, v in flat(config).items()]
        for first in range(0, len(values), _BATCH):
            self._client.log_batch(self._id, params=values[first : first + _BATCH])

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log each value at the round."""
        metric, now = self._mlflow.entities.Metric, int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[metric(k, float(v), now, step) for k, v in values.items()]
        )

    def close(self, completed: bool) -> None:
        """Say how the run ended."""
        if self._id:
            self._client.set_terminated(self._id, "FINISHED" if completed else "FAILED")

    def _found(self) -> tuple[str, bool]:
        """Return the id of this run's MLflow run, and whether it was made just now."""
        client, tag = self._client, "weft.run"
        known = client.get_experiment_by_name(self._experiment)
        home = known.experiment_id if known else client.create_experiment(self._experiment)
        for earlier in client.search_runs([home], f"tags.`{tag}` = '{self._run.id}'"):
            client.update_run(earlier.info.run_id, "RUNNING")
            return str(earlier.info.run_id), False
        made = client.create_run(home, tags={tag: self._run.id}, run_name=self._run.name)
        return str(made.info.run_id), True


def _holds_secret(uri: str) -> bool:
    parts = urlsplit(uri)
    token = parts.scheme in ("http", "https") and parts.username is not None
    return token or parts.password is not None
