"""What a server measures, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.serving.engine import Load

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class State:
    """What is so when somebody looks.

    Attributes:
        load: of the engine.
        versions: by alias, the version that answers.
        problems: by alias, why it is not the one that it points at.
        is_store_up: whether the store could be reached last.
        num_loaded: adapters on the model.
        num_switches: times that an alias was followed to another version.
        is_alive: whether the engine works.
    """

    load: Load
    versions: Mapping[str, str]
    problems: Mapping[str, str]
    is_store_up: bool
    num_loaded: int
    num_switches: int
    is_alive: bool


class ServingMetrics:
    """Counts requests, and shows the state.

    Args:
        state: asked whenever somebody scrapes.
    """

    def __init__(self, state: Callable[[], State]) -> None:
        import prometheus_client as client

        self._client, self._state = client, state
        self.registry = client.CollectorRegistry()

        def made(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"weft_serve_{name}", text, labels, registry=self.registry, **options)

        self._requests = made(
            client.Counter, "requests", "Requests by path and status.", "path", "status"
        )
        self._seconds = made(
            client.Histogram,
            "request_seconds",
            "From a request's first byte to its answer's last.",
            "path",
            buckets=_SECONDS,
        )
        self._first = made(
            client.Histogram, "first_token_seconds", "To an answer's first piece.", buckets=_SECONDS
        )
        self._tokens = made(client.Counter, "tokens", "Tokens by direction.", "direction")
        self._answered = made(
            client.Counter,
            "answered",
            "Requests answered, by alias and version.",
            "model",
            "version",
        )
        self._gauges = {
            name: made(client.Gauge, name, text)
            for name, text in (
                ("waiting", "Requests that wait."),
                ("running", "Requests that are being answered."),
                ("loaded", "Adapters on the model."),
                ("store_up", "Whether the store could be reached last."),
                ("steps", "Times that the model ran."),
                ("rows", "Examples in all of these."),
                ("switches", "Times that an alias was followed to another version."),
            )
        }
        self._behind = made(
            client.Gauge, "behind", "Whether an alias is not served as it points.", "model"
        )

    def requested(self, path: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def began(self, seconds: float) -> None:
        """Count an answer's first piece."""
        self._first.observe(seconds)

    def answered(self, model: str, version: str, prompt_tokens: int, tokens: int) -> None:
        """Count an answer.

        Args:
            model: the alias, or empty where the version itself was asked.
            version: which answered.
            prompt_tokens: that were read.
            tokens: that were said.
        """
        self._answered.labels(model, version[:12]).inc()
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("answer").inc(tokens)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        state = self._state()
        values = {
            "waiting": state.load.waiting,
            "running": state.load.running,
            "loaded": state.num_loaded,
            "store_up": int(state.is_store_up),
            "steps": state.load.steps,
            "rows": state.load.rows,
            "switches": state.num_switches,
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        for pointer in state.versions:
            self._behind.labels(pointer).set(int(pointer in state.problems))
        found: bytes = self._client.generate_latest(self.registry)
        return found
