"""A client's half of rehearsal: train on what it kept of earlier tasks, and keep some of this one.

What is kept belongs to the update that the client sent then (:meth:`clients.site.Site.
keep_examples`), and a run reads only what was kept before it: so rounds, retries and runs that fork
from one version change nothing of what another finds, and a client that missed tasks goes on from
its last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from clients import data, reservoir
from clients.alignment import aligned
from clients.assignment import Assignment, ModelSpec
from clients.examples import digest
from clients.regularizers import REGULARIZERS, Regularizer, Rehearsal
from clients.reservoir import Kept, Reservoir
from clients.seeds import seed_for
from clients.session import Session, move
from clients.site import Site


class UncountedRehearsal(ValueError):
    """Kept examples would be trained on under DP, where the accountant does not count them."""


def rehearsing(assignment: Assignment) -> tuple[Regularizer, Rehearsal] | None:
    """Return the regularizer of an assignment that rehearses, and how; None for none.

    Raises:
        UncountedRehearsal: if the assignment is private.
    """
    for choice in assignment.regularizers:
        method: Regularizer = REGULARIZERS.get(choice.name).build(**choice.options)
        if method.rehearsal is None:
            continue
        if assignment.private:
            raise UncountedRehearsal(
                f"regularizer {choice.name!r} trains again on examples of earlier tasks, which are "
                "not in this run's sample and its accountant does not count; leave it out"
            )
        return method, method.rehearsal
    return None


def kept_before(assignment: Assignment, site: Site) -> Reservoir:
    """Return what a client kept of the tasks before this one; nothing where none rehearses.

    Raises:
        clients.reservoir.NotKept: if it does not go with the run's labels.
    """
    if rehearsing(assignment) is None or assignment.past is None or not assignment.past.update:
        return Reservoir()
    parts = site.kept_examples(assignment.client, assignment.past.update)
    return reservoir.read(parts, assignment.model)


@dataclass(frozen=True, slots=True)
class Rehearser:
    """What one assignment rehearses.

    Attributes:
        assignment: whose.
        session: with its model.
        before: what the client kept of earlier tasks.
        method: the regularizer that rehearses, and how; None where none does.
        encoded: of what was kept.
        barred: ``[kept, labels]``: which labels take no part in the softmax of each.
        outputs: the logits that each was kept with, NaN where there is none: ``[labels]``, of tags
            ``[length, labels]``.
    """

    assignment: Assignment
    session: Session
    before: Reservoir
    method: tuple[Regularizer, Rehearsal] | None
    encoded: Sequence[data.Encoded]
    barred: Tensor
    outputs: Sequence[Tensor]

    @classmethod
    def of(cls, assignment: Assignment, session: Session, before: Reservoir) -> Rehearser:
        """Return what an assignment rehearses of what was kept before it."""
        model, kept = assignment.model, before.kept
        encoded = data.encode([k.example for k in kept], session.base.tokenizer, model)
        now = {model.labels.index(name) for name in assignment.labels or model.labels}
        found = rehearsing(assignment)
        seen = now.union(*(one.labels for one in kept))
        every = found is not None and found[1].labels == "seen"
        barred = torch.ones(len(kept), len(model.labels), dtype=torch.bool)
        for row, one in enumerate(kept):
            barred[row, sorted(seen if every else one.labels)] = False
        device = assignment.device
        lengths = [len(one.input_ids) for one in encoded]
        outputs = [one.to(device) for one in _outputs(kept, lengths, model, session)]
        return cls(assignment, session, before, found, encoded, barred.to(device), outputs)

    def masks(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return 0/1 masks of the head, by name: rows that nothing here has the label of stay.

        A run that rehearses trains the rows of all labels seen, and an optimizer with weight decay
        would move also those that a client's own examples and kept ones say nothing of.
        """
        a = self.assignment
        if self.method is None or not a.labels:
            return {}
        known = ~self.barred.all(dim=0)
        known[[a.model.labels.index(name) for name in a.labels]] = True
        return {
            name: known.to(p.dtype).reshape(-1, *[1] * (p.dim() - 1)).expand_as(p).contiguous()
            for name, p in params.items()
            if name.startswith("head.")
        }

    def add(
        self, params: Mapping[str, nn.Parameter], mask: Mapping[str, Tensor], step: int
    ) -> None:
        """Add the gradient of a few kept examples' mean loss to that of a step's own batch.

        Args:
            params: what is trained, by name, each with its gradient.
            mask: 0/1 by name: entries at 0 get none.
            step: number of the step, which with the assignment's seed decides who is drawn.
        """
        if self.method is None or not self.encoded:
            return
        generator = torch.Generator().manual_seed(seed_for(self.assignment.seed, "rehearse", step))
        order = torch.randperm(len(self.encoded), generator=generator).tolist()
        chosen = order[: self.method[1].batch]
        for part in data.by_length(self.encoded, chosen, self.assignment.microbatch):
            total = self._values(part).sum() / len(chosen)
            found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
            for (name, parameter), gradient in zip(params.items(), found, strict=True):
                if gradient is not None:
                    own = gradient * mask[name] if name in mask else gradient
                    parameter.grad = own if parameter.grad is None else parameter.grad + own

    def parts_after(
        self, examples: Sequence[data.Example], encoded: Sequence[data.Encoded]
    ) -> dict[str, bytes]:
        """Return what the client keeps after this round: of earlier tasks, and of its examples.

        Args:
            examples: the assignment's own, all of them.
            encoded: the same in tokens.
        """
        a = self.assignment
        if self.method is None or a.past is None:
            return {}
        how = self.method[1]
        classes = a.labels or a.model.labels
        labels = tuple(a.model.labels.index(name) for name in classes)
        public = self.before.public and (a.public or data.is_public(a.data.uri))
        before = replace(self.before, public=public)
        after, places = reservoir.offered(before, examples, labels, how.size, a.past.seed)
        if how.outputs and places:
            after = self._with_outputs(after, {p: encoded[i] for p, i in places.items()}, labels)
        return reservoir.written(after, a.model)

    def _with_outputs(
        self, after: Reservoir, fresh: Mapping[int, data.Encoded], labels: Sequence[int]
    ) -> Reservoir:
        """Return a reservoir with the logits of what was just kept, in evaluation mode."""
        kept = list(after.kept)
        places, encoded = list(fresh), list(fresh.values())
        words = _pieces([kept[p] for p in places], self.assignment.model, self.session)
        self.session.model.eval()
        for part in data.by_length(encoded, range(len(encoded)), self.assignment.microbatch):
            with torch.no_grad():
                logits = self.session.model(self._batch([encoded[i] for i in part]))
            for i, row in zip(part, logits[..., list(labels)].cpu(), strict=True):
                own = row.clone() if words is None else _of_words(row, words[i])
                kept[places[i]] = replace(kept[places[i]], outputs=own)
        return replace(after, kept=tuple(kept))

    def _values(self, part: Sequence[int]) -> Tensor:
        """Return ``[batch]``: what kept examples add to the loss."""
        assert self.method is not None
        batch = self._batch([self.encoded[i] for i in part])
        logits = self.session.model(batch)
        scored = logits
        if self.assignment.model.labels:
            barred = self.barred[list(part)]
            barred = barred.reshape(len(part), *[1] * (logits.dim() - 2), -1)
            scored = logits.masked_fill(barred, float("-inf"))
        losses = self.session.model.example_losses(scored, batch)
        outputs = pad_sequence([self.outputs[i] for i in part], True, float("nan"))
        return self.method[0].rehearsal_loss(losses, logits, outputs)

    def _batch(self, encoded: Sequence[data.Encoded]) -> data.Batch:
        pad = data.padding_id(self.session.base.tokenizer)
        return move(data.collate(encoded, pad), self.assignment.device)


def _pieces(
    kept: Sequence[Kept], model: ModelSpec, session: Session
) -> list[list[int | None]] | None:
    """Return where the model sees the words of each; None where it sees no words but a text."""
    if model.kind != "token-classification":
        return None
    examples = [one.example for one in kept]
    return [one.places for one in aligned(examples, session.base.tokenizer, model.max_length)]


def _of_words(logits: Tensor, places: Sequence[int | None]) -> Tensor:
    """Return ``[words, labels]`` of ``[length, labels]``: NaN of what the model does not see."""
    found = torch.full((len(places), logits.shape[-1]), float("nan"))
    for word, place in enumerate(places):
        if place is not None:
            found[word] = logits[place]
    return found


def _outputs(
    kept: Sequence[Kept], lengths: Sequence[int], model: ModelSpec, session: Session
) -> list[Tensor]:
    """Return the logits that each was kept with, as the model gives them; NaN where none are.

    Of tags they were kept by the word, and a run with another ``max_length`` may see fewer.
    """
    words = _pieces(kept, model, session)
    found = []
    for number, one in enumerate(kept):
        shape = (len(model.labels),) if words is None else (lengths[number], len(model.labels))
        own = torch.full(shape, float("nan"))
        if one.outputs is not None and words is None:
            own[list(one.labels)] = one.outputs
        elif one.outputs is not None and words is not None:
            for place, row in zip(words[number], one.outputs, strict=True):
                if place is not None:
                    own[place, list(one.labels)] = row
        found.append(own)
    return found


def fingerprint(
    assignment: Assignment, own: Sequence[data.Example], before: Reservoir, secret: bytes
) -> str:
    """Return the digest of all that a round trains on: own examples, and those that were kept.

    Whoever has the site's key can check it. It is unkeyed only where all of them are public.

    Args:
        assignment: the round's.
        own: the assignment's examples.
        before: what the client kept of earlier tasks.
        secret: the site's key.
    """
    if not before.kept:
        return data.fingerprint(assignment.data, own, None if assignment.public else secret)
    public = before.public and (assignment.public or data.is_public(assignment.data.uri))
    return digest([*own, *(one.example for one in before.kept)], None if public else secret)
