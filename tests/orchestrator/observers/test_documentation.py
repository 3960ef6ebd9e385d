"""The page on observability says what there is."""

import re
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="extra 'metrics' is not installed")

from prometheus_client.metrics import MetricWrapperBase

from orchestrator.observers.prometheus import Metrics


def test_the_documentation_names_every_metric_with_its_labels():
    page = (Path(__file__).resolve().parents[3] / "docs" / "observability.md").read_text("utf-8")
    table = page.partition("<!-- metrics -->")[2].partition("<!-- end of metrics -->")[0]
    documented = re.findall(r"^\| `([a-z_]+)(?:\{([a-z]+)\})?` \| (\w+) \|", table, re.MULTILINE)

    metrics = Metrics()
    metrics("committed", {"round": 1, "spent": lambda: {}})
    kept = [m for m in vars(metrics).values() if isinstance(m, MetricWrapperBase)]
    made = [
        (m._name + "_total" * (m._type == "counter"), "".join(m._labelnames), m._type) for m in kept
    ]
    assert sorted(documented) == sorted(made)
