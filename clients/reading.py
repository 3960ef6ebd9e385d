"""A reading: what a client's regularizers make of its data, or of what it observed; none trains.

What is sent are tensors whose names and shapes are known before (:func:`wanted`), of a model
without dropout. What reads data is never private: it does not run under DP, whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients import data
from clients.assignment import Assignment
from clients.models import TaskModel
from clients.pace import Stepped, unheard
from clients.per_example import engines_of, measuring
from clients.regularizers import (
    REGULARIZERS,
    Regularizer,
    When,
    from_data,
    namespaced,
    observes,
    reads_data,
    recall,
    takes_part,
)
from clients.session import Session, allowed_labels, move, opened, personal_names, returned_names
from clients.site import Site
from clients.verification import chosen, deterministic
from clients.wire import pack, unpack
from strategies.base import Tensors, Update

_KEPT = "memory/"  # among what a client keeps: no tensor's name
_FACTOR = ".lora_A.weight"

Values = Callable[[data.Batch], Tensor]
"""Returns ``[batch]`` values of a batch's examples, with their graph."""


class NothingToRead(ValueError):
    """The client has no example for a method that reads some."""


class NotPrivate(RuntimeError):
    """A method that reads data was asked for under DP."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A client's data and a model, as a method that reads them sees both.

    Attributes:
        model: with its adapter and head, without dropout.
        params: the live parameters of adapter and head, by weft's names.
        returned: the names of those that are trained and travel; they alone have gradients.
        batches: returns the client's examples, each once, always in the same order.
        sample: a few of them.
        engines: names of those that may measure gradients, in the order in which to try them.
        kind: of the model's task.
        allowed: indices of the labels that take part in the softmax, or None for all.
        seed: for what a method draws.
    """

    model: TaskModel
    params: Mapping[str, nn.Parameter]
    returned: tuple[str, ...]
    batches: Callable[[], Iterator[data.Batch]]
    sample: data.Batch
    engines: Sequence[str]
    kind: str
    allowed: Tensor | None
    seed: int

    def losses(self, batch: data.Batch) -> Tensor:
        """Return the examples' losses, ``[batch]``."""
        return self.model.example_losses(self.model(batch), batch, self.allowed)

    def aligned(self, logits: Tensor, batch: data.Batch) -> tuple[Tensor, Tensor]:
        """Return ``[batch, targets, choices]`` logits and ``[batch, targets]`` what they are for.

        As labels of the batch, -100 where nothing is learned: a text has one target, one whose
        words are tagged has one a token, and one that is continued predicts each from the one
        before.

        Args:
            logits: what the model returned for ``batch``.
            batch: the examples.
        """
        if self.kind == "classification":
            return logits[:, None], batch.labels[:, None]
        if self.kind == "token-classification":
            return logits, batch.labels
        return logits[:, :-1], batch.labels[:, 1:]

    def gradients(self, values: Values) -> Iterator[dict[str, Tensor]]:
        """Yield each batch's gradients of ``values``, one an example: ``[batch, *shape]`` by name.

        By the fastest engine of DP-SGD that measures them rightly here.
        """
        trained = {name: self.params[name] for name in self.returned}
        self.model.train()
        engine = chosen(self.model, trained, self.engines, self.sample, self.losses)
        with deterministic(self.model), measuring(self.model, trained, engine) as measure:
            for batch in self.batches():
                found = measure.gradients(batch, values, check=False)
                yield {name: one.dense().detach() for name, one in found.items()}

    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """Yield what enters the low-rank layers, batch by batch: ``[positions, in_features]``.

        By the layer's name. Of texts, the positions that are no padding; needs no gradient.
        """
        owners = {id(p): m for m in self.model.modules() for p in m.parameters(recurse=False)}
        layers = {
            name.removesuffix(_FACTOR): owners[id(p)]
            for name, p in self.params.items()
            if name.endswith(_FACTOR) and id(p) in owners
        }
        self.model.eval()
        for batch in self.batches():
            seen: dict[str, Tensor] = {}
            shown = batch.attention_mask.bool()
            handles = [
                module.register_forward_pre_hook(_noting(seen, name, shown))
                for name, module in layers.items()
            ]
            try:
                with torch.no_grad():
                    self.model(batch)
            finally:
                for handle in handles:
                    handle.remove()
            yield seen


def read(assignment: Assignment, when: When, stepped: Stepped = unheard) -> Update:
    """Return what a client sends in a reading: an update that holds nothing but memory.

    A second call with the same assignment returns the stored first result, byte for byte.

    Args:
        assignment: with which tensors, which data.
        when: which reading.
        stepped: told of progress, a batch being a step.

    Raises:
        GivenUp: if ``stepped`` raised it; nothing is stored then.
        NotPrivate: if the run is private and a method reads data.
        NothingToRead: if the client has no example.
        clients.data.BadRecord: if a record is malformed.
    """
    site = Site(assignment.site)
    run, client, digest = assignment.run, assignment.client, assignment.digest()
    stored = site.stored_update(run, client, digest)
    if stored is not None:
        return unpack(stored)
    methods = {name: one for name, one in _methods(assignment).items() if takes_part(one, when)}
    readers = [name for name, one in methods.items() if reads_data(one, when)]
    if assignment.private and readers:
        raise NotPrivate(f"regularizer {readers[0]!r} reads data, which is not private")
    # with privacy nobody may learn how many there are
    examples = [] if assignment.private else data.examples_of(assignment)
    if not assignment.private and not examples:
        raise NothingToRead(f"{client} has no example for this task")
    kept = site.state(run, client, assignment.round - 1)
    memory = {**assignment.memory, **remembered(kept)}
    parts: dict[str, Tensor] = {}
    sent = {n: assignment.broadcast.tensors[n] for n in returned_names(assignment)}
    for name, method in methods.items():
        own = method.consolidate_observed(sent, recall(memory, name))
        parts |= namespaced(own, name)
    if readers:
        with opened(assignment) as session:
            reading = _reading(assignment, session, examples, kept, stepped)
            for name in readers:
                own = from_data(methods[name], when, reading, recall(memory, name))
                parts |= namespaced(own, name)
    secret = None if assignment.public else site.data_key(None)
    update = Update(
        client=client,
        round=assignment.round,
        base=assignment.base,
        tensors={},
        num_examples=len(examples) or assignment.num_examples,
        memory={name: part.detach().to("cpu", torch.float32) for name, part in parts.items()},
        fingerprint=data.fingerprint(assignment.data, examples, secret) if examples else "",
    )
    site.store_update(run, client, digest, pack(update), assignment.private)
    return update


def wanted(assignment: Assignment, when: When) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of all that a client must send in a reading."""
    sent, returned = assignment.broadcast.tensors, returned_names(assignment)
    found: dict[str, tuple[int, ...]] = {}
    for name, method in _methods(assignment).items():
        if takes_part(method, when):
            shapes = method.parts(when, sent, returned)
            found |= {f"{name}/{part}": shape for part, shape in shapes.items()}
    return found


def observing(assignment: Assignment) -> bool:
    """Return whether a client goes on from what it observed in its last round."""
    return any(observes(method) for method in _methods(assignment).values())


def remembered(kept: Tensors) -> dict[str, Tensor]:
    """Return what a client observed, by the names of memory, of all that it keeps."""
    return {k.removeprefix(_KEPT): v for k, v in kept.items() if k.startswith(_KEPT)}


def to_keep(memory: Tensors, sent: Collection[str]) -> dict[str, Tensor]:
    """Return what of a round's memory stays at the client: what it was not sent."""
    return {_KEPT + k: v.detach().cpu() for k, v in memory.items() if k not in sent}


def _methods(assignment: Assignment) -> dict[str, Regularizer]:
    return {r.name: REGULARIZERS.get(r.name).build(**r.options) for r in assignment.regularizers}


def _reading(
    assignment: Assignment,
    session: Session,
    examples: list[data.Example],
    kept: Tensors,
    stepped: Stepped,
) -> Reading:
    sent = assignment.broadcast.tensors
    own = personal_names(assignment, sent) & kept.keys()
    session.write({**sent, **{name: kept[name] for name in own}})
    encoded = data.encode(examples, session.base.tokenizer, assignment.model)
    pad = data.padding_id(session.base.tokenizer)

    def batches() -> Iterator[data.Batch]:
        chunks = list(data.by_length(encoded, range(len(encoded)), assignment.microbatch))
        for done, chunk in enumerate(chunks):
            stepped(done, len(chunks))
            yield move(data.collate([encoded[i] for i in chunk], pad), assignment.device)

    live = session.parameters()
    returned = tuple(name for name in returned_names(assignment) if name in live)
    for name, parameter in live.items():
        parameter.requires_grad_(name in returned)
    return Reading(
        model=session.model,
        params=live,
        returned=returned,
        batches=batches,
        sample=move(data.collate(encoded[:2], pad), assignment.device),
        engines=(*engines_of(session.adapter.capabilities), "alone"),
        kind=assignment.model.kind,
        allowed=allowed_labels(assignment),
        seed=assignment.seed,
    )


def _noting(seen: dict[str, Tensor], name: str, shown: Tensor) -> Callable[..., None]:
    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs = given[0].detach()
        seen[name] = inputs[shown] if inputs.dim() == 3 else inputs

    return note
