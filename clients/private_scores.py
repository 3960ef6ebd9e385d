"""A client's scores under differential privacy: sums over its data, in noise, once.

Every unit (an example, or whoever a column names) adds one vector to a sum: 1, how far the loss is
from the middle of [0, bound], and whether the model was right (1 or -1), the latter two as the mean
of its examples'. None of the three is beyond 1, so that a unit that is there or not moves the sum
by their number's root at most, and the sum with its noise is one Gaussian mechanism without
sampling. Told as distances from the middle, scores have half the noise that they would have as they
are. What is made of the sums (:mod:`strategies.pooled`) costs nothing more.

Examples are scored one at a time: in a batch, an example's logits depend on the others' lengths in
their last places, and a tie that falls otherwise would be somebody else's trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clients import data
from clients.assignment import Assignment, Privacy
from clients.evaluate import Evaluation, batches, tags_of, written
from clients.noise import MARGIN, NoiseStream, discretised, grid_of
from clients.pace import Stepped, unheard
from clients.session import Session, allowed_labels, opened
from clients.site import Site
from clients.tags import IGNORED
from strategies.pooled import COUNT, kinds, sums_std

_PURPOSE = "what is told of an evaluation"  # no tensor's name


def private_evaluation(assignment: Assignment, stepped: Stepped = unheard) -> Evaluation:
    """Return noised sums of an assignment's scores; a second call returns the stored first result.

    An empty data set, one that cannot be scored in some place, and a loss that is no number are
    no errors: with privacy nobody may learn that.

    Args:
        assignment: which tensors, which data, with what privacy and bound.
        stepped: told of progress, an example being a step.

    Raises:
        ValueError: if the assignment has no privacy with a report, which has the bound, or hides
            another unit than its data are in.
        clients.data.BadRecord: if a record is malformed.
    """
    privacy = assignment.privacy
    if privacy is None or privacy.report is None or privacy.sample_rate != 1:
        raise ValueError(
            "a private evaluation needs privacy with a sample rate of 1 and a report, which says "
            f"where losses are cut off; got {privacy}"
        )
    if privacy.unit != (assignment.data.unit or "example"):
        raise ValueError(
            f"the noise is to hide the unit {privacy.unit!r}, and the data are in units of "
            f"{assignment.data.unit or 'example'!r}; a unit would add more than one vector"
        )
    site, digest = Site(assignment.site), assignment.digest()
    run, client = assignment.run, assignment.client
    sums = site.stored_sums(run, client, digest)
    if sums is None:
        examples = data.examples_of(assignment)
        units = (
            data.units(examples) if assignment.data.unit else [[i] for i in range(len(examples))]
        )
        losses, right = _measured(assignment, examples, stepped)
        told = kinds(assignment.model.kind)
        total = added_up(losses, right, units, privacy.report.loss)[: len(told)]
        stream = NoiseStream(site.run_key(run, client, privacy.insecure_seed), digest)
        released = noised(total, privacy, stream).tolist()
        sums = dict(zip(told, released, strict=True))
        site.store_sums(run, client, digest, sums)
    return Evaluation(client, assignment.round, max(round(sums[COUNT]), 0), {}, sums=sums)


def added_up(losses: Tensor, right: Tensor, units: Sequence[Sequence[int]], bound: float) -> Tensor:
    """Return what all units add up to: their number, their losses and how often they are right.

    A unit that is added or taken away moves it by √3 at most, whatever the losses are.

    Args:
        losses: of each example, ``[examples]``; what is no number counts as the bound.
        right: of each, in [0, 1].
        units: the indices of each unit's examples; none is empty.
        bound: where losses are cut off, > 0.

    Returns:
        float64 ``[3]``: in the order of :func:`strategies.pooled.kinds`.
    """
    cut = losses.double().nan_to_num(nan=bound, posinf=bound).clamp(0.0, bound)
    centred = torch.stack([2 * cut / bound - 1, 2 * right.double().clamp(0.0, 1.0) - 1])
    means = [centred[:, list(unit)].mean(dim=1).clamp(-1.0, 1.0) for unit in units]
    scores = torch.stack(means).sum(dim=0) if means else torch.zeros(2, dtype=torch.float64)
    return torch.cat([torch.tensor([float(len(units))], dtype=torch.float64), scores])


def noised(total: Tensor, privacy: Privacy, stream: NoiseStream) -> Tensor:
    """Return sums with their noise, on the grid that :mod:`clients.noise` explains.

    Args:
        total: of :func:`added_up`, or its first two.
        privacy: with the noise multiplier.
        stream: of the client's secret and the assignment.
    """
    deviation = sums_std(privacy.noise_multiplier, len(total)) * MARGIN
    noise = deviation * stream.normal(_PURPOSE, 0, total.shape)
    return discretised(total, noise, grid_of(len(total) ** 0.5, len(total)))


def _measured(
    assignment: Assignment, examples: Sequence[data.Example], stepped: Stepped
) -> tuple[Tensor, Tensor]:
    """Return each example's loss, and how far the model is right, in [0, 1]; ``[examples]``."""
    losses, right = torch.zeros(len(examples)), torch.zeros(len(examples))
    one_by_one = replace(assignment, microbatch=1)
    with opened(assignment) as session, torch.no_grad():
        session.write(written(assignment))
        session.model.eval()
        if assignment.model.kind == "token-classification":
            for i, example in enumerate(examples):
                stepped(i, len(examples))
                losses[i], right[i] = _words(one_by_one, session, example)
            return losses, right
        encoded = data.encode(examples, session.base.tokenizer, assignment.model)
        allowed = allowed_labels(assignment)
        for [i], batch in batches(one_by_one, session, encoded, stepped):
            logits = session.model(batch)
            losses[i] = session.model.example_losses(logits, batch, allowed).item()
            if assignment.model.kind == "classification":
                best = session.model.barred(logits, allowed).argmax(dim=1)
                right[i] = float(best.item() == batch.labels.item())
    return losses, right


def _words(assignment: Assignment, session: Session, example: data.Example) -> tuple[float, float]:
    """Return the loss of one example's words, and the share of those scored that are right."""
    [said], loss = tags_of(assignment, session, [example], unheard)
    scored = [(a, b) for a, b in zip(said, example.tags, strict=True) if b != IGNORED]
    return loss, sum(a == b for a, b in scored) / max(len(scored), 1)
