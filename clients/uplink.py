"""A client's update as it travels: its change since the broadcast, through the run's encodings.

The client encodes what it would have sent, after any noise, so that privacy is not touched. What
the encodings leave out, it keeps among its own tensors and adds to its next change: round t reads
what round t-1 wrote or an earlier one. It takes for granted that what it sent is used: of an update
that comes too late or is refused, only what was left out comes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clients.assignment import PluginChoice
from strategies.base import Broadcast, Tensors
from strategies.encodings import ENCODINGS
from strategies.uplink import Encoding, decode, encode, layouts, outline

LEFT_OUT = "left-out/"
"""Prefix of the client's own tensors that were left out of what it sent."""


def stages(choices: Sequence[PluginChoice]) -> list[Encoding]:
    """Return the encodings of a run, in order."""
    return [ENCODINGS.get(choice.name).build(**choice.options) for choice in choices]


def size_bytes(uplink: Sequence[PluginChoice], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how large an update of float32 tensors of these shapes is on its way.

    >>> size_bytes([PluginChoice("top-k", {"density": 0.5}), PluginChoice("fp16")], {"x": (4, 5)})
    60
    """
    like = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return sum(tensor.nbytes for tensor in layouts(stages(uplink), like)[-1].values())


def encoded(
    trained: Tensors, sent: Broadcast, uplink: Sequence[PluginChoice], seed: int, kept: Tensors
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what travels, and what the client keeps for its next round.

    Args:
        trained: what the client would have sent.
        sent: what it was sent.
        uplink: the run's encodings.
        seed: of the client's round.
        kept: the client's own tensors, as an earlier round kept them.

    Returns:
        The encoded change; and all that was left out so far, under :data:`LEFT_OUT`, if a stage has
        feedback, else nothing.
    """
    chain, like = stages(uplink), outline(trained)
    change = {}
    for name, tensor in sorted(trained.items()):
        moved = tensor.cpu().double() - sent.tensors[name].cpu().double()
        if LEFT_OUT + name in kept:
            moved += kept[LEFT_OUT + name].double()
        change[name] = moved.to(like[name].dtype)
    travels = encode(chain, change, seed)
    if not any(stage.feedback for stage in chain):
        return travels, {}
    arrived = _masked(decode(chain, travels, like, seed), sent)
    left = {  # nothing of a change that is not finite: it will be refused
        LEFT_OUT + name: torch.nan_to_num(tensor - arrived[name], nan=0.0, posinf=0.0, neginf=0.0)
        for name, tensor in change.items()
    }
    return travels, {n: t for n, t in kept.items() if n.startswith(LEFT_OUT)} | left


def decoded(
    tensors: Tensors, sent: Broadcast, uplink: Sequence[PluginChoice], seed: int
) -> dict[str, Tensor]:
    """Return the tensors that a client means by what it sent: the broadcast and its change.

    Entries that a mask keeps as they are stay so, whatever was sent.

    Args:
        tensors: what came.
        sent: what the client was sent.
        uplink: the run's encodings.
        seed: of the client's round.

    Raises:
        BadEncoding: if that is not what the encodings make of the tensors that were asked for.
    """
    main = {n: t for n, t in sent.tensors.items() if n in tensors}
    change = _masked(decode(stages(uplink), tensors, outline(main), seed), sent)
    return {
        name: (main[name].double() + change[name].double()).to(main[name].dtype) for name in main
    }


def _masked(change: Tensors, sent: Broadcast) -> dict[str, Tensor]:
    return {
        name: torch.where(sent.mask[name] != 0, tensor, 0) if name in sent.mask else tensor
        for name, tensor in change.items()
    }
