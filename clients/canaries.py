"""An attack on DP-SGD as it is implemented here: gradient canaries, and guesses which were there.

Source: arXiv 2305.08846 (white-box attack with Dirac canaries). A canary is an example whose
gradient is as long as clipping lets it be, and lies along a number of the trained tensors that is
no other canary's. Each is in the data or not by a fair coin. They go through the
step that training makes: a backward pass through the model's own trained layers, the engine's
measuring (where more trains than plain linear layers, one example at a time, straight at the
tensors), clip, Poisson sample and noise. The attacker sees what each step releases, adds up what
it says along each canary, and guesses the clearest: the highest to be in, the lowest to be out.

Nobody's data are read: what bounds a real example's influence bounds a canary's, and no other
example is there to be in its way, so that nothing is spent and the attack is at its strongest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from clients.assignment import Assignment
from clients.clipping import layer_of
from clients.gradients import private_gradient
from clients.noise import NoiseStream
from clients.one_run import BadGuesses, Guesses
from clients.session import Session, opened, trained_names
from clients.taps import tappable
from strategies.base import Tensors

_LOUD = 1e3  # a canary's input, so that a bias beside the weight gets a thousandth of it
_EXCESS = 10.0  # a canary's norm over the bound: it is the clip that must shorten it

_FAR = 1e4  # no canary's norm is within a bound that is learned, which would grow without end


class NoPlaceForCanaries(ValueError):
    """The trained tensors cannot hold so many gradient canaries."""


def white_box(assignment: Assignment, canaries: int, made: int, key: bytes) -> Guesses:
    """Attack the steps of a private assignment by gradient canaries, and return what was guessed.

    The assignment's data are not read and its tensors stay as they are: a canary's gradient does
    not depend on them.

    Args:
        assignment: with privacy; its steps are all steps that one unit's epsilon is claimed for.
        canaries: how many, >= 1; the trained tensors must have as many numbers.
        made: guesses, half of them that a canary was in and half that it was not.
        key: of noise, sample and coins; nobody's but the audit's.

    Raises:
        BadGuesses: if there are fewer canaries than guesses.
        NoPlaceForCanaries: if the trained tensors are too small.
    """
    refuse_senseless(canaries, made)
    present = tossed(canaries, key)
    scores = _scores(assignment, canaries, present, NoiseStream(key, assignment.digest()))
    return guessed(scores, present, made)


def refuse_senseless(canaries: int, made: int) -> None:
    """Refuse an attack before its cost.

    Raises:
        BadGuesses: if there are fewer canaries than guesses.
    """
    if not 1 <= made <= canaries:
        raise BadGuesses(f"guesses must be from 1 to the {canaries} canaries, got {made}")


def tossed(canaries: int, key: bytes) -> Tensor:
    """Return which canaries are in the data, each by a fair coin: their numbers, ascending."""
    coins = NoiseStream(key, "which canaries are in")  # no digest, so independent of the noise
    return coins.poisson_sample(0, canaries, 0.5)


def guessed(scores: Tensor, present: Tensor, made: int) -> Guesses:
    """Guess of the highest scores that they were in, and of the lowest that they were not.

    Args:
        scores: the higher, the more likely in, ``[canaries]``.
        present: numbers of those that were.
        made: how many guesses, half of them each way.
    """
    order = scores.argsort(descending=True, stable=True)
    told_in, told_out = order[: made // 2], order[len(scores) - (made - made // 2) :]
    member = torch.zeros(len(scores), dtype=torch.bool)
    member[present] = True
    right = int(member[told_in].sum()) + int((~member[told_out]).sum())
    return Guesses(len(scores), made, right)


def _scores(a: Assignment, canaries: int, present: Tensor, stream: NoiseStream) -> Tensor:
    """Return what all steps together release along each canary, ``[canaries]``."""
    assert a.privacy is not None
    assert a.steps is not None
    scores = torch.zeros(canaries, dtype=torch.float64)
    with opened(a) as session:
        session.write(a.broadcast.tensors)
        params = _trained(a, session)
        mask = {n: a.broadcast.mask[n].to(a.device) for n in params if n in a.broadcast.mask}
        places = _Places.of(a, session.model, params, mask, canaries)
        session.model.train()
        with private_gradient(a, session.model, params, mask, stream, places.engine) as engine:
            first = engine.bound
            for step in range(a.steps):
                if not first / _FAR < engine.bound < first * _FAR:
                    engine.bound = first
                bound = engine.bound
                taken = stream.poisson_sample(step, len(present), a.privacy.sample_rate)
                batches = torch.split(present[taken], a.microbatch) if len(taken) else ()
                engine.step(batches, partial(places.losses, norm=_EXCESS * bound), step)
                scores += places.read() * engine.expected_batch_size / bound
    return scores


def _trained(a: Assignment, session: Session) -> dict[str, nn.Parameter]:
    live = session.parameters()
    names = trained_names(a, list(live))
    for name, parameter in live.items():
        parameter.requires_grad_(name in names)
    return {name: live[name] for name in names}


@dataclass(frozen=True, slots=True)
class _Places:
    """Where each canary's gradient lies.

    Attributes:
        homes: the trained tensors in which canaries lie.
        layers: plain linear layers, whose weights these are; none where more than such trains.
        entries: numbers of the homes, one tensor's after the other's, ``[parts, canaries]``: a
            canary has one of each part, and no other canary has it.
    """

    homes: Sequence[Tensor]
    layers: Sequence[nn.Linear]
    entries: Tensor

    @classmethod
    def of(
        cls,
        a: Assignment,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        mask: Tensors,
        canaries: int,
    ) -> _Places:
        """Return places for canaries among the numbers that a mask leaves to training."""
        assert a.privacy is not None
        by_layer = a.privacy.clipping.mode == "per-layer"
        names = {id(p): name for name, p in params.items()}
        layers = _layers(model, params)
        homes: list[Tensor] = [layer.weight for layer in layers] or list(params.values())
        generator = torch.Generator().manual_seed(a.seed)
        # where each layer is clipped by itself, only a canary in all of them is as long as may be
        groups: dict[str, list[Tensor]] = {}
        start = 0
        for home in homes:
            name = names[id(home)]
            free = torch.ones(home.numel()) if name not in mask else mask[name].flatten().cpu()
            own = start + free.nonzero().flatten()
            start += home.numel()
            groups.setdefault(layer_of(name) if by_layer else "", []).append(own)
        parts = [torch.cat(parts) for _, parts in sorted(groups.items())]
        largest = max((len(part) for part in parts), default=0)
        if largest < canaries:
            raise NoPlaceForCanaries(
                f"{canaries} gradient canaries need as many trained numbers, and there are "
                f"{largest}; take as many canaries at most, or a higher rank"
            )
        chosen = [
            part[torch.randperm(len(part), generator=generator)[:canaries]]
            for part in parts
            if len(part) >= canaries
        ]
        return cls(homes, layers, torch.stack(chosen))

    @property
    def engine(self) -> str:
        """What measures the canaries' gradients."""
        return "taps" if self.layers else "alone"

    def losses(self, batch: Tensor, norm: float) -> Tensor:
        """Return losses ``[batch]`` whose gradients are the canaries', ``norm`` long in each part.

        Every layer is run on inputs of its own, so that it is measured as in training.

        Args:
            batch: numbers of canaries.
            norm: > 0.
        """
        losses = torch.zeros(len(batch))
        start = 0
        for number, home in enumerate(self.homes):
            local = self.entries[:, batch] - start
            part, here = ((local >= 0) & (local < home.numel())).nonzero(as_tuple=True)
            start += home.numel()
            if self.layers:
                own = _through(self.layers[number], local[part, here], here, len(batch), norm)
            else:
                own = torch.zeros(len(batch)).to(home)
                values = norm * home.flatten()[local[part, here]]
                own = own.index_add(0, here.to(home.device), values)
            losses = losses.to(own.device) + own.float()
        return losses

    def read(self) -> Tensor:
        """Return what the gradients at the homes say along each canary, float64 ``[canaries]``."""
        released = torch.cat([_gradient(home).flatten() for home in self.homes]).double().cpu()
        return released[self.entries].sum(0)


def _through(layer: nn.Linear, local: Tensor, here: Tensor, batch: int, norm: float) -> Tensor:
    """Return losses ``[batch]``, some of which have one number of a layer's weight as gradient.

    Args:
        layer: run on as many inputs.
        local: numbers of its weight, flattened.
        here: each one's example.
        batch: number of examples.
        norm: of the gradients.
    """
    inputs = torch.zeros(batch, layer.in_features)
    wanted = torch.zeros(batch, layer.out_features)
    inputs[here, local % layer.in_features] = _LOUD
    wanted[here, local // layer.in_features] = norm / _LOUD
    outputs = layer(inputs.to(layer.weight)).float()
    losses: Tensor = (outputs * wanted.to(outputs)).sum(1)
    return losses


def _gradient(home: Tensor) -> Tensor:
    return torch.zeros_like(home) if home.grad is None else home.grad


def _layers(model: nn.Module, params: Mapping[str, nn.Parameter]) -> list[nn.Linear]:
    """Return the plain linear layers whose weights train; none if anything else trains too."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and tappable(module) and module.weight.requires_grad
    ]
    known = {id(p) for layer in found for p in (layer.weight, layer.bias)}
    return found if all(id(p) in known for p in params.values()) else []
