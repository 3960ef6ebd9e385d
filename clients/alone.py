"""Per-example gradients by microbatches of one: slow, and true of every model.

It is what the other engines are compared with. An example costs a forward and a backward pass of
its own; quantised layers, checkpointing and whatever an adapter does make no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clients.samples import Dense, Gradients, Losses, refuse_mixed, singles


@contextmanager
def alone(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[Alone]:
    """Measure per-example gradients of ``params`` inside; it needs nothing of ``model``."""
    yield Alone(params)


@dataclass(frozen=True, slots=True)
class Alone:
    """The engine that runs every example by itself.

    Attributes:
        params: all that trains, by name.
    """

    params: Mapping[str, nn.Parameter]

    def gradients(self, batch: Any, losses_fn: Losses[Any], *, check: bool) -> Gradients:
        """See :class:`clients.samples.Engine`; there is nothing that ``check`` would add."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.params}
        self.forget()
        try:
            for one in singles(batch):
                losses = losses_fn(one)
                refuse_mixed(losses)
                torch.autograd.backward(losses.sum())
                for name, p in self.params.items():
                    found[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
                    p.grad = None
        finally:
            self.forget()
        return {name: Dense(torch.stack(each)) for name, each in found.items()}

    def forget(self) -> None:
        """Drop the gradients at the parameters."""
        for p in self.params.values():
            p.grad = None
