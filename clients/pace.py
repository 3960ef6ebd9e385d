"""How far an assignment is, how it is stopped, and how often to look for what is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Stepped: TypeAlias = Callable[[int, int], None]
"""Called with the steps done and the steps in all (0: not known yet) whenever there is progress, at
least once a microbatch. It may raise :class:`GivenUp`; what it does changes no result."""


class GivenUp(RuntimeError):
    """Whoever asked for an assignment's result does not want it any more."""


def unheard(step: int, steps: int) -> None:
    """Let progress pass."""


def pause_after(waited_s: float, least_s: float, most_s: float) -> float:
    """Return the seconds until the next look for what has been waited for so long.

    A twentieth of that: it is found out late by a twentieth of what it took, and an hour's wait
    costs few more looks than a minute's.

    Args:
        waited_s: seconds, >= 0.
        least_s: of a pause, > 0.
        most_s: of a pause, >= ``least_s``.
    """
    return min(most_s, max(least_s, waited_s / 20))
