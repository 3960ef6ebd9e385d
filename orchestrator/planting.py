"""A black-box audit: a whole run on public data in which mislabelled examples stand as canaries.

Source: arXiv 2305.08846 (black-box attack with mislabelled examples). Some of the clients' examples
are given a wrong label, and each of these is in its client's data or not by a fair coin. The run is
made from start to end, in a folder of its own, by the same code as any; the attacker sees its first
and its last version alone, and guesses by how much each canary's loss has fallen. This goes through
everything that a run does, and proves far less than gradients do.

Nothing but the coins may tell what is in: clients are registered in that folder with sizes that are
declared before, and no example's place depends on another's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clients import data
from clients.assignment import DataSpec
from clients.canaries import guessed, refuse_senseless, tossed
from clients.data import Example
from clients.evaluate import example_losses
from clients.keys import new_key
from clients.noise import insecure_key
from clients.one_run import lower_bound
from orchestrator import service
from orchestrator.auditing import Attack, Audit, claimed, hiding_examples
from orchestrator.config import BadConfig, RunConfig
from orchestrator.coordinator import planned
from orchestrator.launch import make_plan
from orchestrator.plan import Participant, Plan
from orchestrator.retraining import versions_of
from orchestrator.sections import Participants
from orchestrator.versions import use
from orchestrator.workspace import Workspace, open_workspace
from storage.ledger import ClientRecord


def audit_by_training(workspace: Workspace, config: RunConfig, attack: Attack) -> Audit:
    """Make a run on public data with canaries among them, attack it, and return what that proves.

    Nothing is left in the workspace: no version, run or spend.

    Args:
        workspace: where the run's clients are.
        config: the run.
        attack: how; its canaries at most half of the examples.

    Raises:
        BadConfig: if the run hides no examples, trains on data that are not public, or does not
            classify from the start.
        clients.one_run.BadGuesses: if the attack is senseless.
    """
    privacy = hiding_examples(config)
    refuse_senseless(attack.canaries, attack.made)
    _refuse_others(config, attack)
    plan = make_plan(config, workspace.store, workspace.ledger, workspace.sites)
    seed = privacy.insecure_seed
    key = new_key() if seed is None else insecure_key(seed, "audit")
    present = tossed(attack.canaries, key)
    with tempfile.TemporaryDirectory(prefix="weft-audit-") as folder:
        scratch = open_workspace(Path(folder) / "home")
        try:
            told = _planted(plan, attack.canaries, present, Path(folder), scratch)
            names = tuple(who.name for who in plan.participants)
            alone = {
                "clients": Participants(names=names),
                **dict.fromkeys(("evaluate", "notify", "stop", "faults")),
                "loggers": (),
                "select": "last",
            }
            last = service.launch(scratch, config.model_copy(update=alone))
            scores = _fallen(scratch, last, told)
            [record] = scratch.ledger.runs()
            made = planned(scratch.ledger, record)
        finally:
            scratch.close()
    guesses = guessed(scores, present, attack.made)
    delta = privacy.delta if attack.delta is None else attack.delta
    who, claim = claimed(made, None, delta)  # no canary's is more than the largest
    assert who.privacy is not None
    bound = lower_bound(guesses, delta, attack.confidence)
    rate = who.privacy.sample_rate
    return Audit(
        config.name, "all clients", claim, bound, attack.confidence, guesses, rate, white_box=False
    )


def _refuse_others(config: RunConfig, attack: Attack) -> None:
    if config.task != "classification":
        raise BadConfig(f"task: a black-box audit mislabels examples, and {config.task} has none")
    if len(config.task_labels) == 1:
        raise BadConfig(
            f"task_labels: a black-box audit mislabels examples, and beside {config.task_labels[0]}"
            " there is no other label; name two, or audit by --white-box"
        )
    if config.start_from is not None or config.library:
        raise BadConfig(
            "start_from: a black-box audit trains from the base model alone; leave it and library "
            "out"
        )
    if config.privacy is not None and config.privacy.unit_column:
        raise BadConfig(
            "privacy.unit: a black-box audit's canaries are examples that are each a unit; leave "
            "the unit out, or audit by --white-box"
        )
    if attack.client is not None:
        raise BadConfig("--client: a black-box audit trains all clients; leave it out")


def _planted(
    plan: Plan, canaries: int, present: Tensor, folder: Path, scratch: Workspace
) -> DataSpec:
    """Register the clients with canaries among their data; return the canaries, all of them.

    Raises:
        BadConfig: if data are not public, or too few.
    """
    for who in plan.participants:
        if not who.public:
            raise BadConfig(
                f"{who.name}: a black-box audit trains on data and tells what it finds, and these "
                "are not public; simulate it on public ones (public: true), or audit by "
                "--white-box, which reads none"
            )
    chosen = plan.task_labels if plan.config.task_labels else ()
    owned = [
        (who, example)
        for who in plan.participants
        for example in data.examples(replace(who.data, labels=chosen), plan.model)
    ]
    if 2 * canaries > len(owned):
        raise BadConfig(
            f"{canaries} canaries are more than half of the {len(owned)} examples; take fewer with "
            "--canaries"
        )
    generator = torch.Generator().manual_seed(plan.config.seed)
    places = torch.randperm(len(owned), generator=generator)[:canaries].tolist()
    wrong = {place: _mislabelled(owned[place][1], plan, generator) for place in places}
    told = _written(folder / "canaries.jsonl", [wrong[place] for place in places])
    held = {places[number] for number in present.tolist()}
    for who in plan.participants:
        own = [place for place, (other, _) in enumerate(owned) if other.name == who.name]
        kept = [place for place in own if place not in wrong]
        rows = [_row(owned[place][1], plan) for place in kept]
        rows += [wrong[place] for place in own if place in held]
        size = len(kept) + (len(own) - len(kept)) // 2  # declared, whatever the coins say
        _register(scratch, who, _written(folder / f"{who.name}.jsonl", rows), max(1, size))
    return DataSpec(told)


def _register(scratch: Workspace, who: Participant, uri: str, size: int) -> None:
    scratch.ledger.add_client(
        ClientRecord(
            who.name, uri, who.name, num_examples=size, labels=dict(who.labels), public=True
        )
    )


def _row(example: Example, plan: Plan) -> dict[str, str]:
    assert example.label is not None
    pair = {} if example.text_pair is None else {"text_pair": example.text_pair}
    return {"text": example.text, **pair, "label": plan.model.labels[example.label]}


def _mislabelled(example: Example, plan: Plan, generator: torch.Generator) -> dict[str, str]:
    row = _row(example, plan)
    others = [label for label in plan.task_labels if label != row["label"]]
    chosen = int(torch.randint(len(others), (), generator=generator))
    return {**row, "label": others[chosen]}


def _written(path: Path, rows: Sequence[dict[str, str]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return f"jsonl:{path}"


def _fallen(scratch: Workspace, last: str, told: DataSpec) -> Tensor:
    """Return by how much each canary's loss fell from the run's first version to its last."""
    chain = versions_of(scratch.store, last)
    losses = [
        torch.tensor(example_losses(replace(use(scratch, version, told), public=True)))
        for version in (chain[0], chain[-1])
    ]
    return torch.nan_to_num(losses[0].double() - losses[1].double(), nan=0.0)
