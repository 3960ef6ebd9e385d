"""Regularizers: what a method cannot see, it cannot leak.

The argument lists are the privacy contract. Only ``example_loss``, ``rehearsal_loss``,
``prepare_from_data`` and ``consolidate_from_data`` see data; the first is clipped and noised with
the loss, the others are refused under DP. Everything else is a function of released values, and
free.

``memory`` is plain tensors by the plug-in's own names; the caller keeps them namespaced
(``o-lora/NAME``) with :func:`recall` and :func:`namespaced`, and versions them beside the adapter.

A *reading* is a round in which clients train nothing: ``prepare``, before round 1, and
``consolidate``, of the result. Each client sends what a hook of that name returns, and ``combine``
makes the memory of it. It takes place where a method of the run overrides such a hook.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from strategies.plugins import Family

if TYPE_CHECKING:  # a config only asks which plug-ins there are
    from torch import Tensor, nn

    from clients.reading import Reading
    from strategies.base import Tensors, Update

REGULARIZERS = Family("regularizer", "clients.regularizers")

When: TypeAlias = Literal["prepare", "consolidate"]
"""Which reading: before round 1, or of the result."""

_DATA_HOOKS: Mapping[When, str] = {
    "prepare": "prepare_from_data",
    "consolidate": "consolidate_from_data",
}


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a run starts from, before its round 1.

    Attributes:
        adapter: the tensors of adapter and head that round 1 is sent.
        first: whether nothing was learned in them yet.
        known: indices of the labels that they can tell apart, ascending.
    """

    adapter: Tensors
    first: bool = True
    known: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a client keeps of its examples for later tasks, and how it trains on them again.

    Attributes:
        size: how many it keeps at most, of all tasks together, >= 1.
        batch: how many of those of earlier tasks go with each step, >= 1.
        outputs: whether each is kept with the logits that it had when it was kept.
        labels: which take part in the softmax of a kept example: all that its client has ``seen``,
            in this task and those that it keeps examples of, or those of its ``task``.
    """

    size: int
    batch: int
    outputs: bool = False
    labels: Literal["seen", "task"] = "seen"


class Regularizer:
    """A method that shapes local training. Every hook does nothing by default.

    Attributes:
        acts_on: regular expression (``re.fullmatch``) of tensor names; a run that trains none of
            them is refused, because the method would do nothing.
        freezes: regular expression of tensor names that this method needs frozen, or empty; a run
            that trains one of them is refused.
        whole_factors: whether it needs every low-rank layer to have B and A whole; an adapter that
            keeps blocks of them is refused.
        linear_steps: whether what it does to gradients must be done to steps as well, so that it
            needs an optimizer whose steps are linear in them: sgd.
        starts: how a task of a stream starts from the one before, unless the stream's file says:
            ``continue``, ``stack`` or ``fresh``.
        holds: what of the run's start every round is held against: its ``tensors`` one by one, its
            ``outputs``, or nothing; what does not keep them comparable is refused.
        anchored: whether memory is compared with the trained tensors entry by entry, so that an
            entry must mean the same in every round and task; what changes that is refused.
    """

    acts_on: ClassVar[str] = ".*"
    freezes: str = ""
    starts: ClassVar[str] = "continue"
    whole_factors: ClassVar[bool] = False
    linear_steps: ClassVar[bool] = False
    anchored: ClassVar[bool] = False
    holds: ClassVar[Literal["", "tensors", "outputs"]] = ""

    @property
    def rehearsal(self) -> Rehearsal | None:
        """What is kept of a client's examples, by the client alone; None for nothing."""
        return None

    def initialise(self, adapter: Tensors, memory: Tensors) -> Tensors:
        """Return the adapter's first tensors, changed before round 1. Parameters only: free."""
        return adapter

    def begin(self, start: Beginning, memory: Tensors) -> Tensors:
        """Return the memory that every round of the run has. Parameters only: free."""
        return memory

    def teacher(self, memory: Tensors) -> Tensors:
        """Return the adapter and head whose logits ``example_loss`` needs; empty for none.

        They come with its batch, as ``batch.taught["outputs"]``, from a pass in evaluation mode
        that leaves no gradient and draws no random number. Parameters only: free.
        """
        return {}

    def penalty(
        self, params: Mapping[str, Tensor], reference: Tensors, memory: Tensors
    ) -> Tensor | None:
        """Return a scalar to add to the loss. No data: its gradient is added after the noise.

        Args:
            params: what is trained.
            reference: all that the round began with, scalings and what is frozen included.
            memory: of earlier tasks.
        """
        return None

    def example_loss(
        self, model: nn.Module, batch: Any, outputs: Tensor, memory: Tensors
    ) -> Tensor | None:
        """Return ``[batch]`` values to add to the examples' losses; clipped with them."""
        return None

    def rehearsal_loss(self, losses: Tensor, outputs: Tensor, kept: Tensor) -> Tensor:
        """Return ``[batch]``: what kept examples add to the loss. Refused under DP.

        Only where ``rehearsal`` says that there are any.

        Args:
            losses: the cross entropy of each, ``[batch]``.
            outputs: their logits now, ``[batch, labels]``, of tags ``[batch, length, labels]``.
            kept: their logits when they were kept, likewise; NaN where none are kept, for labels
                that took no part in the softmax then, and at tokens that stand for no word.
        """
        raise NotImplementedError(f"{type(self).__name__} rehearses and does not say how")

    def project(self, grads: Tensors, memory: Tensors) -> Tensors:
        """Return changed gradients, after clipping and noise."""
        return grads

    def observe(self, grads: Tensors, before: Tensors, after: Tensors, memory: Tensors) -> Tensors:
        """Return the memory after an optimizer step on released gradients.

        What it adds under names that the run's memory has not stays at the client, which finds it
        again in its next round, and in :meth:`consolidate_observed`.
        """
        return memory

    def consolidate(self, params: Tensors, memory: Tensors) -> Tensors:
        """Return the memory after a task, from the final adapter alone."""
        return memory

    def prepare_from_data(self, reading: Reading, memory: Tensors) -> Tensors:
        """Return what a client sends before round 1, from its data. Refused under DP."""
        return {}

    def consolidate_from_data(self, reading: Reading, memory: Tensors) -> Tensors:
        """Return what a client sends of the result, from its data. Refused under DP."""
        return {}

    def consolidate_observed(self, params: Tensors, memory: Tensors) -> Tensors:
        """Return what a client sends of the result, from what it observed of released gradients.

        Free under example-level DP.

        Args:
            params: those of the result's tensors that are trained and travel.
            memory: the run's, with what :meth:`observe` added at this client; if it never trained,
                nothing.
        """
        return {}

    def parts(
        self, when: When, params: Tensors, returned: Collection[str]
    ) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of what a client must send in a reading, by name; all are float32.

        Args:
            when: which reading.
            params: the adapter that is read with.
            returned: the names of those of its tensors that are trained and travel.
        """
        return {}

    def combine(
        self, when: When, params: Tensors, memory: Tensors, updates: Iterable[Update]
    ) -> Tensors:
        """Return the memory after a reading, from what the clients sent and from nothing else.

        Args:
            when: which reading.
            params: the adapter that was read with.
            memory: before it; of the result, after :meth:`consolidate`.
            updates: in client order and to be read once; ``tensors`` is what :meth:`parts` names.
        """
        return memory


def reads_data(method: Regularizer, when: When) -> bool:
    """Return whether a method sees clients' data in a reading."""
    return _overrides(method, _DATA_HOOKS[when])


def takes_part(method: Regularizer, when: When) -> bool:
    """Return whether a method needs a reading."""
    observed = when == "consolidate" and _overrides(method, "consolidate_observed")
    return observed or reads_data(method, when)


def from_data(method: Regularizer, when: When, reading: Reading, memory: Tensors) -> Tensors:
    """Return what a method makes of a client's data in a reading."""
    found: Tensors = getattr(method, _DATA_HOOKS[when])(reading, memory)
    return found


def observes(method: Regularizer) -> bool:
    """Return whether a method keeps something of every step."""
    return _overrides(method, "observe")


def rehearses(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a regularizer has clients keep examples; not one that is unknown here."""
    if name not in REGULARIZERS.names():
        return False
    return REGULARIZERS.get(name).build(**options).rehearsal is not None


def _overrides(method: Regularizer, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(Regularizer, hook)


def recall(memory: Tensors, name: str) -> dict[str, Tensor]:
    """Return the part of ``memory`` that belongs to plug-in ``name``, by its own names."""
    prefix = f"{name}/"
    return {k.removeprefix(prefix): v for k, v in memory.items() if k.startswith(prefix)}


def namespaced(memory: Tensors, name: str) -> dict[str, Tensor]:
    """Return a plug-in's ``memory`` under the names by which it is kept."""
    return {f"{name}/{k}": v for k, v in memory.items()}
