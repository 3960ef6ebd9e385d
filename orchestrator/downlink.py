"""What clients hold of what they were sent, and what they are therefore not sent again.

A client that by the log has trained from a version holds what it was sent of it. What it holds
under the same name with the same digest is left out; so is an A that a few rotations lead to, which
go in its place. Nothing depends on this but bytes: a client that holds something else says so, and
gets the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from clients.assignment import Assignment
from clients.digests import tensor_digest
from clients.downlink import DIGEST_BYTES, digests, flattened, without
from orchestrator.history import Asked
from storage.store import AdapterStore
from strategies.base import Broadcast, ServerState, Tensors
from strategies.turning import rotated, rotations

_FROM = ("init", "round")  # kinds of parents that a round starts from
_ROUNDS = 32  # whose rotations are known; a resumed run reads as many versions again

_Short: TypeAlias = tuple[Broadcast, Mapping[str, str]]
"""What is sent, and the digests of what is not."""


class _Turn(NamedTuple):
    """What a tensor was turned from, by digest; by what; and in which round."""

    before: str
    rotation: Tensor
    round: int


@dataclass(slots=True)
class Downlink:
    """Leaves out of assignments what their clients hold.

    Attributes:
        store: the run's versions.
        held: returns what each client's newest accepted update was trained from.
        again: returns the assignment that a client had then, whole.
    """

    store: AdapterStore
    held: Callable[[], Mapping[str, Asked]]
    again: Callable[[Asked], Assignment]
    _sent: dict[str, tuple[Asked, Mapping[str, str]]] = field(default_factory=dict, init=False)
    _turns: dict[str, _Turn] = field(default_factory=dict, init=False)
    _seen: dict[str, int] = field(default_factory=dict, init=False)

    def turned(self, round_: int, version: str, before: Tensors, after: ServerState) -> None:
        """Take note of what a round turned; what its rotation does not lead to goes whole.

        Args:
            round_: the round.
            version: its version's id.
            before: the adapter that it started from.
            after: what it committed.
        """
        self._seen = {v: r for v, r in self._seen.items() if r > round_ - _ROUNDS}
        self._turns = {d: turn for d, turn in self._turns.items() if turn.round > round_ - _ROUNDS}
        self._seen[version] = round_
        for name, rotation in rotations(after.auxiliary).items():
            old, new = before.get(name), after.adapter.get(name)
            if old is None or new is None or torch.equal(old, new):
                continue
            if torch.equal(rotated(rotation, old), new):
                self._turns[tensor_digest(new)] = _Turn(tensor_digest(old), rotation, round_)

    def shortened(self, assignments: Sequence[Assignment]) -> list[Assignment]:
        """Return assignments from one version without what their clients hold.

        Those that share a broadcast and hold the same of it share what is left.
        """
        if all(a.held is None for a in assignments):
            return list(assignments)
        held = self.held()
        known = [self._known(held.get(a.client)) for a in assignments]
        if any(known):
            self._recall(assignments[0].base)
        whole = {id(a.broadcast): digests(a.broadcast) for a in assignments}
        alike: dict[tuple[int, int], _Short] = {}
        made: dict[tuple[int, frozenset[str]], _Short] = {}
        short = []
        for a, own in zip(assignments, known, strict=True):
            now, same = whole[id(a.broadcast)], (id(a.broadcast), id(own))
            if same not in alike:
                turns = self._left_out(flattened(a.broadcast), now, own)
                what = id(a.broadcast), frozenset(f"{own[name]} {name}" for name in turns)
                if what not in made:
                    stacked = {name: torch.stack(t) for name, t in turns.items() if t}
                    left = without(a.broadcast, turns.keys(), stacked)
                    made[what] = left, {name: now[name] for name in turns}
                alike[same] = made[what]
            left, out = alike[same]
            short.append(replace(a, broadcast=left, held=out))
            self._sent[a.client] = Asked(a.client, a.round, a.base), now
        return short

    def _known(self, asked: Asked | None) -> Mapping[str, str]:
        """Return the digests of what a client was sent then; of nothing if it never was."""
        if asked is None:
            return {}
        then, known = self._sent.get(asked.client, (None, {}))
        return known if then == asked else digests(self.again(asked).broadcast)

    def _left_out(
        self, sent: Tensors, now: Mapping[str, str], known: Mapping[str, str]
    ) -> dict[str, list[Tensor]]:
        """Return what goes without, and by what rotations it is had from what is held."""
        found = {}
        for name, tensor in sent.items():
            if name in known:
                turns = self._way(known[name], now[name], tensor.nbytes - DIGEST_BYTES)
                if turns is not None:
                    found[name] = turns
        return found

    def _way(self, before: str, digest: str, most: int) -> list[Tensor] | None:
        """Return the rotations from one digest to another; None where they take ``most`` bytes."""
        turns: list[Tensor] = []
        while sum(turn.nbytes for turn in turns) < most:
            if digest == before:
                return turns[::-1]
            if digest not in self._turns:
                return None
            digest, turn, _ = self._turns[digest]
            turns.append(turn)
        return None

    def _recall(self, version: str) -> None:
        """Read again what the rounds up to a version turned, where another process did them."""
        for _ in range(_ROUNDS):
            if version in self._seen:
                return
            found = self.store.version(version)
            round_ = self._seen[version] = found.recipe["round"]
            parent = next((one.id for one in found.parents if one.kind in _FROM), None)
            if round_ == 0 or parent is None:
                return
            auxiliary = self.store.auxiliary(version)
            if rotations(auxiliary):
                after = ServerState(self.store.tensors(version), auxiliary)
                self.turned(round_, version, self.store.tensors(parent), after)
            version = parent
