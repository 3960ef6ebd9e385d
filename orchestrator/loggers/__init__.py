"""Experiment loggers: where a run's parameters and metrics go besides the ledger, one file each.

They change no result and are no part of a version's recipe. Keys and passwords come from the
environment alone: a run's config is on its record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from strategies.plugins import Family

LOGGERS = Family("logger", "orchestrator.loggers", context=("run",))


class LoggerUnavailable(ImportError):
    """What a logger needs (a package, a key) is not there."""


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """A run as a logger sees it.

    Attributes:
        id: unique; a run that is resumed has the same.
        name: what people call it.
        done: rounds committed before this process, 0 for a new run.
        home: the weft home; a logger that writes files keeps them in a folder of its own there.
    """

    id: str
    name: str
    done: int
    home: Path


class Logger(Protocol):
    """Keeps what a run measures.

    Making one imports what it needs, raises :class:`LoggerUnavailable`, and contacts nobody. The
    methods are called in order on one thread that is not the run's; they may block and fail.
    """

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Note the run's resolved config, JSON; called first, also when a run is resumed."""
        ...

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Note what was measured; ``step`` is the round, >= 1."""
        ...

    def close(self, completed: bool) -> None:
        """Send what is left; the run has completed, or has failed or stopped."""
        ...


def missing(name: str, package: str) -> LoggerUnavailable:
    """Return the error for a package that is not installed."""
    return LoggerUnavailable(
        f"logger {name!r} needs the package {package}, which is not installed; "
        f"pip install 'weft[{name}]', or leave the logger out"
    )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as one level of dotted keys.

    >>> flat({"adapter": {"name": "lora", "options": {"r": 8}}, "labels": ["a", "b"]})
    {'adapter.name': 'lora', 'adapter.options.r': 8, 'labels': ['a', 'b']}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
