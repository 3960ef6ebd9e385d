"""What a client trains on besides its task's examples, and what it keeps of them."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clients import data
from clients.assignment import ModelSpec, Past, PluginChoice, Privacy
from clients.checkpoint import Checkpoints
from clients.examples import digest as digest_of_examples
from clients.pace import GivenUp
from clients.rehearsal import UncountedRehearsal
from clients.reservoir import Reservoir, read
from clients.session import move, opened
from clients.site import Site
from clients.trainer import train
from clients.uplink import decoded
from clients.wire import digest, pack

FIRST = [{"text": f"cat {word}", "label": "cat"} for word in ("sings", "learns", "weaves")]
SECOND = [{"text": f"dog {word}", "label": "dog"} for word in ("data", "round")]
REPLAY = PluginChoice("replay", {"size": 8, "batch": 8})
DER = PluginChoice("der-plus-plus", {"size": 8, "batch": 8})
DESCENT = PluginChoice("sgd", {"lr": 0.1})


@pytest.fixture
def task(assign):
    """Return a function that makes an assignment over rows, which goes on from an update."""

    def make(rows=FIRST, after=None, method=REPLAY, **changes):
        past = Past("" if after is None else digest(pack(after)), seed=3)
        made = assign(
            rows,
            optimizer=DESCENT,
            batch_size=len(rows),
            steps=1,
            regularizers=(method,) if method else (),
            past=past if method else None,
        )
        return replace(made, **changes)

    return make


def moved(assignment, update):
    sent = assignment.broadcast.tensors
    return {n: t.double() - sent[n].double() for n, t in update.tensors.items()}


def reservoir_of(assignment, update) -> Reservoir:
    parts = Site(assignment.site).kept_examples(assignment.client, digest(pack(update)))
    return read(parts, assignment.model)


def test_a_step_adds_the_kept_examples_mean_gradient_to_the_batchs(task):
    kept = train(task())
    for method, weight in ((REPLAY, 1.0), (replace_options(REPLAY, weight=0.25), 0.25)):
        both = task(SECOND, kept, method, run=f"run-{weight}")
        apart = [task(rows, method=None, run=f"{len(rows)}") for rows in (FIRST, SECOND)]
        old, new = (moved(one, train(one)) for one in apart)
        for name, change in moved(both, train(both)).items():
            torch.testing.assert_close(change, new[name] + weight * old[name], rtol=1e-4, atol=1e-7)


def replace_options(choice, **options):
    return replace(choice, options={**choice.options, **options})


def test_a_first_task_is_trained_as_without_it_bit_for_bit(task):
    one, two = train(task()), train(task(method=None, run="run-2"))
    assert all(torch.equal(one.tensors[n], two.tensors[n]) for n in two.tensors)


def test_a_small_batch_is_drawn_of_what_is_kept_anew_in_each_step(task, monkeypatch):
    kept = train(task())
    few = replace_options(REPLAY, batch=1)
    seen: list[str] = []
    honest = data.collate

    def watched(encoded, pad):
        seen.extend(str(one.input_ids.tolist()) for one in encoded)
        return honest(encoded, pad)

    assignment = task(SECOND, kept, few, steps=12, batch_size=2)
    monkeypatch.setattr(data, "collate", watched)
    train(assignment)
    kept_ones = [text for text in seen if seen.count(text) < 12]
    assert len(kept_ones) == 12
    assert len(set(kept_ones)) == 3


def test_it_keeps_its_examples_with_the_update_and_none_of_them_in_it(task):
    assignment = task()
    update = train(assignment)
    found = reservoir_of(assignment, update)
    assert sorted(one.example.text for one in found.kept) == sorted(r["text"] for r in FIRST)
    assert found.offered == 3
    assert b"cat" not in pack(update)
    assert update.memory == {}


def test_what_it_keeps_is_readable_by_its_owner_alone_and_can_be_deleted(task):
    assignment = task(method=DER)
    update = train(assignment)
    files = list(Path(assignment.site).glob("examples/*/*"))
    assert len(files) == 3
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o600}
    assert {stat.S_IMODE(p.parent.stat().st_mode) for p in files} == {0o700}

    site = Site(assignment.site)
    assert site.forget_examples(assignment.client) == 2
    assert reservoir_of(assignment, update) == Reservoir()
    assert site.forget_examples(assignment.client) == 0


def test_rounds_of_one_task_keep_the_same_and_it_is_there_once(task):
    first = task()
    later = replace(first, round=2, seed=9)
    kept = [reservoir_of(a, train(a)) for a in (first, later)]
    assert kept[0] == kept[1]
    files = [p.name for p in Path(first.site).glob("examples/*/*")]
    assert len([name for name in files if not name.startswith("update-")]) == 1


def test_a_task_goes_on_from_the_update_that_its_run_goes_on_from(task):
    one = train(task())
    two = task(SECOND, one)
    third = [{"text": "rank sings", "label": "rank"}]
    after_both, fork = task(third, train(two), round=3), task(third, one, round=4)
    assert len(reservoir_of(two, train(two)).kept) == 5
    assert len(reservoir_of(after_both, train(after_both)).kept) == 6
    assert len(reservoir_of(fork, train(fork)).kept) == 4


def test_the_same_assignment_again_rehearses_the_same_even_after_a_crash_before_it_was_sent(task):
    kept = train(task())
    assignment = task(SECOND, kept)
    first = pack(train(assignment))
    before = sorted(p.name for p in Path(assignment.site).glob("examples/*/*"))
    for path in Path(assignment.site).glob("*/update-*"):
        path.unlink()
    assert pack(train(assignment)) == first
    assert sorted(p.name for p in Path(assignment.site).glob("examples/*/*")) == before


def test_stopped_between_steps_it_ends_with_the_same_bytes(task, monkeypatch):
    kept = train(task())
    few = replace_options(REPLAY, batch=1)
    assignment = task(SECOND, kept, few, steps=4)
    offers = []
    honest = Checkpoints.offer

    def stopping(self, state):
        honest(self, state)
        offers.append(1)
        if len(offers) == 2:
            raise GivenUp("the worker is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "offer", stopping)
        with pytest.raises(GivenUp):
            train(assignment, checkpoint_s=0)
    resumed = pack(train(assignment, checkpoint_s=0))
    for path in Path(assignment.site).glob("*/update-*"):
        path.unlink()
    assert pack(train(assignment)) == resumed


@pytest.mark.parametrize(("labels", "moves"), [("seen", True), ("task", False)])
def test_a_kept_example_is_told_from_all_labels_or_from_those_of_its_task(task, labels, moves):
    """In the softmax of this task it would have no finite loss."""
    kept = train(task(labels=("cat", "model")))
    rows = torch.tensor([0.0, 1, 0, 1])
    second = task(SECOND, kept, replace_options(REPLAY, labels=labels), labels=("dog", "rank"))
    mask = {"head.weight": rows[:, None].expand(4, 32), "head.bias": rows}
    second = replace(second, broadcast=replace(second.broadcast, mask=mask))
    alone = replace(second, regularizers=(), past=None, run="alone")

    update, without = train(second), train(alone)

    assert all(t.isfinite().all() for t in update.tensors.values())
    assert any(not torch.equal(update.tensors[n], without.tensors[n]) for n in update.tensors)
    rows = "head.bias"  # of this task's labels, which the kept example has nothing to do with
    assert torch.equal(update.tensors[rows], without.tensors[rows]) != moves


def test_kept_examples_train_the_rows_of_their_labels_and_no_others_move(task):
    """Weight decay would move every row that is not masked."""
    kept = train(task(labels=("cat",)))
    rows = torch.tensor([1.0, 1, 1, 0])  # cat, dog, model: seen by anybody, and rank is to come
    mask = {"head.weight": rows[:, None].expand(4, 32), "head.bias": rows}
    decaying = PluginChoice("sgd", {"lr": 0.1, "weight_decay": 0.5})
    second = task(SECOND, kept, labels=("dog",), optimizer=decaying)
    second = replace(second, broadcast=replace(second.broadcast, mask=mask))
    newcomer = replace(second, past=Past("", 3), run="newcomer")

    for assignment, trained in (
        (second, [True, True, False, False]),
        (newcomer, [False, True, False, False]),
    ):
        sent = assignment.broadcast
        before, after = sent.tensors, decoded(train(assignment).tensors, sent, (), assignment.seed)
        moves = (after["head.weight"] != before["head.weight"]).any(dim=1)
        assert moves.tolist() == trained


def test_der_keeps_the_logits_of_the_model_that_the_round_ended_with(task):
    assignment = task(method=DER, labels=("cat", "model"))
    update = train(assignment)
    found = reservoir_of(assignment, update)
    tensors = {**assignment.broadcast.tensors, **update.tensors}
    with opened(assignment) as session:
        session.write(tensors)
        session.model.eval()
        for one in found.kept:
            encoded = data.encode([one.example], session.base.tokenizer, assignment.model)
            with torch.no_grad():
                logits = session.model(move(data.collate(encoded, 0), "cpu"))
            assert one.labels == (0, 2)
            assert torch.allclose(one.outputs, logits[0, [0, 2]], atol=1e-5)


def test_der_holds_a_model_that_has_not_moved_to_the_labels_alone(task):
    """At the logits that were kept the squared distance has no gradient: what is left is CE."""
    first = task(method=DER, optimizer=PluginChoice("sgd", {"lr": 1e-9}))
    kept = train(first)
    der = task(SECOND, kept, replace_options(DER, alpha=9.0, beta=1.0))
    replay = task(SECOND, kept, REPLAY, run="run-2")
    one, two = moved(der, train(der)), moved(replay, train(replay))
    for name in two:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-6)


def test_a_language_model_rehearses_its_texts(task, tiny_decoder, assign):
    model = ModelSpec(str(tiny_decoder), "causal-lm", max_length=16)
    old, new = [{"text": "the cat sings"}], [{"prompt": "a dog", "completion": " learns"}] * 2

    def asked(rows, after="", run="run-1", method=(REPLAY,)):
        return assign(
            rows,
            model=model,
            optimizer=DESCENT,
            batch_size=len(rows),
            steps=1,
            run=run,
            regularizers=method,
            past=Past(after, 3) if method else None,
        )

    kept = train(asked(old))
    both = asked(new, digest(pack(kept)))
    apart = [asked(rows, run=f"{len(rows)}", method=()) for rows in (old, new)]
    olds, news = (moved(one, train(one)) for one in apart)
    for name, change in moved(both, train(both)).items():
        torch.testing.assert_close(change, olds[name] + news[name], rtol=1e-4, atol=1e-7)


def test_its_fingerprint_covers_what_was_kept_and_is_keyed(task):
    kept = train(task())
    assignment = task(SECOND, kept, public=True)
    update, key = train(assignment), Site(assignment.site).data_key()
    own = data.examples(assignment.data, assignment.model)
    every = [*own, *(one.example for one in reservoir_of(task(), kept).kept)]
    assert update.fingerprint == digest_of_examples(every, key)
    assert update.fingerprint != data.fingerprint(assignment.data, own, key)


def test_public_examples_have_a_fingerprint_that_is_the_same_everywhere(task):
    kept = train(task(public=True))
    assignment = task(SECOND, kept, public=True)
    own = data.examples(assignment.data, assignment.model)
    every = [*own, *(one.example for one in reservoir_of(task(), kept).kept)]
    assert train(assignment).fingerprint == digest_of_examples(every, None)


def test_under_dp_it_is_refused_at_the_client_too(task):
    privacy = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5)
    with pytest.raises(UncountedRehearsal, match="'replay' trains again on examples of earlier"):
        train(task(privacy=privacy))


def test_what_was_deleted_is_not_rehearsed_and_no_error(task):
    assignment = task()
    kept = train(assignment)
    Site(assignment.site).forget_examples(assignment.client)
    second = task(SECOND, kept)
    alone = task(SECOND, method=None, run="run-2")
    one, two = train(second), train(alone)
    assert all(torch.equal(one.tensors[n], two.tensors[n]) for n in two.tensors)


def test_a_digest_of_an_assignment_without_a_past_is_as_it_was(task):
    plain = task(method=None)
    assert plain.digest() == replace(plain, run="another").digest()
    assert replace(plain, past=Past("ab")).digest() != plain.digest()
