"""Texts whose words have tags are kept and rehearsed as others are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clients import data
from clients.assignment import ModelSpec, Past, PluginChoice
from clients.examples import Example
from clients.reservoir import Kept, NotKept, Reservoir, read, written
from clients.session import move, opened
from clients.site import Site
from clients.tags import IGNORED
from clients.trainer import train
from clients.wire import digest, pack

TAGS = ("O", "B-CAT", "I-CAT", "B-DOG")
FIRST = [
    {"tokens": ["the", "cat", "sings"], "tags": ["B-CAT", "I-CAT", "O"]},
    {"tokens": ["a", "thread", "and", "cat"], "tags": ["O", "O", "O", "B-CAT"]},
]
SECOND = [{"tokens": ["dog", "weaves"], "tags": ["B-DOG", "O"]}] * 2
REPLAY = PluginChoice("replay", {"size": 8, "batch": 8})
DER = PluginChoice("der-plus-plus", {"size": 8, "batch": 8, "alpha": 9.0, "beta": 1.0})


@pytest.fixture
def spec(tiny_encoder):
    return ModelSpec(str(tiny_encoder), "token-classification", labels=TAGS, max_length=16)


@pytest.fixture
def tag(assign, spec):
    """Return a function that makes an assignment of tagged rows, which goes on from an update."""

    def make(rows, after=None, method=REPLAY, lr=0.1, **changes):
        past = Past("" if after is None else digest(pack(after)), seed=3)
        made = assign(
            rows=rows,
            model=spec,
            optimizer=PluginChoice("sgd", {"lr": lr}),
            batch_size=len(rows),
            steps=1,
            regularizers=(method,) if method else (),
            past=past if method else None,
        )
        return replace(made, **changes)

    return make


def moved(assignment):
    sent, update = assignment.broadcast.tensors, train(assignment)
    return {n: t.double() - sent[n].double() for n, t in update.tensors.items()}


def kept_by(assignment, update):
    parts = Site(assignment.site).kept_examples(assignment.client, digest(pack(update)))
    return read(parts, assignment.model)


def test_tags_come_back_by_name_in_a_grown_label_set_and_what_is_not_learned_stays_so(spec):
    example = Example("a cat", words=((0, 1), (2, 5)), tags=(IGNORED, 1))
    outputs = torch.tensor([[float("nan")] * 2, [0.5, -1.0]])
    before = Reservoir(3, (Kept(example, (0, 1), outputs),))
    grown = replace(spec, labels=("B-NEW", *TAGS))

    [after] = read(written(before, spec), grown).kept

    assert after.example == replace(example, tags=(IGNORED, 2))
    assert after.labels == (1, 2)
    assert torch.equal(after.outputs, outputs) or after.outputs.isnan()[0].all()
    assert torch.equal(after.outputs[1], outputs[1])
    with pytest.raises(NotKept, match="has the label 'B-CAT' in its task"):
        read(written(before, spec), replace(spec, labels=("O", "B-DOG")))


def test_a_step_adds_the_kept_texts_mean_gradient_to_the_batchs(tag):
    kept = train(tag(FIRST))
    both = moved(tag(SECOND, kept, run="both"))
    old, new = (moved(tag(rows, method=None, run=rows[0]["tokens"][0])) for rows in (FIRST, SECOND))
    for name, change in both.items():
        torch.testing.assert_close(change, new[name] + old[name], rtol=1e-4, atol=1e-7)


def test_kept_tags_are_told_from_all_that_were_seen_or_from_those_of_their_task(tag):
    own, new = ("O", "B-CAT", "I-CAT"), ("O", "B-DOG")
    kept = train(tag(FIRST, labels=own))
    for labels, moves in (("seen", True), ("task", False)):
        method = replace(REPLAY, options={**REPLAY.options, "labels": labels})
        both = moved(tag(SECOND, kept, method, run=labels, labels=new))
        alone = moved(tag(SECOND, method=None, run=f"{labels}-alone", labels=new))
        pushed = both["head.bias"][3] - alone["head.bias"][3]  # B-DOG, by words of the first task
        assert bool(pushed.abs() > 1e-6) is moves


def test_der_keeps_the_logits_of_each_word_that_the_model_sees(tag):
    long = [{"tokens": ["cat"] * 20, "tags": ["B-CAT"] * 20}]
    assignment = tag([*FIRST, *long], method=DER, labels=("O", "B-CAT", "I-CAT"))
    update = train(assignment)
    with opened(assignment) as session:
        session.write({**assignment.broadcast.tensors, **update.tensors})
        session.model.eval()
        for one in kept_by(assignment, update).kept:
            encoded = data.encode([one.example], session.base.tokenizer, assignment.model)
            with torch.no_grad():
                logits = session.model(move(data.collate(encoded, 0), "cpu"))[0]
            seen = logits[encoded[0].labels != IGNORED][:, :3]
            unseen = len(one.example.words) - len(seen)
            assert torch.allclose(one.outputs[: len(seen)], seen, atol=1e-5)
            assert (unseen > 0) is (len(one.example.words) == 20)
            assert bool(one.outputs[len(seen) :].isnan().all())


def test_der_holds_a_model_that_has_not_moved_to_the_tags_alone(tag):
    """At the logits that were kept the squared distance has no gradient: what is left is CE."""
    kept = train(tag(FIRST, method=DER, lr=1e-9))
    der, replay = moved(tag(SECOND, kept, DER, run="d")), moved(tag(SECOND, kept, REPLAY, run="r"))
    for name in replay:
        torch.testing.assert_close(der[name], replay[name], rtol=1e-3, atol=1e-6)


def test_der_draws_a_model_that_has_moved_back_to_its_words_logits(tag):
    kept = train(tag(FIRST, method=DER))  # a step away from what the next run begins with
    method = replace(DER, options={**DER.options, "beta": 0.0})
    both = moved(tag(SECOND, kept, method, run="both"))
    alone = moved(tag(SECOND, method=None, run="alone"))
    first = moved(tag(FIRST, method=None, run="first"))
    drawn = {n: both[n] - alone[n] for n in both}
    assert sum(float((drawn[n] * first[n]).sum()) for n in drawn) > 0
