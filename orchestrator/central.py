"""Client-level DP at the coordinator: the run's key, what it seals, and the noise in a round's sum.

The coordinator sees single updates and is trusted with them. What it commits and writes about is
private to the clients: noise in the mean change, spends, who was asked and answered, and digests of
updates that are keyed, so that nobody can confirm a guess of what a client sent.

Where the clients put the noise in by shares (:mod:`clients.shares`), it is formed of them alone.
What follows is of the coordinator's own noise.

The noise is bound to everything that it hides. A round that is aggregated again, after a crash
between noise and commit, has the same updates (they were decided and written down first) and so the
same noise, and releases the same bytes. A key that is lost in between stops the run: other noise on
the same updates would be a second release.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from clients.assignment import Assignment
from clients.digests import digest_of
from clients.keys import has_key
from clients.noise import MARGIN, NoiseStream, discretised, grid_of
from clients.session import returned_names
from clients.shares import counted, grid
from clients.site import Site
from orchestrator.acceptance import Accepted, Seal
from orchestrator.collecting import RoundFailed
from orchestrator.history import History
from orchestrator.plan import Plan
from orchestrator.retention import COORDINATOR, coordinator_keys
from strategies.base import ServerState, Tensors, Update
from strategies.bounded import Noised, TooFewShares, mean_of_shares, noised_mean
from strategies.spends import ClientLevel

_CLIP = "central/clip"
"""The auxiliary tensor that is the next round's clip, where that moves."""


class KeyLost(RoundFailed):
    """The key is gone under which updates of an open round were sealed, and perhaps noised."""


class Central:
    """Client-level DP of one run.

    Args:
        terms: bound, noise and denominator.
        run: the run's id.
        home: where the key is kept, readable by its owner alone.
        insecure_seed: replaces the key, for tests.
    """

    def __init__(
        self, terms: ClientLevel, run: str, home: Path, insecure_seed: int | None = None
    ) -> None:
        self._terms, self._run, self._keys = terms, run, coordinator_keys(home)
        self._insecure_seed = insecure_seed

    @cached_property
    def _key(self) -> bytes:
        return Site(self._keys).run_key(self._run, COORDINATOR, self._insecure_seed)

    @property
    def seal(self) -> Seal:
        """What the run's updates are known by, and what a round costs each client in it."""
        return Seal(self._digest, (self._terms.spend,))

    def terms_for(self, state: ServerState) -> ClientLevel:
        """Return the terms of the round that starts from a state."""
        clip = state.auxiliary.get(_CLIP)
        return self._terms if clip is None else replace(self._terms, clip=float(clip))

    def refuse_lost_key(self, history: History) -> None:
        """Refuse to go on with updates that were sealed under a key that is not there any more.

        Raises:
            KeyLost: saying what can be done.
        """
        begun = history.taken or (history.open and history.open.closed)
        here = self._insecure_seed is not None or has_key(self._keys, self._run, COORDINATOR)
        if begun and not here:
            raise KeyLost(
                f"run {self._run} has updates whose noise is keyed by a secret that is not under "
                f"{self._keys} any more; with another key their round could be released twice. "
                f"Bring the key back, or begin anew: weft runs clone {self._run}"
            )

    def aggregated(
        self,
        aggregate: Callable[[Sequence[Update]], ServerState],
        updates: Iterable[Update],
        accepted: Sequence[Accepted],
        asked: Assignment,
    ) -> ServerState:
        """Return what a strategy makes of a round's mean change with noise in it.

        What it measures of this one update says nothing of the clients; told is what the noise is.

        Args:
            aggregate: the strategy's next state, from updates.
            updates: of the round, in the order of ``accepted``.
            accepted: what is aggregated, as it was decided and written down.
            asked: what any of the clients was asked.
        """
        terms = asked.central
        assert terms is not None
        noised = self.mean(updates, accepted, asked)
        state = aggregate([noised.update])
        shares = asked.noise_share
        more = 1.0 if shares is None else math.sqrt(len(accepted) / shares.of)
        told = {"noise_std": terms.noise_std * more}
        if terms.quantile is None:
            return replace(state, metrics=told)
        clip = torch.tensor(terms.after(noised.share).clip, dtype=torch.float64)
        told |= {"clip": terms.clip, "share_within_clip": noised.share}
        return replace(state, auxiliary={**state.auxiliary, _CLIP: clip}, metrics=told)

    def mean(
        self, updates: Iterable[Update], accepted: Sequence[Accepted], asked: Assignment
    ) -> Noised:
        """Return a round's clients as one update; arguments as in :meth:`aggregated`.

        Raises:
            RoundFailed: if the clients were to make the noise, and it is not whole.
        """
        terms = asked.central
        assert terms is not None
        names = returned_names(asked)
        like = {name: asked.broadcast.tensors[name] for name in names}
        if asked.noise_share is not None:
            return Noised(_of_shares(updates, like, terms.cohort, asked), math.nan)
        hidden = {
            "round": asked.round,
            "base": asked.base,
            "broadcast": asked.broadcast,
            "names": names,
            "terms": terms,
            "updates": [[a.leaf["client"], a.round, a.leaf["digest"]] for a in accepted],
        }
        stream = NoiseStream(self._key, digest_of(hidden))
        step = grid_of(min(terms.clip, 1.0), sum(tensor.numel() for tensor in like.values()))

        def noise(name: str, total: Tensor, deviation: float) -> Tensor:
            normals = stream.normal(name, asked.round, total.shape)
            return discretised(total, deviation * MARGIN * normals, step)

        return noised_mean(updates, like, asked.broadcast.mask, terms, noise)

    def _digest(self, data: bytes) -> str:
        return hmac.digest(self._key, b"weft update\0" + data, "sha256").hex()


def _of_shares(updates: Iterable[Update], like: Tensors, cohort: int, asked: Assignment) -> Update:
    """Return the mean of changes in which each client has put a share of the noise."""
    assert asked.noise_share is not None
    whole = (replace(u, tensors=counted(u.tensors, asked)) for u in updates)
    try:
        return mean_of_shares(whole, like, grid(asked), cohort, asked.noise_share.of)
    except TooFewShares as error:
        raise RoundFailed(f"round {asked.round}: {error}") from None


def central_of(plan: Plan, home: Path) -> Central | None:
    """Return a run's client-level DP, or None where it has none."""
    privacy = plan.config.privacy
    if plan.central is None or privacy is None:
        return None
    return Central(plan.central, plan.run, home, privacy.insecure_seed)
