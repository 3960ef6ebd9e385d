"""Faults that a simulated run is asked to suffer: which, to whom and when.

Pure functions of the config's section, the round and the client. They say what happens;
:mod:`orchestrator.faulty` makes it happen. Nothing here is in a version's recipe: a run whose
accepted updates are those of an honest run ends at the honest run's version.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

ClientFault: TypeAlias = Literal[
    "crash", "hang", "slow", "nan", "wrong-shape", "duplicate", "replay", "drop", "away"
]
"""What a client does: its worker dies; it never answers; it answers late; its update holds a value
that is not finite; or a tensor of another shape; comes twice; is an earlier round's; is lost; or it
is not there in that round: then it is not asked where a cohort is ``available_only``."""

HostFault: TypeAlias = Literal["corrupt-blob", "full-disk", "database-outage", "clock-jump"]
"""What the coordinator meets, once in a round: a blob changes on the disk after it was written; one
cannot be written; a statement fails; its clock is an hour ahead or behind for the whole round."""

Fault: TypeAlias = Literal[ClientFault, HostFault]

CLIENT_FAULTS: frozenset[str] = frozenset(get_args(ClientFault))
IN_A_PROCESS_OF_THEIR_OWN = frozenset({"crash", "hang"})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FaultAt(_Strict):
    """One fault: of a client in a round, or of the coordinator in a round."""

    kind: Fault
    round: int = Field(ge=1)
    client: str | None = None

    @model_validator(mode="after")
    def _whose(self) -> FaultAt:
        if (self.kind in CLIENT_FAULTS) != (self.client is not None):
            raise ValueError(
                f"{self.kind} happens to a client; say which with client: NAME"
                if self.client is None
                else f"{self.kind} happens to the coordinator; leave client out"
            )
        return self


class Faults(_Strict):
    """The ``faults`` section: a share of clients and rounds, faults one by one, or both.

    Attributes:
        seed: of who is faulty and what happens to whom.
        clients: share of the clients that are faulty, in every round; in [0, 1].
        rounds: share of the rounds in which the coordinator meets a fault; in [0, 1].
        kinds: what may happen to those; a client's kind is drawn anew every round.
        at: faults one by one; where there is one, nothing else happens to that client then.
        delay_s: by how much a slow client is late, seconds >= 0.
    """

    seed: int = 0
    clients: float = Field(default=0.1, ge=0, le=1)
    rounds: float = Field(default=0.1, ge=0, le=1)
    kinds: tuple[Fault, ...] = ()
    at: tuple[FaultAt, ...] = ()
    delay_s: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _any(self) -> Faults:
        if not self.kinds and not self.at:
            raise ValueError("give kinds, such as [nan, crash], or a list of {kind, client, round}")
        return self


def from_list(value: object) -> object:
    """Accept ``[{kind: nan, client: c-3, round: 2}]`` for ``{at: [...]}``."""
    return {"at": value} if isinstance(value, (list, tuple)) else value


def is_faulty(faults: Faults, client: str) -> bool:
    """Return whether a client is among the share that is faulty in every round."""
    share = random.Random(f"{faults.seed}/{client}").random()
    return share < faults.clients and not CLIENT_FAULTS.isdisjoint(faults.kinds)


def client_fault(faults: Faults, round_: int, client: str) -> ClientFault | None:
    """Return what happens to a client in a round, or None.

    >>> section = Faults(kinds=("nan",), clients=1.0)
    >>> client_fault(section, 3, "c-1")
    'nan'
    >>> client_fault(Faults(at=(FaultAt(kind="drop", client="c-1", round=2),)), 3, "c-1")
    """
    chosen = [f.kind for f in faults.at if (f.round, f.client) == (round_, client)]
    if not chosen and is_faulty(faults, client):
        kinds = [kind for kind in faults.kinds if kind in CLIENT_FAULTS]
        chosen = [random.Random(f"{faults.seed}/{round_}/{client}").choice(kinds)]
    return chosen[0] if chosen else None  # type: ignore[return-value]


def host_fault(faults: Faults, round_: int) -> HostFault | None:
    """Return what the coordinator meets in a round, or None."""
    chosen = [f.kind for f in faults.at if f.round == round_ and f.client is None]
    kinds = [kind for kind in faults.kinds if kind not in CLIENT_FAULTS]
    draw = random.Random(f"{faults.seed}/{round_}")
    if not chosen and kinds and draw.random() < faults.rounds:
        chosen = [draw.choice(kinds)]
    return chosen[0] if chosen else None  # type: ignore[return-value]


def problems(faults: Faults, *, rounds: int, simulated: bool, inline: bool) -> Iterator[str]:
    """Yield a sentence for each thing that this run cannot suffer.

    Args:
        faults: the section.
        rounds: of the run.
        simulated: whether its clients are made by splitting a data set.
        inline: whether they train in the coordinator's process.
    """
    if not simulated:
        yield (
            "faults: they are for simulations, and this run's clients are registered ones; use "
            "clients.simulate, or leave faults out"
        )
    deadly = IN_A_PROCESS_OF_THEIR_OWN & {*faults.kinds, *(f.kind for f in faults.at)}
    if inline and deadly:
        yield (
            f"faults: {min(deadly)} takes the process with it, and with backend: inline that is "
            "the coordinator's; use backend: ray, or leave it out"
        )
    late = [f for f in faults.at if f.round > rounds]
    if late:
        yield f"faults: {late[0].kind} is for round {late[0].round}, and there are {rounds} rounds"
