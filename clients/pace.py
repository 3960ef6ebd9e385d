"""How an assignment that runs is heard of, and how it is stopped: a callback at every step."""

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
