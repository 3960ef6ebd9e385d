"""Notifications: a run that failed, fell below its quorum, nears a budget or is done posts so."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from orchestrator.observers.delivery import Delivery

_LOG = logging.getLogger(__name__)

Trigger: TypeAlias = Literal["failed", "below-quorum", "budget-low", "completed"]
_TRIGGERS: Mapping[str, Trigger] = {
    "failed": "failed",
    "below quorum": "below-quorum",
    "budget low": "budget-low",
    "completed": "completed",
}
_TIMEOUT_S = 5.0
_TRIES = 3
_AGAIN = frozenset({408, 425, 429, *range(500, 600)})


class BadWebhook(ValueError):
    """There is no usable address to post notifications to."""


class Notify(BaseModel):
    """Where a run's notifications go, and which; the address itself stays in the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url_env: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    on: tuple[Trigger, ...] = Field(
        default=("failed", "below-quorum", "budget-low", "completed"), min_length=1
    )
    format: Literal["json", "slack"] = "json"

    @model_validator(mode="before")
    @classmethod
    def _no_address(cls, value: Any) -> Any:
        given = value if isinstance(value, Mapping) else {"url": value}
        if "url" in given or "://" in str(given.get("url_env", "")):
            raise ValueError(
                "a webhook's address is a secret, and the config is on the run's record; put it "
                "into an environment variable and name that: notify: {url_env: WEFT_WEBHOOK}"
            )
        return value


class Webhook:
    """Posts events to a webhook, three times at most, on a thread of its own.

    Args:
        config: which events, in which format.
        pause_s: seconds before the second try; twice as many before the third.

    Raises:
        BadWebhook: if the environment does not name an http(s) address.
    """

    def __init__(self, config: Notify, pause_s: float = 1.0) -> None:
        self._config, self._pause_s = config, pause_s
        self._url = os.environ.get(config.url_env, "")
        if urlsplit(self._url).scheme not in ("http", "https"):
            state = "holds no http or https address" if self._url else "is not set"
            raise BadWebhook(
                f"notify: the environment variable {config.url_env} {state}; set it to the "
                "webhook's address, or leave notify out"
            )
        self._send = Delivery("notify", size=100)
        self._run: dict[str, Any] = {}
        self._low: set[str] = set()

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Post the event, if it is one of those asked for."""
        if kind == "run":
            done = data.get("done", 0)
            self._run = {"run": data.get("run"), "name": data.get("name"), "round": done}
        if "round" in data:
            self._run["round"] = data["round"]
        trigger = _TRIGGERS.get(kind)
        if trigger in self._config.on and self._is_new(kind, data):
            facts = {k: v for k, v in data.items() if isinstance(v, (str, int, float))}
            if kind == "completed":
                facts["version_name"] = facts.pop("name", "")
            body = {
                "event": trigger,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                **self._run,
                **facts,
            }
            body["text"] = _sentence(body)
            self._send(partial(self._post, body))

    def close(self) -> None:
        """Wait until what was said is sent, ten seconds at most."""
        self._send.close()

    def _is_new(self, kind: str, data: Mapping[str, Any]) -> bool:
        """Whether it has not been said: a budget that stays low is said once a population."""
        if kind != "budget low":
            return True
        population = str(data.get("population"))
        new = population not in self._low
        self._low.add(population)
        return new

    def _post(self, body: Mapping[str, Any]) -> None:
        document = {"text": body["text"]} if self._config.format == "slack" else body
        request = urllib.request.Request(
            self._url,
            json.dumps(document).encode(),
            {"Content-Type": "application/json", "User-Agent": "weft"},
        )
        why = ""
        for attempt in range(_TRIES):
            if attempt:  # once the run has ended, nobody waits for a pause
                self._send.closing.wait(self._pause_s * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
                    return
            except urllib.error.HTTPError as error:
                error.close()
                why = f"it answered {error.code}"
                if error.code not in _AGAIN:
                    break
            except OSError as error:  # its text may hold the address
                why = type(getattr(error, "reason", error)).__name__
        _LOG.warning(
            "notify: %r could not be posted to the address in %s (%s)",
            body["event"],
            self._config.url_env,
            why,
        )


def _sentence(body: Mapping[str, Any]) -> str:
    """Return the notification in words."""
    who, trigger = f"{body.get('name')} (run {body.get('run')})", body["event"]
    if trigger == "failed":
        return f"{who} failed in round {body.get('round')}: {body.get('reason')}"
    if trigger == "below-quorum":
        got, needed = body.get("updates"), body.get("quorum")
        return f"{who}: round {body.get('round')} got {got} updates and needs {needed}"
    if trigger == "budget-low":
        return (
            f"{who}: population {body.get('population')} has spent "
            f"ε = {body.get('epsilon', 0):.2f} of {body.get('limit', 0):g}"
        )
    return f"{who} completed: {body.get('version_name', '')} {body.get('version', '')[:12]}"
