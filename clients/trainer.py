"""The one local loop: an Assignment becomes an Update.

Per step: the batch's gradient (plain, or DP-SGD) → plus the gradient of the penalties, which see no
data → projected → optimizer. Everything random follows from the assignment's seed, except DP's
noise and Poisson sample, which follow from the client's secret key and the assignment's digest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from clients import data, uplink
from clients.assignment import Assignment
from clients.batches import Batches
from clients.charges import spend_of
from clients.checkpoint import (
    Checkpoints,
    generators,
    optimizer_state,
    set_generators,
    set_optimizer_state,
)
from clients.correction import Correction
from clients.gradients import plain_step, private_gradient
from clients.noise import NoiseStream
from clients.optimizers import OPTIMIZERS
from clients.pace import Stepped, unheard
from clients.per_example import engines_of
from clients.pruning import Ranks
from clients.pruning import kept as kept_ranks
from clients.reading import observing, remembered, to_keep
from clients.regularizers import REGULARIZERS, Regularizer, namespaced, recall
from clients.rehearsal import Rehearser, fingerprint, kept_before
from clients.report import noised
from clients.selection import Selection
from clients.session import (
    Session,
    allowed_labels,
    opened,
    personal_names,
    returned_names,
    trained_names,
)
from clients.shares import bounded
from clients.site import Site
from clients.verification import chosen as chosen_engine
from clients.wire import digest as digest_of
from clients.wire import pack, unpack
from strategies.base import Tensors, Update, corrections
from strategies.pruning import cut, pruning_of
from strategies.selection import compact, mask_of
from strategies.spends import PrivacySpend

_BOUND = "privacy/bound"  # among what a client keeps: no tensor's name

Losses = Callable[[data.Batch], Tensor]


class NothingToTrain(ValueError):
    """The client has no example, or the round trains no tensor."""


def train(
    assignment: Assignment, stepped: Stepped = unheard, checkpoint_s: float | None = None
) -> Update:
    """Train for one round and return what may leave the client.

    A second call with the same assignment returns the stored first result, byte for byte: no two
    different updates ever exist for one digest.

    Args:
        assignment: what to train, from what, on what.
        stepped: told of progress.
        checkpoint_s: seconds between checkpoints, from which the same assignment goes on after a
            crash and ends with the same bytes; None for none.

    Raises:
        GivenUp: if ``stepped`` raised it; nothing is stored then.
        UpdateGone: if it was sent before a later round's, and is no longer kept.
        NothingToTrain: if there is no example or no trainable tensor.
        clients.data.BadRecord: if a record is malformed.
        clients.rehearsal.UncountedRehearsal: if it would rehearse with privacy.
    """
    site = Site(assignment.site)
    digest = assignment.digest()
    stored = site.stored_update(assignment.run, assignment.client, digest)
    if stored is not None:
        return unpack(stored)
    examples = data.examples_of(assignment)
    if not examples and not assignment.private:  # with privacy nobody may learn that
        raise NothingToTrain(f"{assignment.client} has no example for this task")
    stepped(0, assignment.steps or 0)  # the base model may take long to load
    secret = site.data_key(assignment.privacy.insecure_seed if assignment.privacy else None)
    before = kept_before(assignment, site)
    data_digest = fingerprint(assignment, examples, before, secret)
    with opened(assignment) as session:
        kept = _kept(assignment, site)
        ranks = Ranks.of(assignment, kept)
        session.write(ranks.start(_starting_tensors(assignment, kept)))
        encoded = data.encode(examples, session.base.tokenizer, assignment.model)
        rehearser = Rehearser.of(assignment, session, before)
        loop = _Loop(assignment, session, encoded, stepped, kept, ranks, rehearser)
        if checkpoint_s is not None:
            run, client = assignment.run, assignment.client
            loop.keep(Checkpoints(site, run, client, digest, data_digest, checkpoint_s))
        privacy = assignment.privacy
        metrics: dict[str, float] = {}
        spends: tuple[PrivacySpend, ...] = ()
        if privacy is None:
            metrics = loop.run_plain()
        else:
            key = site.run_key(assignment.run, assignment.client, privacy.insecure_seed)
            stream = NoiseStream(key, digest)
            units = data.units(examples) if assignment.data.unit else None
            spends = loop.run_private(stream, units)
            metrics = loop.report(stream, units)
        trained = session.read()
        remembered = rehearser.parts_after(examples, encoded)
    now = ranks.after(trained)
    lower = cut(trained, now)
    tensors = compact({n: lower[n] for n in returned_names(assignment)}, loop.chosen)
    own = {name: trained[name] for name in sorted(personal_names(assignment, trained))}
    own |= loop.correction.after(loop.reference, trained) | kept_ranks(now)
    own |= loop.learned
    if assignment.central is not None:
        tensors = bounded(tensors, assignment, site)
        metrics, data_digest = {}, ""
    sent, seed = assignment.broadcast, assignment.seed
    tensors, left = uplink.encoded(tensors, sent, assignment.uplink, seed, kept)
    own |= left
    update = Update(
        client=assignment.client,
        round=assignment.round,
        base=assignment.base,
        tensors=tensors,
        num_examples=_counted(assignment, examples),
        metrics=metrics,
        memory={},
        spends=spends,
        fingerprint=data_digest,
    )
    sealed = pack(update)
    if remembered:
        site.keep_examples(assignment.client, digest_of(sealed), remembered)
    if own:
        site.store_state(assignment.run, assignment.client, assignment.round, own)
    private = privacy is not None or assignment.noise_share is not None
    site.store_update(assignment.run, assignment.client, digest, sealed, private)
    return update


def _counted(assignment: Assignment, examples: Sequence[Any]) -> int:
    """Return what an update says of its number of examples; under DP nothing that is not known."""
    if assignment.central is not None:
        return 1
    return len(examples) if assignment.privacy is None else assignment.num_examples


def _kept(assignment: Assignment, site: Site) -> dict[str, Tensor]:
    """Return what the client kept of its last round, where this one asks for it."""
    sent = assignment.broadcast
    asked = corrections(sent.extra) or assignment.uplink or pruning_of(sent.extra)
    own = personal_names(assignment, sent.tensors) or _learns_bound(assignment)
    if not (asked or own or observing(assignment)):
        return {}
    return site.state(assignment.run, assignment.client, assignment.round - 1)


def _learns_bound(assignment: Assignment) -> bool:
    return assignment.privacy is not None and assignment.privacy.clipping.mode == "quantile"


def _starting_tensors(assignment: Assignment, kept: Tensors) -> dict[str, Tensor]:
    sent = assignment.broadcast.tensors
    own = personal_names(assignment, sent) & kept.keys()
    return {**sent, **{name: kept[name] for name in own}}


@dataclass(slots=True)
class _Loop:
    """The steps of one round at one client."""

    assignment: Assignment
    session: Session
    encoded: Sequence[data.Encoded]
    stepped: Stepped
    kept: Tensors
    ranks: Ranks
    rehearser: Rehearser
    params: dict[str, nn.Parameter] = field(init=False)
    mask: dict[str, Tensor] = field(init=False)
    reference: dict[str, Tensor] = field(init=False)
    sent: dict[str, Tensor] = field(init=False)
    memory: dict[str, Tensor] = field(init=False)
    regularizers: list[tuple[str, Regularizer]] = field(init=False)
    batches: Batches = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    correction: Correction = field(init=False)
    loss_sum: Tensor = field(init=False)
    selection: Selection = field(init=False)
    bound: float = field(init=False)
    chosen: dict[str, Tensor] = field(default_factory=dict)
    num_seen: int = 0
    step: int = 0
    engine: str = ""
    _checkpoints: Checkpoints | None = None

    def __post_init__(self) -> None:
        a = self.assignment
        live = self.session.parameters()
        names = trained_names(a, list(live))
        if not names:
            raise NothingToTrain(f"the round trains no tensor ({a.broadcast.trainable!r})")
        for name, parameter in live.items():
            parameter.requires_grad_(name in names)
        self.params = {name: live[name] for name in names}
        self.mask = {n: a.broadcast.mask[n].to(a.device) for n in names if n in a.broadcast.mask}
        for own in (self.ranks.masks(self.params), self.rehearser.masks(self.params)):
            for name, mask in own.items():
                self._mask(name, mask)
        self.reference = {name: p.detach().clone() for name, p in self.params.items()}
        self.sent = {n: t.to(a.device) for n, t in a.broadcast.tensors.items()} | self.reference
        memory = {**a.memory, **remembered(self.kept)}
        self.memory = {name: tensor.to(a.device) for name, tensor in memory.items()}
        self.regularizers = [
            (r.name, REGULARIZERS.get(r.name).build(**r.options)) for r in a.regularizers
        ]
        teachers = {n: r.teacher(recall(self.memory, n)) for n, r in self.regularizers}
        self.batches = Batches(a, self.session, self.encoded, teachers, self._heard)
        self.optimizer = OPTIMIZERS.get(a.optimizer.name).build(
            list(self.params.values()), **a.optimizer.options
        )
        self.correction = Correction.of(a, self.params, self.optimizer, self.kept)
        self.loss_sum = torch.zeros((), device=a.device)
        self.selection = Selection.of(a, self.batches.num_steps)
        self.bound = a.privacy.max_grad_norm if a.privacy else math.inf
        if _learns_bound(a) and _BOUND in self.kept:
            self.bound = float(self.kept[_BOUND])
        self.session.model.train()

    def keep(self, checkpoints: Checkpoints) -> None:
        """Go on from the last checkpoint, if there is one, and make more."""
        self._checkpoints = checkpoints
        state = checkpoints.found()
        if state is None:
            return
        self.step, self.num_seen = state["step"], state["num_seen"]
        self.bound, self.engine = state["bound"], state["engine"]
        self.loss_sum, self.memory = state["loss_sum"], state["memory"]
        with torch.no_grad():
            for name, parameter in self.params.items():
                parameter.copy_(state["params"][name])
        set_optimizer_state(self.optimizer, state["optimizer"])
        set_generators(state["generators"], self.assignment.device)
        self._restrict(state["chosen"])

    def _state(self) -> dict[str, Any]:
        """Return everything that a step changes."""
        return {
            "step": self.step,
            "num_seen": self.num_seen,
            "bound": self.bound,
            "engine": self.engine,
            "loss_sum": self.loss_sum,
            "memory": self.memory,
            "params": self.params,
            "chosen": self.chosen,
            "optimizer": optimizer_state(self.optimizer),
            "generators": generators(self.assignment.device),
        }

    @property
    def learned(self) -> dict[str, Tensor]:
        """What a later round goes on with, and nobody else sees: a bound, what was observed."""
        own = to_keep(self.memory, self.assignment.memory)
        if _learns_bound(self.assignment):
            own[_BOUND] = torch.tensor(self.bound, dtype=torch.float64)
        return own

    def run_plain(self) -> dict[str, float]:
        """Train without noise; return the mean loss over all examples seen, if it is a number."""
        if not self.encoded:
            return {}
        for batch in self.batches.shuffled(self.step):
            plain_step(self.params, self.batches.parts(batch), self._counted, len(batch), self.mask)
            self.rehearser.add(self.params, self.mask, self.step)
            self._finish_step()
        loss = float(self.loss_sum) / max(self.num_seen, 1)
        return {"loss": loss} if math.isfinite(loss) else {}

    def run_private(
        self, stream: NoiseStream, units: Sequence[Sequence[int]] | None
    ) -> tuple[PrivacySpend, ...]:
        """Train with DP-SGD; return what a round spends. Nothing measured on the data is kept.

        A step takes each unit with the sample rate, and of each that it takes a few examples, drawn
        anew in each step: what a unit adds to a step is one clipped gradient, however many examples
        it has, and all of them are seen in time.

        Args:
            stream: of the client's secret.
            units: the indices of each unit's examples; None where each is a unit by itself.
        """
        a = self.assignment
        assert a.privacy is not None
        assert a.steps is not None
        measured_by = self.engine or self._chosen_engine()
        engine = private_gradient(
            a, self.session.model, self.params, self.mask, stream, measured_by
        )
        engine.bound, self.engine = self.bound, measured_by
        self.batches = replace(self.batches, alone=measured_by == "alone")
        with engine:
            for step in range(self.step, a.steps):
                drawn = self.batches.drawn(stream, step, units, a.privacy.per_unit)
                if units is None:
                    engine.step(self.batches.parts([i for (i,) in drawn]), self._losses, step)
                else:
                    engine.step(self.batches.parts_of_units(drawn), self._losses, step)
                self.bound = engine.bound
                self._finish_step()
        return (spend_of(a),)

    def _chosen_engine(self) -> str:
        """Return what measures per-example gradients here, compared with a loop over examples."""
        few = range(min(2, self.assignment.microbatch, len(self.encoded)))
        if not few:
            return "alone"  # there is nothing to measure, and nobody may learn that
        engines = engines_of(self.session.adapter.capabilities)
        batch = self.batches.collated(few)
        return chosen_engine(self.session.model, self.params, engines, batch, self._losses)

    def _counted(self, batch: data.Batch) -> Tensor:
        """Return :meth:`_losses`, and add them up."""
        if not self.assignment.private:  # with privacy nobody may learn that
            self.session.adapter.refuse_batch(self.session.model.backbone, batch.input_ids)
        losses = self._losses(batch)
        self.loss_sum = self.loss_sum + losses.detach().sum()
        self.num_seen += len(losses)
        return losses

    def report(
        self, stream: NoiseStream, units: Sequence[Sequence[int]] | None
    ) -> dict[str, float]:
        """Return what may be told of the data, as the trained model sees them: in noise.

        Args:
            stream: of the client's secret.
            units: as for :meth:`run_private`, which comes before this.
        """
        a = self.assignment
        assert a.privacy is not None
        if a.privacy.report is None:
            return {}
        self.session.model.eval()

        @torch.no_grad()
        def losses(step: int) -> Tensor:
            parts = self.batches.parts([i for (i,) in self.batches.drawn(stream, step, units)])
            return torch.cat([torch.zeros(0), *(self._losses(part).cpu() for part in parts)])

        assert a.steps is not None
        return noised(a.privacy, stream, a.steps, min(a.batch_size, a.num_examples), losses)

    def _losses(self, batch: data.Batch) -> Tensor:
        """Return ``[batch]`` losses, per-example terms of regularizers included."""
        model = self.session.model
        logits = model(batch)
        losses = model.example_losses(logits, batch, allowed_labels(self.assignment))
        for name, regularizer in self.regularizers:
            own = replace(batch, taught=recall(batch.taught, name))
            term = regularizer.example_loss(model, own, logits, recall(self.memory, name))
            losses = losses if term is None else losses + term
        return losses

    def _finish_step(self) -> None:
        """Take one optimizer step from the released gradients now in ``p.grad``."""
        self._add_penalties()
        self.correction.add(self.params)
        names = list(self.params)
        grads = {name: _gradient(self.params[name]) for name in names}
        for name, regularizer in self.regularizers:
            grads = dict(regularizer.project(grads, recall(self.memory, name)))
        before = {name: self.params[name].detach().clone() for name in names}
        for name in names:
            mask = self.mask.get(name)
            self.params[name].grad = grads[name] if mask is None else grads[name] * mask
        self.optimizer.step()
        for name, mask in self.mask.items():  # weight decay and momentum must not move them either
            self.params[name].data.copy_(torch.where(mask.bool(), self.params[name], before[name]))
        after = {name: self.params[name].detach() for name in names}
        for name, regularizer in self.regularizers:
            observed = regularizer.observe(grads, before, after, recall(self.memory, name))
            self.memory |= namespaced(observed, name)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._restrict(self.selection.at(self.step, self.params))
        if self._checkpoints is not None and self.step < self.batches.num_steps:
            self._checkpoints.offer(self._state)

    def _heard(self) -> None:
        self.stepped(self.step, self.batches.num_steps)

    def _mask(self, name: str, mask: Tensor) -> None:
        """Train of a tensor only what this mask, too, has at 1."""
        self.mask[name] = mask * self.mask[name] if name in self.mask else mask

    def _restrict(self, chosen: Tensors) -> None:
        """Train only these ranks from here on; all others are as they were sent."""
        self.chosen |= chosen
        for name, ranks in chosen.items():
            parameter, before = self.params[name], self.reference[name]
            mask = mask_of(name, ranks.to(before.device), before)
            self._mask(name, mask)
            parameter.data.copy_(torch.where(mask, parameter, before))

    def _add_penalties(self) -> None:
        """Add the penalties' gradients: after the noise, because they see no data."""
        for value in self._penalties():
            if value is None or not value.requires_grad:
                continue
            parameters = list(self.params.values())
            extra = torch.autograd.grad(value, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, extra, strict=True):
                if gradient is not None:
                    parameter.grad = _gradient(parameter) + gradient

    def _penalties(self) -> Iterator[Tensor | None]:
        """Yield the adapter's own penalty and the regularizers', each where it has one."""
        yield self.session.adapter.penalty(self.session.model.backbone)
        yield self.ranks.penalty(self.params)
        for name, regularizer in self.regularizers:
            yield regularizer.penalty(self.params, self.sent, recall(self.memory, name))


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
