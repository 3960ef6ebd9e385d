"""What a gateway tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from orchestrator.routes import Routes


class GatewayMetrics:
    """The metrics of one gateway.

    Args:
        routes: whose requests in flight and models are shown.
    """

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "weft_gateway_requests",
            "Requests answered, by alias and status; 0 where the client left or was cut off.",
            ["alias", "status"],
            registry=self._registry,
        )
        self._first = Histogram(
            "weft_gateway_first_byte_seconds",
            "Until the server began to answer.",
            registry=self._registry,
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
        )
        self._registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what is true now."""
        flights = GaugeMetricFamily(
            "weft_gateway_in_flight", "Requests being answered, by model.", labels=["model"]
        )
        for model, count in self._routes.flights().items():
            flights.add_metric([model], count)
        yield flights
        routed = GaugeMetricFamily(
            "weft_gateway_route", "1 for the model that answers.", labels=["alias", "model"]
        )
        for pointer, model in self._routes.models().items():
            routed.add_metric([pointer, model], 1)
        yield routed

    def count(self, pointer: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(pointer, str(status)).inc()

    def first_byte(self, seconds: float) -> None:
        """Record how long a server took to begin."""
        self._first.observe(seconds)

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        found: bytes = generate_latest(self._registry)
        return found
