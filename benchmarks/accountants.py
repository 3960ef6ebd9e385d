"""What weft's accountants say beside Google's dp-accounting: epsilon of the same spends.

    python benchmarks/accountants.py [--quick] [--json] [--record FILE]

The peer asks for an older ``attrs`` than the rest of what weft is built with, so it runs in an
environment of its own, which the first call makes. ``--record`` writes what it says of the fixed
settings: ``tests/clients/dp_accounting.json``, which the tests hold the accountants against.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from _figures import Figure, show
from _peers import folder_of, is_complete, make

from clients.accounting import approximate_epsilon, epsilon
from strategies.spends import PrivacySpend

PEER = "dp-accounting 0.6.0"
Setting: TypeAlias = dict[str, Any]

# (noise multiplier, sample rate, steps): one kind of spend each, then what several of them add up
# to, as after a second run, a fork, a merge, or rounds with other noise
ALONE: Sequence[tuple[float, float, int]] = (
    (1.0, 1.0, 1),
    (5.0, 1.0, 10),
    (20.0, 1.0, 100),
    (0.7, 1.0, 3),
    (50.0, 1.0, 1),
    (1.0, 0.01, 100),
    (1.0, 0.01, 1000),
    (0.6, 0.01, 200),
    (0.613, 0.0114, 500),
    (2.0, 0.1, 50),
    (1.3, 0.5, 10),
    (0.5, 0.02, 20),
    (3.0, 0.9, 5),
    (10.0, 0.02, 10),
)
TOGETHER: Sequence[Sequence[tuple[float, float, int]]] = (
    ((1.0, 0.01, 400), (1.3, 0.02, 200)),
    ((1.0, 0.01, 1000), (3.0, 1.0, 5)),
    ((0.8, 0.05, 20), (0.9, 0.05, 20), (1.1, 0.05, 20)),
    ((2.0, 0.1, 50), (6.0, 1.0, 4), (0.7, 0.004, 300)),
    ((5.0, 1.0, 3), (8.0, 1.0, 6)),
)


def fixed() -> list[Setting]:
    """Return the settings that the tests know."""
    found = [[spend] for spend in ALONE] + [list(spends) for spends in TOGETHER]
    settings = [{"spends": spends, "delta": 1e-5} for spends in found]
    return settings + [{**settings[i], "delta": 1e-7} for i in (1, 5, 16)]


def drawn(count: int, seed: int = 0) -> list[Setting]:
    """Return random settings, of one or two kinds of spend."""
    rng = random.Random(seed)
    found: list[Setting] = []
    for _ in range(count):
        spends = [
            (
                round(rng.uniform(0.6, 6), 3),
                round(10 ** rng.uniform(-3, 0), 5),
                int(10 ** rng.uniform(0, 3)),
            )
            for _ in range(rng.choice((1, 1, 2)))
        ]
        found.append({"spends": spends, "delta": rng.choice((1e-4, 1e-5, 1e-6))})
    return found


def peer_says(settings: Sequence[Setting]) -> list[dict[str, float]]:
    """Return the peer's epsilons of each setting, by ``pld`` and ``rdp``."""
    folder = folder_of("dp-accounting-0.6.0")
    if not is_complete(folder):
        make(folder, ["dp-accounting==0.6.0"])
    python, script = folder / "bin" / "python", Path(__file__).with_name("_accountants_peer.py")
    answered = subprocess.run(
        [str(python), str(script)],
        input="".join(json.dumps(one) + "\n" for one in settings),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in answered.stdout.splitlines()]


def ours(setting: Setting) -> dict[str, float]:
    """Return weft's epsilons of a setting."""
    spends = [
        PrivacySpend(
            "gaussian",
            "example",
            "add-remove",
            {"noise_multiplier": noise, "sample_rate": rate, "steps": steps},
        )
        for noise, rate, steps in setting["spends"]
    ]
    delta = setting["delta"]
    found = {name: epsilon(spends, delta, name) for name in ("prv", "rdp")}
    return {**found, "gdp": approximate_epsilon(spends, delta)}


def figures(settings: Sequence[Setting], peers: Sequence[dict[str, float]]) -> list[Figure]:
    """Return how far each accountant is from the peer's."""
    # below, the PRV accountant's own error of 0.001 is what shows; above, it gives way to RDP
    pairs = [(ours(s), p) for s, p in zip(settings, peers, strict=True) if 0.1 <= p["pld"] <= 50]
    rows = (
        ("prv.most-above-pld", max(o["prv"] / p["pld"] for o, p in pairs) - 1, 0.05, "lower"),
        ("prv.most-below-pld", 1 - min(o["prv"] / p["pld"] for o, p in pairs), 0.001, "lower"),
        ("rdp.most-above-rdp", max(o["rdp"] / p["rdp"] for o, p in pairs) - 1, 0.05, "lower"),
        ("rdp.most-below-pld", 1 - min(o["rdp"] / p["pld"] for o, p in pairs), 0.0, "lower"),
        ("gdp.most-below-pld", 1 - min(o["gdp"] / p["pld"] for o, p in pairs), None, "lower"),
    )
    where = f"{len(pairs)} settings with an epsilon from 0.1 to 50"
    return [
        Figure(f"accountants.{name}", value, "", goal, better, PEER, where)
        for name, value, goal, better in rows
    ]


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("--record", type=Path)
    chosen = parser.parse_args()
    if chosen.record is not None:
        answers = zip(fixed(), peer_says(fixed()), strict=True)
        lines = [json.dumps({**setting, **peer}) for setting, peer in answers]
        chosen.record.write_text("\n".join(lines) + "\n", "utf-8")
        return
    settings = fixed() + drawn(10 if chosen.quick else 150)
    show("accountants", figures(settings, peer_says(settings)), chosen.as_json)


if __name__ == "__main__":
    main()
