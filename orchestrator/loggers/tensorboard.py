"""TensorBoard: scalars a round, and the config as text, in event files. No paper."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import yaml

from orchestrator.loggers import LoggedRun, missing


class TensorBoard:
    """Write scalars and the config as TensorBoard's event files.

    Args:
        run: the run.
        folder: where; by default ``tensorboard`` in the weft home. A run has a folder in it.

    Raises:
        LoggerUnavailable: if tensorboard is not installed.
    """

    def __init__(self, run: LoggedRun, folder: str | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing("tensorboard", "tensorboard") from None
        root = run.home / "tensorboard" if folder is None else folder
        self._made = partial(
            SummaryWriter,
            log_dir=f"{root}/{run.name}-{run.id}",
            purge_step=run.done + 1 if run.done else None,  # hides a round that was begun twice
        )
        self._writer: Any = None

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Write the config as text."""
        self._writer = self._made()
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, completed: bool) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
