"""What comes back from clients: checked against what was asked, spilled to disk, read in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clients.assignment import Assignment
from clients.charges import spend_of
from clients.files import write_durably
from clients.reading import wanted as wanted_parts
from clients.regularizers import When
from clients.report import names
from clients.session import returned_names
from clients.shares import meant
from clients.uplink import decoded
from clients.wire import digest, pack, spend_json, unpack
from orchestrator.history import Taken
from orchestrator.plan import Participant
from orchestrator.weighing import declared
from strategies.base import Broadcast, Tensors, Update
from strategies.pruning import cut, pruning_of, ranks_in
from strategies.selection import budget_of, refusal_of
from strategies.spends import PrivacySpend
from strategies.uplink import BadEncoding

_MOST_EXAMPLES = 2**53
"""Beyond it a float, in which updates are weighed, does not know the next number."""


@dataclass(frozen=True, slots=True)
class Seal:
    """What an accepted update is known by, and what it costs besides what its client spent.

    Attributes:
        digest: of the update's bytes; under client-level DP one that tells nothing of them.
        spends: of the round it is aggregated in.
    """

    digest: Callable[[bytes], str] = digest
    spends: tuple[PrivacySpend, ...] = ()


OPEN = Seal()
"""Of updates that are no secret to who reads the lineage."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted update: its leaf in the version's recipe, its round, and where its bytes lie."""

    leaf: Mapping[str, Any]
    round: int
    path: Path

    def weighing(self, weight: float) -> Accepted:
        """Return it with what its change counts, in (0, 1]."""
        return replace(self, leaf={**self.leaf, "weight": weight})


def refusal(
    update: Update, assignment: Assignment, max_update_norm: float | None = None
) -> str | None:
    """Return why an update is not what its assignment asked for, or None if it is.

    Args:
        update: what came.
        assignment: what was asked.
        max_update_norm: how far all its tensors together may lie from those that were sent
            (Euclidean norm, > 0); None for any distance.
    """
    if (update.round, update.base) != (assignment.round, assignment.base):
        return (
            f"the update is of round {update.round} from {update.base[:12]}, expected round "
            f"{assignment.round} from {assignment.base[:12]}"
        )
    if assignment.action in ("prepare", "consolidate"):
        return _misread(update, assignment, assignment.action)
    if update.memory:
        return f"{min(update.memory)} is not asked for"
    wanted = {name: assignment.broadcast.tensors[name] for name in returned_names(assignment)}
    try:
        whole = decoded_update(update, assignment)
    except BadEncoding as error:
        return str(error)
    return (
        unfit(whole, at_ranks_of(whole, wanted, assignment.broadcast), max_update_norm)
        or over_budget(update, assignment.broadcast)
        or _odd_privacy(whole, assignment)
    )


def unfit(update: Update, wanted: Tensors, max_update_norm: float | None = None) -> str | None:
    """Return why an update is no new value of ``wanted``, or None if it is.

    Args:
        update: what came; its names, shapes, dtypes, values, counts and metrics are looked at.
        wanted: the tensors that were to be trained, as they were sent.
        max_update_norm: as :func:`refusal` says.
    """
    odd = sorted(wanted.keys() ^ update.tensors.keys())
    if odd:
        return f"{odd[0]} is {'missing' if odd[0] in wanted else 'not asked for'}"
    for name, tensor in sorted(update.tensors.items()):
        like = wanted[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            got, want = f"{tensor.dtype} {list(tensor.shape)}", f"{like.dtype} {list(like.shape)}"
            return f"{name} is {got}, expected {want}"
        if odd_values := _odd_values(tensor):
            return f"{name}: {odd_values}"
    return _too_far(update, wanted, max_update_norm) or _odd_numbers(update)


def _misread(update: Update, assignment: Assignment, when: When) -> str | None:
    """Return why an update is not what a reading asked for, or None if it is."""
    wanted = wanted_parts(assignment, when)
    odd = sorted(update.tensors) or sorted(wanted.keys() ^ update.memory.keys())
    if odd:
        return f"{odd[0]} is {'missing' if odd[0] in wanted else 'not asked for'}"
    for name, part in sorted(update.memory.items()):
        if part.shape != wanted[name] or part.dtype != torch.float32:
            return (
                f"{name} is {part.dtype} {list(part.shape)}, expected torch.float32 "
                f"{list(wanted[name])}"
            )
        if odd_values := _odd_values(part):
            return f"{name}: {odd_values}"
    if update.spends or update.metrics:
        return "an update of a reading says nothing but its memory, and this one does"
    declared = assignment.num_examples
    if assignment.private and (update.fingerprint or update.num_examples != declared):
        return "under DP an update carries the declared size and no metrics, and this one differs"
    return _odd_numbers(update)


def _too_far(update: Update, sent: Tensors, most: float | None) -> str | None:
    """Return why an update changes too much, or None if it does not."""
    if most is None:
        return None
    norms = [float((t.double() - sent[n].double()).norm()) for n, t in update.tensors.items()]
    norm = math.hypot(*norms)
    if norm <= most:
        return None
    return f"its change has norm {norm:.4g}, allowed {most:g} (max_update_norm)"


def _odd_values(tensor: Tensor) -> str | None:
    """Return what is wrong with a tensor's values, or None: reads them once if nothing is."""
    if not tensor.is_floating_point():
        return None
    # The norm of finite values, of all formats but float64 itself, is finite in float64.
    if math.isfinite(torch.linalg.vector_norm(tensor, dtype=torch.float64).item()):
        return None
    num_odd = int((~torch.isfinite(tensor)).sum())
    return f"{num_odd} non-finite values" if num_odd else "its norm is not finite"


def at_ranks_of(update: Update, wanted: Tensors, sent: Broadcast) -> Tensors:
    """Return what is wanted of an update, at its own ranks where its client may give some up.

    Args:
        update: what came.
        wanted: the tensors that were to be trained, as they were sent.
        sent: what the client was sent.
    """
    if not pruning_of(sent.extra):
        return wanted
    lower = cut(sent.tensors, ranks_in(update.tensors, sent.tensors))
    return {name: lower[name] for name in wanted}


def over_budget(update: Update, sent: Broadcast) -> str | None:
    """Return why an update holds more ranks than its client was to choose, or None.

    Args:
        update: as it came, of the ranks and shapes that were asked for.
        sent: what the client was sent.
    """
    budget = budget_of(sent.extra)
    return refusal_of(update.tensors, budget, sent.tensors) if budget else None


def decoded_update(update: Update, assignment: Assignment) -> Update:
    """Return an update with the tensors that are meant, whole, whatever they came through.

    Raises:
        BadEncoding: if they are not what the run's encodings make of what was asked for, or no
            choice of ranks.
    """
    sent = assignment.broadcast
    if assignment.noise_share is not None:
        return replace(update, tensors=meant(update.tensors, assignment))
    tensors = decoded(update.tensors, sent, assignment.uplink, assignment.seed)
    return replace(update, tensors=tensors)


def _odd_numbers(update: Update) -> str | None:
    """Return what is wrong with an update's count and metrics, or None."""
    if not 1 <= update.num_examples <= _MOST_EXAMPLES:
        return f"num_examples must be from 1 to 2**53, got {update.num_examples}"
    endless = [name for name, value in update.metrics.items() if not math.isfinite(value)]
    if endless:
        return f"metric {endless[0]!r} is {update.metrics[endless[0]]}"
    return None


def _odd_privacy(update: Update, assignment: Assignment) -> str | None:
    """Return what is wrong with what an update says of privacy, or None."""
    if assignment.central is not None and (
        update.metrics or update.fingerprint or update.num_examples != 1
    ):
        return "under client-level DP an update says nothing but its tensors, and this one does"
    if update.spends != ((spend_of(assignment),) if assignment.privacy else ()):
        return "the update's privacy spend is not what the assignment asked for"
    if assignment.privacy is None:
        return None
    told = names(assignment.privacy.report)
    if update.metrics.keys() != told or update.num_examples != assignment.num_examples:
        carried = f"of metrics {', '.join(sorted(told))} alone" if told else "no metrics"
        return f"under DP an update carries the declared size and {carried}, and this one differs"
    return None


def spill(update: Update, who: Participant, folder: Path, seal: Seal = OPEN) -> Accepted:
    """Write an accepted update under a run's ``folder`` and return it: memory stays flat."""
    data = pack(update)
    path = _place(update.client, update.round, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)
    return _accepted(_sealed(update, seal), seal.digest(data), who, path)


def spilled(taken: Taken, who: Participant, folder: Path, seal: Seal = OPEN) -> Accepted | None:
    """Return an update that was accepted before; None if its file is gone or is another."""
    path = _place(taken.client, taken.round, folder)
    if not path.exists():
        return None
    data = path.read_bytes()
    if seal.digest(data) != taken.digest:
        return None
    return _accepted(_sealed(unpack(data), seal), taken.digest, who, path)


def lazily(
    accepted: Iterable[Accepted], fresh: Callable[[Update, float], Update]
) -> Iterator[Update]:
    """Yield spilled updates one at a time, in the order given.

    Args:
        accepted: which.
        fresh: returns an update of an older version as one of the version that is aggregated.
    """
    for one in accepted:
        update = declared(unpack(one.path.read_bytes()), one.leaf)
        yield fresh(update, one.leaf["weight"])


def moved(update: Update, base: Tensors, now: Tensors, weight: float) -> Update:
    """Return an update of ``base`` as one of ``now``: its change, times ``weight``, on top of it.

    The server's step in FedBuff (arXiv 2106.06639, algorithm 1, with a server learning rate of 1):
    aggregating ``now + weight * change`` is adding the mean of the weighted changes. In float64.
    """
    tensors = {
        name: (now[name].double() + weight * (t.double() - base[name].double())).to(t.dtype)
        for name, t in update.tensors.items()
    }
    return replace(update, tensors=tensors)


def _sealed(update: Update, seal: Seal) -> Update:
    return replace(update, spends=(*update.spends, *seal.spends))


def _place(client: str, round_: int, folder: Path) -> Path:
    return folder / f"round-{round_}" / f"{client}.safetensors"


def _accepted(update: Update, sha256: str, who: Participant, path: Path) -> Accepted:
    leaf: dict[str, Any] = {
        "client": update.client,
        "population": who.population,
        "public": who.public,
        "base": update.base,
        "digest": sha256,
        "weight": 1.0,
        "num_examples": update.num_examples,
        "fingerprint": update.fingerprint,
        "spends": [spend_json(s) for s in update.spends],
    }
    if who.declared is not None:  # what is not asked for is in no recipe
        leaf["declared"] = who.declared
    if who.rank is not None:
        leaf["rank"] = who.rank
    if who.privacy is not None and not update.spends:
        leaf["released"] = True  # a function of what earlier updates released, and spends nothing
    return Accepted(leaf, update.round, path)
