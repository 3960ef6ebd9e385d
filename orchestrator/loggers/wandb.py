"""Weights & Biases: the config, and metrics a round, online or in offline files. No paper."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from orchestrator.loggers import LoggedRun, LoggerUnavailable, missing

_ALONE = ("offline", "disabled", "dryrun")


class WandB:
    """Log to a W&B project, online or offline.

    The key is ``$WANDB_API_KEY``, and ``$WANDB_MODE`` may be ``offline``. Nothing is captured
    besides what is logged: no console, code, Git state or machine figures.

    Args:
        run: the run.
        project: which one.
        entity: the user or team it belongs to; by default the key's own.

    Raises:
        LoggerUnavailable: if wandb is not installed, or has no key.
    """

    def __init__(self, run: LoggedRun, project: str = "weft", entity: str | None = None) -> None:
        try:
            import wandb
        except ImportError:
            raise missing("wandb", "wandb") from None
        # without a key it would ask for one at the terminal, in the middle of the run
        if os.environ.get("WANDB_MODE") not in _ALONE and not os.environ.get("WANDB_API_KEY"):
            raise LoggerUnavailable(
                "logger 'wandb' has no key: the environment variable WANDB_API_KEY is not set; "
                "set it, or WANDB_MODE=offline"
            )
        self._wandb, self._run = wandb, run
        self._project, self._entity = project, entity
        self._live: Any = None

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Begin the W&B run, or go on with it."""
        self._live = self._wandb.init(
            project=self._project,
            entity=self._entity,
            id=self._run.id,
            name=self._run.name,
            resume="allow",
            config=dict(config),
            dir=str(self._run.home),
            settings=self._wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
                x_disable_meta=True,
            ),
        )
        self._live.define_metric("round")
        self._live.define_metric("*", step_metric="round")

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log each value at the round."""
        self._live.log({**values, "round": step})

    def close(self, completed: bool) -> None:
        """Upload what is left and say how the run ended."""
        if self._live is not None:
            self._live.finish(exit_code=0 if completed else 1)
