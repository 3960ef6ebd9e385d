"""How good a model is on a data set: computed where the data are, reported as a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clients import data
from clients.alignment import aligned
from clients.assignment import Assignment
from clients.entities import entity_scores
from clients.generation import NoPrompt, answers, exact_match, rouge_l
from clients.pace import Stepped, unheard
from clients.session import Session, allowed_labels, move, opened
from clients.site import Site
from clients.tags import IGNORED, OUTSIDE, is_bio
from strategies.base import Tensors


class NothingToScore(ValueError):
    """The data set has no example to score."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        client: whose data it was.
        round: the round of the model; 0 for a stored version.
        num_examples: how many examples were scored.
        metrics: classification: ``accuracy``, ``macro_f1``, ``loss``, and where the data are those
            of some labels ``task_accuracy``, the accuracy when these alone may be answered, not all
            that the model knows; token-classification: those of words, and where the tags mark
            entities ``entity_f1``, ``entity_precision`` and ``entity_recall``; causal-lm: ``loss``
            (nats a target token), ``perplexity``, ``bits_per_byte`` (of the target text, UTF-8),
            and where answers are asked for ``exact_match`` and ``rouge_l``, means over examples.
        label_accuracy: accuracy per label, or per tag of words.
        sums: under privacy, all that is told: see :mod:`clients.private_scores`; ``num_examples``
            is then one of them, rounded, and ``metrics`` are empty.
    """

    client: str
    round: int
    num_examples: int
    metrics: Mapping[str, float]
    label_accuracy: Mapping[str, float] = field(default_factory=dict)
    sums: Mapping[str, float] = field(default_factory=dict)


def evaluate(assignment: Assignment, stepped: Stepped = unheard) -> Evaluation:
    """Score the assignment's tensors on its data, without dropout and without gradients.

    Args:
        assignment: which tensors, which data.
        stepped: told of progress, a batch being a step.

    Raises:
        clients.data.BadRecord: if a record is malformed.
        NothingToScore: if no example is left to score.
        NoPrompt: if answers are asked for, and a record has no prompt.
        ValueError: if the assignment is private: its scores are
            :func:`clients.private_scores.private_evaluation`'s.
    """
    if assignment.private:
        raise ValueError(f"the scores of {assignment.client} may be told in noise alone")
    examples = data.examples_of(assignment)
    if not examples:
        raise NothingToScore(f"{assignment.data.uri} holds no example of the asked labels")
    with opened(assignment) as session, torch.no_grad():
        session.write(written(assignment))
        session.model.eval()
        if assignment.model.kind == "token-classification":
            return _tagging(assignment, session, examples, stepped)
        encoded = data.encode(examples, session.base.tokenizer, assignment.model)
        if assignment.model.kind == "classification":
            return _classification(assignment, session, encoded, stepped)
        found = _continuation(assignment, session, encoded, stepped)
        if assignment.answer_tokens:
            scores = _answers(assignment, session, examples, encoded)
            found = replace(found, metrics={**found.metrics, **scores})
        return found


def written(assignment: Assignment) -> Tensors:
    """Return the tensors that are scored: those that were sent, and the client's own head."""
    tensors = dict(assignment.broadcast.tensors)
    if assignment.head == "personal":
        site = Site(assignment.site)
        tensors |= site.state(assignment.run, assignment.client, assignment.round)
    return tensors


def example_losses(assignment: Assignment) -> list[float]:
    """Return the loss of each of the assignment's examples, in order: for public data alone.

    Args:
        assignment: which tensors, which data.

    Raises:
        ValueError: if the data are not public: a single example's loss tells of it.
        clients.data.BadRecord: if a record is malformed.
    """
    if not assignment.public:
        raise ValueError("the losses of single examples are told of public data alone")
    examples = data.examples_of(assignment)
    found = torch.empty(len(examples))
    with opened(assignment) as session, torch.no_grad():
        session.write(assignment.broadcast.tensors)
        session.model.eval()
        encoded = data.encode(examples, session.base.tokenizer, assignment.model)
        for chunk, batch in batches(assignment, session, encoded, unheard):
            logits, allowed = session.model(batch), allowed_labels(assignment)
            found[chunk] = session.model.example_losses(logits, batch, allowed).cpu()
    return found.tolist()


def batches(
    assignment: Assignment, session: Session, encoded: Sequence[data.Encoded], stepped: Stepped
) -> Iterator[tuple[list[int], data.Batch]]:
    """Yield batches of examples of like length: less padding, the same scores."""
    pad = data.padding_id(session.base.tokenizer)
    chunks = list(data.by_length(encoded, range(len(encoded)), assignment.microbatch))
    for done, chunk in enumerate(chunks):
        stepped(done, len(chunks))
        yield chunk, move(data.collate([encoded[i] for i in chunk], pad), assignment.device)


def _classification(
    assignment: Assignment, session: Session, encoded: Sequence[data.Encoded], stepped: Stepped
) -> Evaluation:
    allowed = allowed_labels(assignment)
    names, told = assignment.model.labels, assignment.data.labels
    known = set(assignment.labels or names)
    own = torch.tensor([names.index(x) for x in told]) if told and set(told) != known else None
    predicted, within, truth = (torch.empty(len(encoded), dtype=torch.long) for _ in range(3))
    loss = 0.0
    for chunk, batch in batches(assignment, session, encoded, stepped):
        scores = session.model(batch)
        logits = session.model.barred(scores, allowed)
        predicted[chunk] = logits.argmax(dim=1).cpu()
        within[chunk] = session.model.barred(scores, own).argmax(dim=1).cpu()
        truth[chunk] = batch.labels.cpu()
        loss += float(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
    metrics, label_accuracy = label_scores(predicted, truth, names)
    if own is not None:
        metrics["task_accuracy"] = float((within == truth).double().mean())
    if math.isfinite(loss):  # infinite where a label outside the softmax occurs
        metrics["loss"] = loss / len(encoded)
    return Evaluation(
        client=assignment.client,
        round=assignment.round,
        num_examples=len(encoded),
        metrics=metrics,
        label_accuracy=label_accuracy,
    )


def _tagging(
    assignment: Assignment, session: Session, examples: Sequence[data.Example], stepped: Stepped
) -> Evaluation:
    """Score words. One that the model does not see counts as outside of everything."""
    said, loss = tags_of(assignment, session, examples, stepped)
    if not any(tag != IGNORED for example in examples for tag in example.tags):
        raise NothingToScore(f"{assignment.data.uri} holds no word of the asked labels")
    metrics, label_accuracy = tag_scores(examples, said, assignment.model.labels)
    if math.isfinite(loss):
        metrics["loss"] = loss / len(examples)
    return Evaluation(
        client=assignment.client,
        round=assignment.round,
        num_examples=len(examples),
        metrics=metrics,
        label_accuracy=label_accuracy,
    )


def tags_of(
    assignment: Assignment, session: Session, examples: Sequence[data.Example], stepped: Stepped
) -> tuple[list[list[int]], float]:
    """Return the tag of each word of each example, as an index, and the sum of their losses."""
    names, model = assignment.model.labels, session.model
    allowed = allowed_labels(assignment)
    texts = aligned(examples, session.base.tokenizer, assignment.model.max_length)
    encoded = [
        data.Encoded(torch.tensor(text.input_ids), torch.tensor(text.targets(example.tags)))
        for text, example in zip(texts, examples, strict=True)
    ]
    unseen = names.index(OUTSIDE) if OUTSIDE in names else IGNORED
    said: list[list[int]] = [[]] * len(encoded)
    loss = 0.0
    for chunk, batch in batches(assignment, session, encoded, stepped):
        logits = model(batch)
        loss += float(model.example_losses(logits, batch, allowed).sum())
        best = model.barred(logits, allowed).argmax(dim=-1).cpu()
        for row, i in zip(best.tolist(), chunk, strict=True):
            said[i] = [unseen if place is None else row[place] for place in texts[i].places]
    return said, loss


def tag_scores(
    examples: Sequence[data.Example], said: Sequence[Sequence[int]], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the scores of words, and of entities where the tags mark any; and accuracy by tag.

    Args:
        examples: with a word to be scored, at least one of all.
        said: the tag of each word of each, as an index.
        names: the tags.
    """
    truth = [tag for example in examples for tag in example.tags]
    scored = torch.tensor(truth) != IGNORED
    metrics, label_accuracy = label_scores(
        torch.tensor([tag for row in said for tag in row])[scored],
        torch.tensor(truth)[scored],
        names,
    )
    if is_bio(names):
        metrics |= entity_scores(
            (_named(example.tags, example.tags, names) for example in examples),
            (_named(row, e.tags, names) for row, e in zip(said, examples, strict=True)),
        )
    return metrics, label_accuracy


def predicted(assignment: Assignment, examples: Sequence[data.Example]) -> list[Any]:
    """Return what a version answers to each example: a label's index, its words' tags', or a text.

    Of data that whoever asks may read: answers tell of examples, and do not leave a client.

    Args:
        assignment: an evaluation; its ``labels`` may be answered.
        examples: of its task; of causal-lm each with a prompt.

    Raises:
        NoPrompt: if answers are asked for, and a record has no prompt.
    """
    with opened(assignment) as session, torch.no_grad():
        session.write(assignment.broadcast.tensors)
        session.model.eval()
        if assignment.model.kind == "token-classification":
            return list(tags_of(assignment, session, examples, unheard)[0])
        encoded = data.encode(examples, session.base.tokenizer, assignment.model)
        if assignment.model.kind == "causal-lm":
            return _texts(assignment, session, encoded)
        found, allowed = [0] * len(encoded), allowed_labels(assignment)
        for chunk, batch in batches(assignment, session, encoded, unheard):
            best = session.model.barred(session.model(batch), allowed).argmax(dim=1)
            for i, label in zip(chunk, best.tolist(), strict=True):
                found[i] = label
        return list(found)


def _named(tags: Sequence[int], truth: Sequence[int], names: Sequence[str]) -> list[str]:
    """Return the names of ``tags``, empty where the true one is not scored: that ends an entity."""
    return [
        "" if IGNORED in (tag, true) else names[tag] for tag, true in zip(tags, truth, strict=True)
    ]


def label_scores(
    predicted: Tensor, truth: Tensor, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return ``accuracy`` and ``macro_f1``, and the accuracy per label that occurs.

    Args:
        predicted: indices of labels, ``[examples]``.
        truth: the right ones, ``[examples]``, >= 1 of them.
        names: of the labels.
    """
    right = predicted == truth
    present = sorted(set(truth.tolist()))
    metrics = {
        "accuracy": float(right.double().mean()),
        "macro_f1": sum(_f1(predicted, truth, label) for label in present) / len(present),
    }
    return metrics, {names[i]: float(right[truth == i].double().mean()) for i in present}


def _f1(predicted: Tensor, truth: Tensor, label: int) -> float:
    hits = int(((predicted == label) & (truth == label)).sum())
    return 2 * hits / int((predicted == label).sum() + (truth == label).sum())


def _continuation(
    assignment: Assignment, session: Session, encoded: Sequence[data.Encoded], stepped: Stepped
) -> Evaluation:
    nats, tokens, num_bytes = 0.0, 0, 0
    for _, batch in batches(assignment, session, encoded, stepped):
        logits, labels = session.model(batch)[:, :-1], batch.labels[:, 1:]
        nats += float(
            torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
        )
        tokens += int((labels != -100).sum())
        targets = [row[row != -100].tolist() for row in labels]
        texts = session.base.tokenizer.batch_decode(targets, skip_special_tokens=True)
        num_bytes += sum(len(text.encode()) for text in texts)
    loss = nats / max(tokens, 1)
    return Evaluation(
        client=assignment.client,
        round=assignment.round,
        num_examples=len(encoded),
        metrics={
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
        },
    )


def _answers(
    assignment: Assignment,
    session: Session,
    examples: Sequence[data.Example],
    encoded: Sequence[data.Encoded],
) -> dict[str, float]:
    """Return how like the completions the model's own greedy answers are.

    Raises:
        NoPrompt: if a record is a text; its tokens may still begin with one that is not learned.
    """
    if any(example.prompt is None for example in examples):
        raise NoPrompt("answers are asked for, and a record is a text without a prompt to answer")
    return answer_scores(examples, _texts(assignment, session, encoded))


def _texts(assignment: Assignment, session: Session, encoded: Sequence[data.Encoded]) -> list[str]:
    """Return a causal model's own greedy answer to each prompt."""
    found = [""] * len(encoded)
    for chunk in data.by_length(encoded, range(len(encoded)), assignment.microbatch):
        said = answers(
            session.model.backbone,
            session.base.tokenizer,
            [encoded[i] for i in chunk],
            assignment.answer_tokens,
            assignment.device,
        )
        for i, answer in zip(chunk, said, strict=True):
            found[i] = answer
    return found


def answer_scores(examples: Sequence[data.Example], said: Sequence[str]) -> dict[str, float]:
    """Return how like the completions of examples, of which there are some, the answers are."""
    pairs = [(a, e.completion or "") for a, e in zip(said, examples, strict=True)]
    scores = {"exact_match": exact_match, "rouge_l": rouge_l}
    return {name: sum(of(*pair) for pair in pairs) / len(pairs) for name, of in scores.items()}
