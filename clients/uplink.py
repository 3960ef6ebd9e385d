"""A client's update as it travels: values on masks alone, and changes through the encodings.

Where the broadcast has a mask, both sides know which entries can have changed. So the values there
travel, in the tensor's order and one dimension, and nothing else: exact, and chosen by the mask
itself. A run with encodings sends its change since the broadcast, on the mask, through them.

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
from strategies.selection import budget_of, expanded
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

    Without encodings these are the values themselves.

    Args:
        trained: what the client would have sent.
        sent: what it was sent.
        uplink: the run's encodings.
        seed: of the client's round.
        kept: the client's own tensors, as an earlier round kept them.

    Returns:
        The values or the encoded change; and all that was left out so far, under
        :data:`LEFT_OUT`, if a stage has feedback, else nothing.
    """
    values = _on_mask(trained, sent)
    if not uplink:
        return values, {}
    chain, like, before = stages(uplink), outline(values), _on_mask(sent.tensors, sent)
    change = {}
    for name, tensor in sorted(values.items()):
        moved = tensor.cpu().double() - before[name].cpu().double()
        if LEFT_OUT + name in kept:
            moved += kept[LEFT_OUT + name].double()
        change[name] = moved.to(like[name].dtype)
    travels = encode(chain, change, seed)
    if not any(stage.feedback for stage in chain):
        return travels, {}
    arrived = decode(chain, travels, like, seed)
    left = {  # nothing of a change that is not finite: it will be refused
        LEFT_OUT + name: torch.nan_to_num(tensor - arrived[name], nan=0.0, posinf=0.0, neginf=0.0)
        for name, tensor in change.items()
    }
    return travels, {n: t for n, t in kept.items() if n.startswith(LEFT_OUT)} | left


def decoded(
    tensors: Tensors, sent: Broadcast, uplink: Sequence[PluginChoice], seed: int
) -> dict[str, Tensor]:
    """Return the tensors that a client means by what it sent.

    Entries that a mask keeps as they are stay so, whatever was sent. Without encodings, a client
    may also send a masked tensor whole, and what is neither is returned as it came. Of a factor of
    which it was to choose ranks, those that it left out are as they were sent.

    Args:
        tensors: what came.
        sent: what the client was sent.
        uplink: the run's encodings.
        seed: of the client's round.

    Raises:
        BadEncoding: if that is not what the encodings make of the tensors that were asked for, or
            no choice of ranks.
    """
    values = dict(tensors)
    if uplink:
        main = _on_mask({n: t for n, t in sent.tensors.items() if n in tensors}, sent)
        change = decode(stages(uplink), tensors, outline(main), seed)
        values = {n: (t.double() + change[n].double()).to(t.dtype) for n, t in main.items()}
    found = {name: _whole(tensor, name, sent) for name, tensor in values.items()}
    return expanded(found, sent.tensors) if budget_of(sent.extra) else found


def _on_mask(tensors: Tensors, sent: Broadcast) -> dict[str, Tensor]:
    """Return the tensors, of those that have a mask the values on it, in one dimension."""
    return {
        name: tensor[sent.mask[name].to(tensor.device) != 0] if name in sent.mask else tensor
        for name, tensor in tensors.items()
    }


def _whole(values: Tensor, name: str, sent: Broadcast) -> Tensor:
    """Return what was sent with ``values`` on its mask; ``values`` itself if it does not fit."""
    if name not in sent.mask or name not in sent.tensors:
        return values
    before, mask = sent.tensors[name], sent.mask[name] != 0
    if values.dtype != before.dtype:
        return values
    if values.shape == before.shape:
        return torch.where(mask, values, before)
    if values.shape != (int(mask.sum()),):
        return values
    return before.masked_scatter(mask, values)
