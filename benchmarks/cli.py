"""How long commands take that only look: seconds of processor time and of waiting.

    python benchmarks/cli.py [--quick] [--json]

Each command runs in a process of its own on a small home, and beside it ``python -c pass`` and
``import torch``, which is what a command pays at least that loads a model. They take turns; a
figure is the median.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _figures import Figure, show

from orchestrator.workspace import open_workspace

PEERS = {"python -c pass": "pass", "import torch": "import torch"}
COMMANDS = ("--help", "names", "versions", "lineage bot", "runs list", "clients list")
GOALS_S = {"weft names": 0.6}


def fill(home: Path) -> None:
    """Put a short history into a home."""
    workspace = open_workspace(home)
    model = {"id": "some-model", "revision": None, "hash": "ab" * 32}
    parents: dict[str, str] = {}
    for number in range(20):
        recipe = {"kind": "round", "round": number, "model": model, "updates": []}
        tensors = {"q.lora_A.weight": torch.full((2, 8), float(number))}
        version = workspace.store.commit(tensors, parents=parents, recipe=recipe)
        workspace.store.name("bot", version)
        parents = {version: "round"}
    workspace.close()


def seconds(code: str, arguments: str, home: Path) -> tuple[float, float]:
    """Return the processor time and the time that a process takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        env={**os.environ, "WEFT_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    waited = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, waited


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    chosen = parser.parse_args()
    weft = "from orchestrator.cli import main; main()"
    cases = {name: (code, "") for name, code in PEERS.items()}
    cases |= {f"weft {command}": (weft, command) for command in COMMANDS}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        for _ in range(5 if chosen.quick else 15):
            for name, (code, arguments) in cases.items():
                found[name].append(seconds(code, arguments, Path(folder)))
    figures = []
    for name, times in found.items():
        used, waited = (statistics.median(column) for column in zip(*times, strict=True))
        peer = "import torch" if name not in PEERS else ""
        setting = f"waits {waited:.2f} s; median of {len(times)}"
        figures.append(Figure(name, used, "s CPU", GOALS_S.get(name), "lower", peer, setting))
    show("commands that look", figures, chosen.as_json)


if __name__ == "__main__":
    main()
