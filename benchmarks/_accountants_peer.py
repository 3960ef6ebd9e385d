"""dp-accounting's side, run by the Python of an environment of its own; see ``accountants.py``.

Reads one JSON line a setting, ``{"spends": [[noise, rate, steps], ...], "delta": ...}``, and
answers with ``{"pld": epsilon, "rdp": epsilon}``.
"""

from __future__ import annotations

import json
import sys

from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant


def event_of(noise: float, rate: float, steps: int) -> DpEvent:
    """Return some steps of DP-SGD."""
    step: DpEvent = GaussianDpEvent(noise)
    if rate < 1:
        step = PoissonSampledDpEvent(rate, step)
    return SelfComposedDpEvent(step, steps)


def main() -> None:
    """Answer settings until there are no more."""
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    for line in sys.stdin:
        asked = json.loads(line)
        whole = ComposedDpEvent([event_of(*spend) for spend in asked["spends"]])
        answer = {}
        for name, kind in (("pld", PLDAccountant), ("rdp", RdpAccountant)):
            accountant = kind(neighboring_relation=relation)
            accountant.compose(whole)
            answer[name] = float(accountant.get_epsilon(asked["delta"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
