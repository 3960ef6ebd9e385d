"""A run's log, folded event by event, says where the run stands."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.history import Asked, Faults, History, Open, Score, Taken, Times
from storage.records import Event, now

V0, V1 = "0" * 64, "1" * 64


def log(*events):
    return [Event(seq, kind, data, now(), {}) for seq, (kind, data) in enumerate(events, 1)]


def folded(*events):
    return History().after_all(log(*events))


START = ("started", {"version": V0})
ROUND = ("round", {"round": 1, "base": V0, "cohort": ["a", "b", "c"], "goal": 2, "quorum": 1})
ASSIGNED = ("assigned", {"round": 1, "base": V0, "assigned": ["a", "b", "c"]})


def accepted(client, round_=1, base=V0):
    return ("accepted", {"client": client, "round": round_, "base": base, "digest": f"d-{client}"})


def refused(client, round_=1, fault=True):
    return ("refused", {"client": client, "round": round_, "reason": "oh", "fault": fault})


def closed(*clients, round_=1, **others):
    updates = [
        {"client": c, "round": round_, "base": V0, "digest": f"d-{c}", "weight": 1.0}
        for c in clients
    ]
    ends = {"late": [], "missed": [], "spare": []} | others
    return ("closed", {"round": round_, "updates": updates} | ends)


COMMITTED = ("committed", {"round": 1, "version": V1, "updates": 2})


def test_a_run_that_has_not_begun_stands_nowhere():
    assert folded() == History()


def test_an_open_round_is_what_its_event_says():
    history = folded(START, ROUND)

    assert (history.round, history.version) == (0, V0)
    assert history.open == Open(1, V0, ("a", "b", "c"), goal=2, quorum=1)
    assert history.pending == {}


def test_who_was_asked_owes_an_answer_until_it_comes_or_is_refused():
    history = folded(START, ROUND, ASSIGNED, accepted("a"), refused("b"))

    assert history.pending == {"c": Asked("c", 1, V0)}
    assert history.taken == {("a", 1): Taken("a", 1, V0, "d-a")}
    assert history.open.assigned == {"a", "b", "c"}
    assert history.open.refused == {"b"}
    assert history.faults == {"b": Faults(1, 1)}


def test_a_decision_is_read_back_as_it_was_made():
    history = folded(START, ROUND, ASSIGNED, accepted("a"), closed("a", spare=["b", "c"]))

    assert history.open.closed == (Taken("a", 1, V0, "d-a", 1.0),)
    assert history.pending == {}
    assert history.faults == {}


def test_who_misses_the_deadline_has_a_fault_and_who_is_late_is_waited_for():
    history = folded(START, ROUND, ASSIGNED, accepted("a"), closed("a", missed=["b"], late=["c"]))

    assert history.pending == {"c": Asked("c", 1, V0)}
    assert history.faults == {"b": Faults(1, 1)}


def test_a_committed_round_leaves_nothing_open():
    history = folded(START, ROUND, ASSIGNED, accepted("a"), closed("a", late=["b"]), COMMITTED)

    assert (history.round, history.version, history.open) == (1, V1, None)
    assert history.taken == {}
    assert history.pending.keys() == {"b", "c"}


def test_faults_in_a_row_are_counted_and_forgotten_with_an_update():
    twice = [START, ROUND, ASSIGNED, refused("a"), refused("a")]

    assert folded(*twice).faults == {"a": Faults(2, 1)}
    assert folded(*twice, accepted("a")).faults == {}
    assert folded(*twice, ("forgiven", {"client": "a"})).faults == {}


def test_a_refusal_for_the_budget_is_no_fault():
    assert folded(START, ROUND, refused("a", fault=False)).faults == {}


def test_a_round_below_its_quorum_is_drawn_anew_and_keeps_what_it_has():
    failed = ("below quorum", {"round": 1, "updates": 1, "quorum": 2, "missed": ["b"]})
    history = folded(START, ROUND, ASSIGNED, accepted("a"), failed)

    assert history.open is None
    assert history.pending == {}
    assert history.taken.keys() == {("a", 1)}
    assert history.faults == {"b": Faults(1, 1)}


def test_being_asked_again_after_a_crash_counts_once():
    history = folded(START, ROUND, ASSIGNED, ASSIGNED)

    assert history.asked == dict.fromkeys("abc", Times(1, 1))


def test_scores_belong_to_the_version_that_was_committed_last():
    history = folded(START, ROUND, COMMITTED, ("evaluated", {"round": 1, "accuracy": 0.5}))

    assert history.scores == (Score(1, V1, {"accuracy": 0.5}),)
    assert history.judged == 1


def test_what_clients_tell_is_averaged_over_what_a_round_aggregates():
    told = [accepted(client) for client in "abc"]
    for (_, data), loss in zip(told, (1.0, 2.0, 9.0), strict=True):
        data["loss"] = loss
    found = folded(START, ROUND, ASSIGNED, *told, closed("a", "b", spare=["c"]), COMMITTED)

    assert found.told == (Score(1, V1, {"train_loss": 1.5}),)
    assert found.scored("train_loss") == found.told
    assert found.scored("accuracy") == ()
    assert found.losses == {}


def test_a_failed_evaluation_is_not_made_again():
    failed = ("evaluation failed", {"round": 1, "reason": "oh"})

    assert folded(START, ROUND, COMMITTED, failed).judged == 1


@pytest.mark.parametrize("kind", ["training", "claimed", "completed", "some day"])
def test_other_events_change_nothing_but_the_number(kind):
    before = folded(START, ROUND)
    after = before.after(Event(3, kind, {}, now(), {}))

    assert after == History(**{f: getattr(before, f) for f in before.__slots__} | {"seq": 3})


@st.composite
def logs(draw):
    """Draw the log of a run as it could be written, with crashes in between."""
    events, names = [START], "abcdef"
    for round_ in range(1, draw(st.integers(1, 4)) + 1):
        asked = sorted(draw(st.sets(st.sampled_from(names), min_size=1)))
        base = V0
        events.append(
            ("round", {"round": round_, "base": base, "cohort": asked, "goal": 1, "quorum": 1})
        )
        for _ in range(draw(st.integers(1, 2))):
            events.append(("assigned", {"round": round_, "base": base, "assigned": asked}))
        fates = {c: draw(st.sampled_from(["accepted", "refused", "missed", "late"])) for c in asked}
        for client, fate in fates.items():
            if fate == "accepted":
                events.append(accepted(client, round_))
            elif fate == "refused":
                events.append(refused(client, round_))
        ends = {k: [c for c, f in fates.items() if f == k] for k in ("missed", "late")}
        good = [c for c, f in fates.items() if f == "accepted"]
        events.append(closed(*good, round_=round_, **ends))
        events.append(("committed", {"round": round_, "version": V1, "updates": len(good)}))
    return log(*events)


@given(logs(), st.data())
def test_however_a_log_is_read_in_portions_the_history_is_the_same(events, data):
    whole = History().after_all(events)
    portions = History()
    while portions.seq < len(events):
        start = data.draw(st.integers(0, portions.seq))  # some may be read twice
        stop = data.draw(st.integers(portions.seq + 1, len(events)))
        portions = portions.after_all(events[start:stop])

    assert portions == whole


@given(logs())
def test_the_faults_in_a_commit_stand_for_all_events_before_it(events):
    whole = History().after_all(events)
    for number, event in enumerate(events):
        if event.kind == "committed":
            before = History().after_all(events[:number])
            faults = {client: list(fault) for client, fault in before.faults.items()}
            told = replace(event, data={**event.data, "faults": faults})
            recent = History.at_commit(told).after_all(events[number + 1 :])

            assert (recent.faults, recent.round) == (whole.faults, whole.round)


@given(logs())
def test_the_history_agrees_with_counting_the_whole_log(events):
    history = History().after_all(events)

    asked = {
        (c, e.data["round"]) for e in events if e.kind == "assigned" for c in e.data["assigned"]
    }
    counts = Counter(client for client, _ in asked)
    assert {c: t.rounds for c, t in history.asked.items()} == counts
    for client in counts:
        fates = [
            e.kind == "accepted"
            for e in events
            for c in [*e.data.get("missed", ()), e.data.get("client")]
            if c == client
        ]
        row = fates[::-1].index(True) if True in fates else len(fates)
        assert history.faults.get(client, Faults(0, 0)).in_a_row == row
