"""MLflow's side, run by the Python of an environment of its own; see ``_mlflow.py``.

Reads one JSON line a call, makes it, and answers with its seconds: ``log`` (an artifact, and a
version of it), ``alias``, ``resolve``, ``list``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # in maintenance since MLflow 3, and asked for here
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
warnings.simplefilter("ignore")

from mlflow import MlflowClient  # noqa: E402  (it reads the environment)

LISTED = 20
NAME = "bench"


class Registry:
    """A tracking store and a registry at one url, artifacts in a folder beside it.

    Args:
        url: ``sqlite:///PATH`` or ``file://PATH``.
        folder: for artifacts.
        artifact: the file that is logged.
    """

    def __init__(self, url: str, folder: Path, artifact: Path) -> None:
        self._client = MlflowClient(url, url)
        self._artifact = str(artifact)
        self._client.create_registered_model(NAME)
        self._experiment = self._client.create_experiment(NAME, artifact_location=folder.as_uri())
        self._newest = ""

    def log(self) -> None:
        """Log the artifact to a new run, and make a version of it."""
        run = self._client.create_run(self._experiment).info
        self._client.log_artifact(run.run_id, self._artifact)
        made = self._client.create_model_version(NAME, run.artifact_uri, run.run_id)
        self._newest = made.version

    def alias(self) -> None:
        """Point the alias at the newest version."""
        self._client.set_registered_model_alias(NAME, "live", self._newest)

    def resolve(self) -> None:
        """Look where the alias points."""
        self._client.get_model_version_by_alias(NAME, "live")

    def list(self) -> None:
        """List the newest versions."""
        order = ["version_number DESC"]
        found = self._client.search_model_versions(
            f"name='{NAME}'", max_results=LISTED, order_by=order
        )
        assert found


def main() -> None:
    """Answer calls until there are no more."""
    url, folder, artifact = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    registry = Registry(url, folder, artifact)
    calls: dict[str, Callable[[], None]] = {
        "log": registry.log,
        "alias": registry.alias,
        "resolve": registry.resolve,
        "list": registry.list,
    }
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        calls[json.loads(line)]()
        print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
