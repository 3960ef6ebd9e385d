"""What an attack proves of a claimed epsilon: with the noise that it asks for, and with a quarter.

    python benchmarks/privacy_audit.py [--quick] [--json] [--audits 5] [--canaries 1000]

`weft privacy audit`'s one-run, white-box attack (2305.08846) on MiniLM with LoRA of rank 8: a
thousand canaries in the steps of a client that every step takes whole (sample rate 1), by each kind
of clipping; and, at client level, in the sums of the rounds, where the coordinator adds the noise
and where the clients do. Each audit tosses its coins and draws its noise anew, with keys of the
operating system's. With the right noise the largest bound that any audit proves must stay below the
claim. With a quarter of it, which the accountant is not told, the smallest must lie above it: an
audit that cannot fail shows nothing. A bound is right with a confidence of 95 %, so of many audits
with the right noise some may pass the claim; that none comes near says that they have room.

Nothing is trained, and nobody's data are read.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from _figures import Figure, show

from clients import gradients
from orchestrator.auditing import Attack, audit
from orchestrator.config import load_config
from orchestrator.launch import make_plan
from orchestrator.plan import Plan
from orchestrator.workspace import Workspace, open_workspace
from strategies.spends import ClientLevel

WRONG = 4
"""What the noise is divided by."""

CLIENTS = 40
ROUNDS, STEPS = 2, 5


@dataclass(frozen=True)
class Setting:
    """A claim, and the mechanism that it is made for."""

    name: str
    epsilon: float
    privacy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of_clients(self) -> bool:
        """Whether canaries are clients."""
        return "level" in self.privacy

    def document(self, data: Path) -> dict[str, Any]:
        """Return the run's file, on data that nobody reads but to count them."""
        privacy = {"epsilon": self.epsilon, "delta": 1e-5, **self.privacy}
        return {
            "name": "audited",
            "model": {"id": "builtin:minilm", "max_length": 32},
            "labels": ["no", "yes"],
            "adapter": {"name": "lora", "r": 8, "target_modules": ["query", "value"]},
            "strategy": "ffa-lora",
            "rounds": ROUNDS,
            "batch_size": 10_000,  # more than anybody has: every step takes everything
            "privacy": privacy,
            "clients": {
                "simulate": {
                    "data": f"jsonl:{data}",
                    "by": "iid",
                    "parts": CLIENTS if self.of_clients else 1,
                    "public": True,
                }
            },
            **({"quorum": CLIENTS} if self.of_clients else {"steps": STEPS}),
        }


CLIENT_LEVEL = {"level": "client", "clip": 0.5}
SETTINGS = (
    Setting("flat", 3.0),
    Setting("flat", 1.0),
    Setting("per-layer", 3.0, {"clipping": "per-layer"}),
    Setting("automatic", 3.0, {"clipping": "automatic"}),
    Setting("quantile", 3.0, {"clipping": "quantile"}),
    Setting("clients", 3.0, CLIENT_LEVEL),
    Setting("clients", 1.0, CLIENT_LEVEL),
    Setting("shares", 3.0, {**CLIENT_LEVEL, "noise_shares": 30}),
    Setting("shares", 1.0, {**CLIENT_LEVEL, "noise_shares": 30}),
)
QUICK = tuple(s for s in SETTINGS if s.epsilon == 3.0 and s.name in ("flat", "shares"))


@contextmanager
def too_little_noise() -> Iterator[None]:
    """Divide all noise, behind the accountant's back."""
    of_examples, of_clients = gradients.gradient_noise, ClientLevel.sum_std.fget
    assert of_clients is not None
    with (
        patch.object(gradients, "gradient_noise", lambda *given: of_examples(*given) / WRONG),
        patch.object(ClientLevel, "sum_std", property(lambda terms: of_clients(terms) / WRONG)),
    ):
        yield


def bounds(workspace: Workspace, plan: Plan, attack: Attack, audits: int) -> list[float]:
    """Return what so many audits prove, each with coins and noise of its own."""
    return [audit(workspace, plan, attack).bound for _ in range(audits)]


def measure(workspace: Workspace, setting: Setting, attack: Attack, audits: int) -> list[Figure]:
    """Return the figures of one claim."""
    path, data = workspace.home / "run.yaml", workspace.home / "rows.jsonl"
    rows = [{"text": f"row {n}", "label": ("no", "yes")[n % 2]} for n in range(4 * CLIENTS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(json.dumps(setting.document(data)))
    plan = make_plan(load_config(path), workspace.store, workspace.ledger, workspace.sites)
    found = {"": bounds(workspace, plan, attack, audits)}
    with too_little_noise():
        found[f"-a-{WRONG}th-of-the-noise"] = bounds(workspace, plan, attack, audits)
    figures = []
    for suffix, proved in found.items():
        wrong = bool(suffix)
        worst = min(proved) if wrong else max(proved)
        spread = f"{min(proved):.2f}..{max(proved):.2f}, median {statistics.median(proved):.2f}"
        figures.append(
            Figure(
                f"privacy-audit.{setting.name}.epsilon-{setting.epsilon:g}{suffix}",
                worst,
                "epsilon at least",
                # a bound that meets the claim does not refute it
                math.nextafter(setting.epsilon, math.inf) if wrong else setting.epsilon,
                "higher" if wrong else "lower",
                f"the claim, {setting.epsilon:g}",
                f"{'smallest' if wrong else 'largest'} of {audits}: {spread}; {attack.canaries} "
                f"canaries, {attack.made} guesses",
            )
        )
    return figures


def main() -> None:
    """Attack, and print what is proved."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two claims, two audits of each")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--audits", type=int, help="of each claim and noise (default: 5)")
    parser.add_argument("--canaries", type=int, default=1000)
    given = parser.parse_args()
    audits = given.audits or (2 if given.quick else 5)
    figures = []
    with tempfile.TemporaryDirectory(prefix="weft-privacy-audit-") as folder:
        workspace = open_workspace(Path(folder))
        try:
            for setting in QUICK if given.quick else SETTINGS:
                figures += measure(workspace, setting, Attack(canaries=given.canaries), audits)
        finally:
            workspace.close()
    show("privacy audit", figures, given.json)


if __name__ == "__main__":
    main()
