"""A site answers orders: the installed weft, its own ledger first, and never a word of its data."""

import hashlib
import json
import math
import shutil
import sqlite3
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from clients import models, worker
from clients.accounting import epsilon
from clients.assignment import DataSpec, PluginChoice, Privacy, Report
from clients.charges import charge_of, spend_of
from clients.evaluate import Evaluation
from clients.node.ledger import Ledger
from clients.node.resident import Resident
from clients.orders import Order, Refusal, pack_order, unpack_reply
from clients.wire import pack
from strategies.base import Update

PRIVATE = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1)
SEEDED = replace(PRIVATE, insecure_seed=7)


@pytest.fixture
def resident(node):
    """Return a function that makes the resident process of a node."""
    return lambda policy=None, **changes: Resident(node(policy, **changes))


def reply_of(resident, order):
    return unpack_reply(resident.answer(order))


def refusal_of(resident, order):
    found = reply_of(resident, order).result
    assert isinstance(found, Refusal)
    return found


def charges(tmp_path):
    return Ledger(tmp_path / "state").charges("clinic-7")


def test_an_update_is_what_training_here_gives(resident, order, assign, asked):
    site = resident({"insecure_seed": True})

    found = reply_of(site, order(privacy=SEEDED)).result

    here = worker.perform(
        assign(privacy=SEEDED, model=replace(assign().model, hash=asked().model.hash))
    )
    assert isinstance(found, Update)
    assert pack(found) == pack(here)
    assert found.spends == (spend_of(asked()),)


def test_what_it_costs_is_on_the_ledger_as_the_coordinator_has_it(resident, order, asked, tmp_path):
    assert isinstance(reply_of(resident(), order()).result, Update)

    assert charges(tmp_path) == [charge_of(asked(), "clinic-7")]


def test_the_same_order_again_gets_the_same_bytes_and_costs_nothing(resident, order, tmp_path):
    first = unpack_reply(resident().answer(order())).result
    later = unpack_reply(resident().answer(order())).result

    assert pack(first) == pack(later)
    assert len(charges(tmp_path)) == 1


def test_the_charge_is_durable_before_the_data_are_read(resident, order, tmp_path, monkeypatch):
    seen = []

    def gone(*_):
        seen.extend(charges(tmp_path))
        raise KeyboardInterrupt  # as a process that is killed

    monkeypatch.setattr(worker, "perform", gone)
    with pytest.raises(KeyboardInterrupt):
        resident().answer(order())

    assert len(seen) == 1


def test_a_crash_before_the_reply_overstates_and_never_understates(
    resident, order, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr("clients.site.write_durably", full)
        assert "OSError at the client" in refusal_of(resident(), order()).reason
    assert len(charges(tmp_path)) == 1  # nothing was sent

    assert isinstance(reply_of(resident(), order()).result, Update)
    assert len(charges(tmp_path)) == 1


def test_a_site_refuses_what_its_own_ledger_cannot_afford(resident, order, asked, tmp_path):
    one = epsilon([spend_of(asked())], 1e-5)
    site = resident(epsilon=one + 1e-6)

    assert isinstance(reply_of(site, order()).result, Update)
    later = refusal_of(site, order(round=2))

    assert later.round == 2
    assert "Only the site's owner can allow more" in later.reason
    assert len(charges(tmp_path)) == 1


def test_a_refusal_tells_the_coordinator_what_it_does_not_know(resident, order, asked):
    one = epsilon([spend_of(asked())], 1e-5)
    site = resident(epsilon=one + 1e-6)
    site.answer(order())

    found = reply_of(site, order(run="run-2"))

    assert isinstance(found.result, Refusal)
    [row] = found.node["spends"]
    assert (row["run"], row["population"]) == ("run-1", "clinic-7")
    assert row["event"] == charge_of(asked(), "clinic-7").event


def test_what_the_policy_refuses_reads_nothing(resident, order, monkeypatch):
    monkeypatch.setattr(worker, "perform", lambda *_: pytest.fail("it was done"))

    found = refusal_of(resident(), order(privacy=None))

    assert (found.client, found.round) == ("clinic-7", 1)
    assert "without_privacy in node.yaml" in found.reason


def test_the_base_model_is_loaded_once(resident, order):
    site = resident({"insecure_seed": True})
    before = models.num_loads()

    loads = [reply_of(site, order(round=n)).node["loads"] - before for n in (1, 2, 3)]

    assert loads in ([1, 1, 1], [0, 0, 0])  # the process of the tests may have it already


def test_scores_without_noise_are_for_an_owner_who_allows_it(resident, order):
    exact = order(action="evaluate", privacy=None)

    found = reply_of(resident({"without_privacy": True}), exact).result

    assert isinstance(found, Evaluation)
    assert found.num_examples == 10
    assert "exact scores" in refusal_of(resident(), exact).reason


def test_noised_scores_cost_what_they_tell_once(resident, order, tmp_path):
    told = replace(PRIVATE, sample_rate=1.0, report=Report(loss=5.0, count=True))
    scores = order(action="evaluate", privacy=told, steps=0)

    first, again = (reply_of(resident(), scores).result for _ in range(2))

    assert isinstance(first, Evaluation)
    assert first.sums.keys() == {"count", "loss", "accuracy"}
    assert first == again
    [charge] = charges(tmp_path)
    assert charge.parameters == {"noise_multiplier": 1.0, "sample_rate": 1.0, "steps": 1.0}


def test_noised_scores_of_what_it_holds_out_are_charged_and_told_again(
    resident, order, asked, tmp_path
):
    """The order of a coordinator's evaluation: one Gaussian, on the site's own ledger first."""
    data = replace(asked().data, part="holdout", holdout=0.5)
    told = Privacy(2.0, max_grad_norm=1.0, sample_rate=1.0, report=Report(3.0, count=True))
    scores = order(action="evaluate", steps=1, privacy=told, data=data)

    first = reply_of(resident(holdout=0.5), scores).result
    again = reply_of(resident(holdout=0.5), scores).result

    assert isinstance(first, Evaluation)
    assert set(first.sums) == {"count", "loss", "accuracy"}
    assert (first.metrics, first.sums) == ({}, again.sums)
    [charge] = charges(tmp_path)
    assert charge.parameters == {"noise_multiplier": 2.0, "sample_rate": 1.0, "steps": 1.0}
    whole = order(action="evaluate", privacy=told)
    assert "splits them otherwise" in refusal_of(resident(holdout=0.5), whole).reason


def keys_of(tmp_path):
    return [*tmp_path.glob("state/site/*/key"), *tmp_path.glob("state/site/*/.*")]


def test_the_key_of_an_evaluation_is_destroyed_when_its_answer_is_stored(resident, order, tmp_path):
    told = replace(PRIVATE, sample_rate=1.0, report=Report(loss=5.0))
    scores = order(action="evaluate", privacy=told, run="eval-1")

    first = reply_of(resident(), scores).result

    assert keys_of(tmp_path) == []
    assert reply_of(resident(), scores).result == first
    assert keys_of(tmp_path) == []
    assert len(charges(tmp_path)) == 1


def test_the_key_of_a_run_is_kept_when_the_run_is_evaluated(resident, order, tmp_path):
    told = replace(PRIVATE, sample_rate=1.0, report=Report(loss=5.0))
    site = resident()
    update = reply_of(site, order()).result
    [key] = keys_of(tmp_path)

    assert isinstance(reply_of(site, order(action="evaluate", privacy=told)).result, Evaluation)

    assert keys_of(tmp_path) == [key]
    assert pack(reply_of(site, order()).result) == pack(update)


def test_the_key_of_an_evaluation_that_failed_is_destroyed_when_nobody_can_ask_for_it(
    resident, order, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError("no space left")

    told = replace(PRIVATE, sample_rate=1.0, report=Report(loss=5.0))
    first, later = (order(action="evaluate", privacy=told, run=f"eval-{n}") for n in (1, 2))
    with monkeypatch.context() as broken:
        broken.setattr("clients.site.write_durably", full)
        refusal_of(resident(), first)
    [key] = keys_of(tmp_path)
    assert not isinstance(reply_of(resident(), later).result, Refusal)
    assert keys_of(tmp_path) == [key]  # it may be asked for again

    with sqlite3.connect(tmp_path / "state" / "ledger.db") as ledger:
        ledger.execute("UPDATE answers SET began = began - 172801")
    reply_of(resident(), later)

    assert keys_of(tmp_path) == []
    assert "the key of its noise is gone" in refusal_of(resident(), first).reason


def test_only_without_privacy_does_a_reply_say_how_long_it_took(resident, order):
    assert "seconds" not in reply_of(resident(), order()).node
    assert "seconds" in reply_of(resident({"without_privacy": True}), order(privacy=None)).node


def test_a_run_that_turns_to_privacy_is_refused(resident, order):
    site = resident({"without_privacy": True})
    assert isinstance(reply_of(site, order(privacy=None)).result, Update)

    assert "must be another run" in refusal_of(site, order(round=2)).reason


def test_no_refusal_holds_data_or_a_place(resident, order, tmp_path):
    (tmp_path / "secret.jsonl").write_text(json.dumps({"text": "gonorrhoea", "label": "hidden"}))
    site = resident({"without_privacy": True}, uri="jsonl:secret.jsonl")

    found = refusal_of(site, order(privacy=None)).reason

    assert "'hidden' is outside the label set" in found  # as a run here would say
    assert "gonorrhoea" not in found
    assert str(tmp_path) not in found


def test_under_privacy_nobody_learns_that_a_label_is_there(resident, order, tmp_path):
    seeded = {"insecure_seed": True}
    without = unpack_reply(resident(seeded).answer(order(privacy=SEEDED))).result
    rows = (tmp_path / "rows-10.jsonl").read_text()
    (tmp_path / "odd.jsonl").write_text(rows + '{"text": "a", "label": "hidden"}\n{"text": 3}\n')

    odd = resident(seeded, uri="jsonl:odd.jsonl")
    found = unpack_reply(odd.answer(order(privacy=SEEDED, run="run-2"))).result

    assert pack(found) == pack(without)


def test_under_privacy_nobody_learns_whether_a_label_changes_the_data(resident, order):
    site = resident()
    both = order(data=DataSpec("site:notes", labels=("cat", "dog")))

    found = [reply_of(site, one).result for one in (order(), both)]

    assert [one.fingerprint for one in found] == ["", ""]


@pytest.mark.parametrize("action", ["train", "evaluate"])
def test_what_is_paid_for_is_never_told_again_in_other_noise(resident, order, tmp_path, action):
    told = replace(PRIVATE, sample_rate=1.0, report=Report(loss=5.0))
    asked = order(action=action, privacy=told)
    site = resident()
    assert not isinstance(reply_of(site, asked).result, Refusal)
    shutil.rmtree(tmp_path / "state" / "site")

    for _ in range(2):
        assert "the key of its noise is gone" in refusal_of(site, asked).reason
    assert not isinstance(reply_of(site, order(run="run-2")).result, Refusal)


def test_only_what_would_be_refused_again_is_final(resident, order, terms, asked):
    site = resident(epsilon=epsilon([spend_of(asked())], 1e-5) + 1e-6)

    assert refusal_of(site, order(privacy=None)).final  # policy
    assert not refusal_of(site, order(terms(deadline=1.0))).final
    assert not refusal_of(site, order(adapter=PluginChoice("lora", {"r": "many"}))).final
    assert refusal_of(site, order(round=2)).final  # that one has spent the budget


@pytest.mark.parametrize("odd", [1e30, math.nan, math.inf])
def test_numbers_that_rounding_would_hide_from_clipping_are_refused(resident, asked, terms, odd):
    one = asked()
    sent = {n: torch.full_like(t, odd) for n, t in one.broadcast.tensors.items()}
    odd_order = pack_order(replace(one, broadcast=replace(one.broadcast, tensors=sent)), terms())

    assert "rounding could hide from clipping" in refusal_of(resident(), odd_order).reason


@pytest.mark.parametrize("uri", ["jsonl:nowhere.jsonl", "parquet:rows-10.jsonl"])
def test_data_that_cannot_be_read_are_not_placed(resident, order, tmp_path, uri):
    found = refusal_of(resident(uri=uri), order()).reason

    assert found
    assert str(tmp_path) not in found
    assert "nowhere" not in found


def test_an_unknown_option_is_an_answer(resident, order):
    found = refusal_of(resident(), order(adapter=PluginChoice("lora", {"r": "many"})))

    assert "r" in found.reason


def test_bytes_that_are_no_order_are_answered(resident):
    found = refusal_of(resident(), Order(b"{}", {}))

    assert (found.client, found.round) == ("clinic-7", 0)
    assert found.reason.startswith("the order cannot be used")


def test_a_site_that_holds_not_what_was_left_out_says_so(resident, asked, terms):
    whole = asked()
    name, tensor = next(iter(whole.broadcast.tensors.items()))
    rest = {n: t for n, t in whole.broadcast.tensors.items() if n != name}
    left = replace(
        whole,
        broadcast=replace(whole.broadcast, tensors=rest),
        held={f"tensors/{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()},
    )

    found = refusal_of(resident(), pack_order(left, terms()))

    assert found.not_held


def test_what_is_being_stopped_says_so(node, order, tmp_path):
    stop = threading.Event()
    stop.set()

    found = unpack_reply(Resident(node(), stop).answer(order())).result

    assert found.reason == "the site is being stopped"
    assert not list((tmp_path / "state" / "site").glob("*/update-*"))


def test_what_is_late_is_given_up(resident, order, terms, monkeypatch):
    site, late = resident(), order(terms(deadline=100.0))
    clock = iter([0.0, *[1e9] * 100])
    fake = SimpleNamespace(time=lambda: next(clock), monotonic=time.monotonic)
    monkeypatch.setattr("clients.node.resident.time", fake)

    assert "missed the round's deadline" in refusal_of(site, late).reason


def test_without_its_ledger_a_site_releases_nothing(resident, order, tmp_path, monkeypatch):
    site = resident()
    (tmp_path / "state" / "ledger.db").write_bytes(b"no database" * 1000)
    monkeypatch.setattr(worker, "perform", lambda *_: pytest.fail("it was done"))

    assert "nothing is released without it" in refusal_of(site, order()).reason


def test_an_orders_fields_name_no_column_of_the_site(resident, order, tmp_path):
    rows = [{"text": "cat a", "label": "cat", "ssn": "123"}] * 10
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site = resident({"insecure_seed": True}, uri="jsonl:rows.jsonl")

    own = order(privacy=SEEDED)
    other = order(privacy=SEEDED, data=DataSpec("site:notes", {"text": "ssn"}))

    first = reply_of(site, own).result
    assert isinstance(first, Update)
    assert reply_of(site, other).result.tensors.keys() == first.tensors.keys()
