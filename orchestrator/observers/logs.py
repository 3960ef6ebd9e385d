"""Structured logs: one line an event, as text or JSON, and what libraries log in the same form."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, Literal, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]

_EVENTS = logging.getLogger("weft.run")
_LEVELS = {
    "failed": logging.ERROR,
    "refused": logging.WARNING,
    "duplicate": logging.WARNING,
    "late": logging.WARNING,
    "evaluation failed": logging.WARNING,
    "below quorum": logging.WARNING,
    "budget low": logging.WARNING,
}
_BARE = re.compile(r"[^\s\"=]+")


class EventLog:
    """Writes a run's events to stderr or a file through the standard library's logging.

    While it is open, what libraries log goes there too, in the same form. No value other than a
    number, a short text or the length of a list is ever written.

    Args:
        form: ``text`` (``key=value``) or ``json`` (an object a line).
        file: where to append; by default stderr, where it replaces the plain lines.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, form: LogFormat = "text", file: Path | None = None) -> None:
        self._facts: dict[str, Any] = {}
        self._handler: logging.Handler = logging.StreamHandler(sys.stderr)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._handler = WatchedFileHandler(file, encoding="utf-8")
        self._handler.setFormatter(_Json() if form == "json" else _Text())
        root = logging.getLogger()
        # exactly what basicConfig makes, ours or that of Opacus, which calls it when it is imported
        self._plain = [h for h in root.handlers if type(h) is logging.StreamHandler and not file]
        for handler in self._plain:
            root.removeHandler(handler)
        root.addHandler(self._handler)
        _EVENTS.addHandler(self._handler)
        _EVENTS.setLevel(logging.INFO)
        _EVENTS.propagate = False
        logging.captureWarnings(True)

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Write the event's line."""
        if kind == "run":
            self._facts = {"run": data.get("run"), "name": data.get("name")}
        if "round" in data:
            self._facts["round"] = data["round"]
        facts = self._facts | {k: _plain(v) for k, v in data.items() if _writable(v)}
        if kind == "committed":
            facts |= _spent(data)
        _EVENTS.log(_LEVELS.get(kind, logging.INFO), kind, extra={"facts": facts})

    def close(self) -> None:
        """Put logging back as it was."""
        root = logging.getLogger()
        if self._handler not in root.handlers:
            return
        root.removeHandler(self._handler)
        _EVENTS.removeHandler(self._handler)
        _EVENTS.propagate = True
        for handler in self._plain:
            root.addHandler(handler)
        logging.captureWarnings(False)
        self._handler.close()


def _writable(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, list, tuple))


def _plain(value: Any) -> Any:
    """Return a value as it is written: a list as its length, a number that is none as text."""
    if isinstance(value, (list, tuple)):
        return len(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _spent(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the largest ε that the run has spent of a population, as the ledger has it."""
    spent = data["spent"]().values() if "spent" in data else ()
    if not spent:
        return {}
    most = max(spent, key=lambda one: one.epsilon)
    return {
        "epsilon": _plain(round(most.epsilon, 4)),
        "delta": most.delta,
        "unit": most.unit,
        "population": most.population,
    }


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a line says, in its order."""
    at = datetime.fromtimestamp(record.created, UTC)
    found = {
        "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
        **getattr(record, "facts", {}),
    }
    if record.exc_info:
        found["error"] = logging.Formatter().formatException(record.exc_info)
    return found


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields(record), ensure_ascii=False, default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        found = _fields(record)
        first = (found.pop("time"), found.pop("level").upper(), found.pop("logger"))
        message = found.pop("message")
        # a line break in a reason must not look like another event
        told = [f"{k}={_word(v)}" for k, v in found.items()]
        return " ".join([*first, " ".join(message.split()), *told])


def _word(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)
