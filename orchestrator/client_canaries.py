"""An attack on client-level DP: made-up clients in a round's sum, and guesses which were there.

As :mod:`clients.canaries`, with clients for examples: a canary's change of what is sent is longer
than the clip lets it be, and lies along a number of its own. Each is in all sums or in none, by a
fair coin, and goes through what makes the run's noised mean; the attacker sees that of each round.
Where clients make the noise themselves, canaries add none, and as many made-up clients as make it
whole, and no more, add their shares and no change. No client is asked for anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clients.assignment import Assignment
from clients.canaries import NoPlaceForCanaries, guessed, tossed
from clients.one_run import Guesses
from clients.session import returned_names
from clients.shares import bounded, with_share
from clients.site import Site
from clients.uplink import encoded
from orchestrator.acceptance import Accepted
from orchestrator.central import Central
from strategies.base import Tensors, Update

_EXCESS = 10.0  # a canary's change over the clip: it is the clip that must shorten it
_FAR = 1e4  # no canary is within a clip that moves, which would grow without end


def attack_sums(
    central: Central, asked: Assignment, rounds: int, canaries: int, made: int, key: bytes
) -> Guesses:
    """Attack the noised means of a run's rounds, and return what was guessed.

    Args:
        central: what makes them, with a key of its own.
        asked: what a client of round 1 is asked.
        rounds: how many one client's epsilon is claimed for.
        canaries: how many, >= 1; clients send as many numbers at least.
        made: guesses, half of them that a canary was in and half that it was not.
        key: of the coins.

    Raises:
        NoPlaceForCanaries: if clients send fewer numbers than there are canaries.
    """
    first = asked.central
    assert first is not None
    terms = first
    sent, mask = asked.broadcast.tensors, asked.broadcast.mask
    names = returned_names(asked)
    free = torch.cat([mask.get(n, torch.ones_like(sent[n])).flatten() for n in names]).nonzero()
    if len(free) < canaries:
        raise NoPlaceForCanaries(
            f"{canaries} canaries need as many numbers that clients send, and there are "
            f"{len(free)}; take as many canaries at most, or a higher rank"
        )
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(asked.seed))
    places = free.flatten()[order[:canaries]]
    present = tossed(canaries, key)
    before = torch.cat([sent[name].flatten() for name in names]).double()
    scores = torch.zeros(canaries, dtype=torch.float64)
    for round_ in range(1, rounds + 1):
        assignment = replace(asked, round=round_, central=terms)
        updates = _changed(assignment, names, places[present], _EXCESS * terms.clip)
        here = [Accepted(_leaf(number), round_, Path()) for number in range(len(present))]
        noised = central.mean(updates, here, assignment)
        mean = torch.cat([noised.update.tensors[name].flatten() for name in names]).double()
        scores += (mean - before)[places] * terms.cohort / terms.clip
        terms = terms.after(noised.share)
        if not first.clip / _FAR < terms.clip < first.clip * _FAR:
            terms = first
    return guessed(scores, present, made)


def _changed(
    asked: Assignment, names: list[str], places: Tensor, length: float
) -> Iterator[Update]:
    """Yield the updates of canaries, each of which changes one number by ``length``, and noise."""
    sent, shares = asked.broadcast.tensors, asked.noise_share
    for number in range(0 if shares is None else shares.of):
        who = replace(asked, client=f"share-{number}")
        noise = bounded({name: sent[name] for name in names}, who, Site(asked.site))
        yield _travelled(who.client, asked, noise)
    for number, place in enumerate(places.tolist()):
        tensors = {name: sent[name] for name in names}
        for name in names:
            if place < sent[name].numel():
                changed = sent[name].clone()
                changed.view(-1)[place] += length
                tensors[name] = changed
                break
            place -= sent[name].numel()
        if shares is not None:
            tensors = with_share(tensors, asked, None)
        yield _travelled(_leaf(number)["client"], asked, tensors)


def _travelled(client: str, asked: Assignment, tensors: Tensors) -> Update:
    """Return an update as it comes: of a tensor with a mask, shares travel on that alone."""
    if asked.noise_share is not None:
        tensors, _ = encoded(tensors, asked.broadcast, (), 0, {})
    return Update(client, asked.round, asked.base, tensors, num_examples=1)


def _leaf(number: int) -> dict[str, str]:
    return {"client": f"canary-{number}", "digest": ""}
