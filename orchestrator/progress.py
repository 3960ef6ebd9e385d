"""What a run shows while it goes on: round, client states, loss or 'hidden by DP', ε, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.config import RunConfig
from orchestrator.epsilons import Epsilon
from orchestrator.plan import Plan

_STATES = {
    "waiting": "dim",
    "training": "yellow",
    "retried": "yellow",
    "accepted": "green",
    "refused": "red",
}
_MANY = 12


class RunProgress:
    """Shows a run on a terminal; on anything else, prints a line a round.

    Args:
        console: where to.
        live: whether a terminal shows a picture that changes, which other output would tear.
        clock: returns seconds.
    """

    def __init__(
        self,
        console: Console,
        live: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._clock = console, clock
        self._shows_live = live and console.is_terminal
        self._live: Live | None = None
        self._plan: Plan | None = None
        self._round, self._done = 0, 0
        self._times: list[float] = []  # when this process began its first round, ended each
        self._states: dict[str, str] = {}
        self._at: dict[str, str] = {}
        self._losses: dict[str, float] = {}
        self._epsilon: Mapping[str, Epsilon] = {}
        self._line = "starting"

    def __enter__(self) -> RunProgress:
        if self._shows_live:
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the picture away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take note of an event of the run."""
        client = str(data.get("client", ""))
        if kind == "run":
            self._plan, self._done = data["plan"], data.get("done", 0)
            self._round, self._times = self._done, []
            self._epsilon = data["spent"]() if "spent" in data else {}
            if self._done:
                self._say(f"going on after round {self._done}/{self._plan.config.rounds}")
            self._console.print(_timeouts(self._plan.config), style="dim")
        elif kind == "step":
            self._at[client] = f"{data['step']}/{data['steps']}" if data["steps"] else ""
        elif kind == "round":
            self._times = self._times or [self._clock()]
            self._round = data["round"]
            self._states = dict.fromkeys(data["cohort"], "waiting")
            self._at = {}
            self._line = "training"
        elif kind in _STATES and client:
            self._states[client] = kind
            if "loss" in data:
                self._losses[client] = data["loss"]
            if kind == "refused":
                line = f"[red]refused[/] {client}: {escape(data['reason'])}"
                self._console.print(line, highlight=False)
        elif kind == "committed":
            self._committed(data)
        elif kind == "evaluated":
            scores = ", ".join(f"{k} {v:.3f}" for k, v in data.items() if k != "round")
            self._say(f"round {data['round']}: {scores}")
        else:
            self._line = kind

    def _committed(self, data: Mapping[str, Any]) -> None:
        assert self._plan is not None
        self._done = data["round"]
        self._times.append(self._clock())
        self._epsilon = data["spent"]() if "spent" in data else {}
        self._say(
            f"round {data['round']}/{self._plan.config.rounds}: {data['updates']} updates, "
            f"loss {self._loss()}, {self._spent_text()}version {data['version'][:12]}"
        )

    def _say(self, line: str) -> None:
        self._line = line
        if self._live is None:
            self._console.print(line, highlight=False)

    def _loss(self) -> str:
        privacy = None if self._plan is None else self._plan.config.privacy
        if privacy is not None and privacy.report is None:
            return "hidden by DP"
        if not self._losses:
            return "-"
        return f"{sum(self._losses.values()) / len(self._losses):.3f}"

    def _spent_text(self) -> str:
        if not self._epsilon:
            return ""
        return f"max {max(self._epsilon.values(), key=lambda e: e.epsilon)}, "

    def _left(self) -> str:
        """Return the time left, judged by the rounds that this process has finished."""
        if self._plan is None or len(self._times) < 2:
            return "time left: …"
        a_round = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        left = (self._plan.config.rounds - self._done) * a_round
        return f"about {max(0.0, left - (self._clock() - self._times[-1])):.0f} s left"

    def __rich__(self) -> RenderableType:
        """Return the picture of now."""
        rounds = self._plan.config.rounds if self._plan else 1
        name = self._plan.config.name if self._plan else "run"
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=rounds, completed=self._done, width=24)
        grid.add_row(f"[bold]{name}[/]", f"round {self._round}/{rounds}", bar, self._left())
        states = Text()
        shown = list(self._states.items())[:_MANY]
        for client, state in shown:
            at = f" {self._at[client]}" if state == "training" and self._at.get(client) else ""
            states.append(f"{client} {state}{at}  ", style=_STATES[state])
        if len(self._states) > _MANY:
            done = sum(s == "accepted" for s in self._states.values())
            states.append(f"… {done} of {len(self._states)} done")
        facts = f"loss {self._loss()}   {self._spent_text()}{self._line}"
        return Group(grid, states, Text(facts, style="dim"))


def _timeouts(config: RunConfig) -> str:
    """Return the two times after which somebody is not waited for."""
    backend, deadline = config.backend, f"deadline: {config.deadline_s:g} s a round"
    if backend.name == "inline":
        return deadline
    return f"{deadline}; a worker without progress for {backend.heartbeat_s:g} s is replaced"
