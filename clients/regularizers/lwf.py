"""LwF (1606.09282): the model before the task teaches the one that learns it, on the new inputs.

The term is ``weight * T^2 * KL(softmax(z_old / T) || softmax(z / T))``: the teacher's distribution
comes first. (TRACE's code has the reverse, and finds a teacher's logits by the number of the step,
so that shuffling gives an example those of another; here they are computed of the batch at hand.)
The teacher is the adapter and head that the *run* started from, on the same frozen base: the
round's broadcast would have learned the task by then. Where it differs from the paper: the old
labels' rows of the head stay as they are, and there is no warm-up of the new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clients.regularizers import Beginning, Regularizer, namespaced, recall
from clients.tags import IGNORED
from strategies.base import Tensors
from strategies.plugins import Range

_TEACHER, _KNOWN = "teacher", "known"


@dataclass(frozen=True)
class LwF(Regularizer):
    """The run's start teaches what it knew, by its logits of the new task's examples.

    Of a classification the labels that it could tell apart, of a language model every token that is
    learned. On a first task there is nothing to teach, and it does nothing. It needs a second pass
    over each batch, without gradients, and every round sends the teacher.

    Attributes:
        weight: strength, >= 0; 0 does nothing.
        temperature: T, > 0; 2 is the paper's.
    """

    holds: ClassVar[Literal["", "tensors", "outputs"]] = "outputs"

    weight: Annotated[float, Range(0)] = 1.0
    temperature: Annotated[float, Range(0, open_low=True)] = 2.0

    def begin(self, start: Beginning, memory: Tensors) -> Tensors:
        """Return ``teacher/NAME``, the start's tensors, and ``known`` ``[labels]`` int64.

        A language model has no labels.
        """
        if start.first or self.weight == 0:
            return {}
        known = torch.tensor(start.known, dtype=torch.int64)
        return {**namespaced(start.adapter, _TEACHER), _KNOWN: known}

    def teacher(self, memory: Tensors) -> Tensors:
        """Return the start's adapter and head."""
        return recall(memory, _TEACHER)

    def example_loss(
        self, model: nn.Module, batch: Any, outputs: Tensor, memory: Tensors
    ) -> Tensor | None:
        """Return each example's divergence from the teacher, ``[batch]``; None on a first task.

        Where tokens are learned it is their mean; of a language model each is judged where it is
        predicted.
        """
        if _KNOWN not in memory:
            return None
        taught: Tensor = batch.taught["outputs"]
        learned: Tensor = batch.labels != IGNORED
        known = memory[_KNOWN]
        if len(known):
            each = self._divergence(taught[..., known], outputs[..., known])
        else:
            learned = learned[:, 1:]
            each = self._divergence(taught[:, :-1], outputs[:, :-1])
        if each.dim() == 1:
            return each
        return (each * learned).sum(1) / learned.sum(1).clamp(min=1)

    def _divergence(self, taught: Tensor, outputs: Tensor) -> Tensor:
        """Return eq. 2 of the paper, as a divergence, over the last dimension."""
        old, new = (functional.log_softmax(z / self.temperature, dim=-1) for z in (taught, outputs))
        each = functional.kl_div(new, old, reduction="none", log_target=True).sum(-1)
        return self.weight * self.temperature**2 * each

    def consolidate(self, params: Tensors, memory: Tensors) -> Tensors:
        """Return no memory: the next run has a teacher of its own."""
        return {}
