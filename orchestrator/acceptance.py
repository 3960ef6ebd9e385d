"""What comes back from clients: checked against what was asked, spilled to disk, read in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clients.assignment import Assignment
from clients.session import returned_names
from clients.site import write_durably
from clients.trainer import spend_of
from clients.wire import digest, pack, spend_json, unpack
from orchestrator.plan import Participant
from strategies.base import Update


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted update: its leaf in the version's recipe, and where its bytes lie."""

    leaf: Mapping[str, Any]
    path: Path


def refusal(update: Update, assignment: Assignment) -> str | None:
    """Return why an update is not what its assignment asked for, or None if it is."""
    wanted = {name: assignment.broadcast.tensors[name] for name in returned_names(assignment)}
    if (update.round, update.base) != (assignment.round, assignment.base):
        return (
            f"the update is of round {update.round} from {update.base[:12]}, expected round "
            f"{assignment.round} from {assignment.base[:12]}"
        )
    odd = sorted(wanted.keys() ^ update.tensors.keys())
    if odd:
        return f"{odd[0]} is {'missing' if odd[0] in wanted else 'not asked for'}"
    for name, tensor in sorted(update.tensors.items()):
        like = wanted[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            got, want = f"{tensor.dtype} {list(tensor.shape)}", f"{like.dtype} {list(like.shape)}"
            return f"{name} is {got}, expected {want}"
        odd_values = int((~torch.isfinite(tensor)).sum())
        if odd_values:
            return f"{name}: {odd_values} non-finite values"
        if not torch.isfinite(torch.linalg.vector_norm(tensor.double())):
            return f"{name}: its norm is not finite"
    if update.num_examples < 1:
        return f"num_examples must be >= 1, got {update.num_examples}"
    if update.spends != ((spend_of(assignment),) if assignment.privacy else ()):
        return "the update's privacy spend is not what the assignment asked for"
    if assignment.privacy and (update.metrics or update.num_examples != assignment.num_examples):
        return "under DP an update carries the declared size and no metrics, and this one differs"
    return None


def spill(update: Update, who: Participant, folder: Path) -> Accepted:
    """Write an accepted update to ``folder`` and return its leaf: memory stays flat."""
    data = pack(update)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{update.client}.safetensors"
    write_durably(path, data)
    leaf = {
        "client": update.client,
        "population": who.population,
        "public": who.public,
        "digest": digest(data),
        "num_examples": update.num_examples,
        "fingerprint": update.fingerprint,
        "spends": [spend_json(s) for s in update.spends],
    }
    return Accepted(leaf, path)


def lazily(accepted: Iterable[Accepted]) -> Iterator[Update]:
    """Yield spilled updates one at a time, in the order given."""
    for one in accepted:
        yield unpack(one.path.read_bytes())
