"""A run's events as an experiment logger takes them: parameters once, metrics a round."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

from orchestrator.loggers import Logger
from orchestrator.observers.delivery import Delivery


class Experiment:
    """Logs ``train/loss`` (hidden under DP), ``updates``, ``epsilon`` and ``eval/…`` by round.

    Args:
        name: of the logger.
        logger: where to; called on a thread of its own.
    """

    def __init__(self, name: str, logger: Logger) -> None:
        self._logger, self._send = logger, Delivery(f"logger {name}", patience_s=30.0)
        self._losses: list[float] = []
        self._completed = False
        self._closed = False

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Log what the event has measured."""
        if kind == "run":
            config = data["plan"].config.model_dump(mode="json")
            self._send(partial(self._logger.log_params, config))
        elif kind == "round":
            self._losses = []
        elif kind == "accepted" and "loss" in data:
            self._losses.append(data["loss"])
        elif kind == "committed":
            self._log(_measured(data, self._losses), data["round"])
        elif kind == "evaluated":
            scores = {f"eval/{k}": v for k, v in data.items() if isinstance(v, float)}
            self._log(scores, data["round"])
        elif kind == "completed":
            self._completed = True

    def close(self) -> None:
        """Say how the run ended, and wait until all is sent, half a minute at most."""
        if not self._closed:
            self._closed = True
            self._send(partial(self._logger.close, self._completed))
            self._send.close()

    def _log(self, values: Mapping[str, float], round_: int) -> None:
        self._send(partial(self._logger.log_metrics, values, round_))


def _measured(data: Mapping[str, Any], losses: list[float]) -> dict[str, float]:
    found: dict[str, float] = {"updates": float(data["updates"])}
    if losses:
        found["train/loss"] = fmean(losses)
    spent = data["spent"]().values() if "spent" in data else ()
    if spent:
        found["epsilon"] = max(one.epsilon for one in spent)
    return found
