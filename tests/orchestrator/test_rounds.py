"""Whole runs of imagined clients: what is decided in time is written down, and read back."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from orchestrator.backends.base import Failure
from orchestrator.federation import Cancelled, Federation, Paused, RoundFailed
from orchestrator.history import History
from orchestrator.quarantine import NotAtFault, _recent, quarantined_in, release
from orchestrator.service import open_workspace

FOUR = ("a", "b", "c", "d")
KEEP = {
    "strategy": "ffa-lora",
    "rounds": 3,
    "cohort": {"size": 2, "over_provision": 0.5},
    "quorum": 2,
    "late": "keep",
}
SLOW = {(c, r): 2 for c in FOUR for r in range(1, 7)}
SLOW |= {(c, 1): 3 for c in "ab"} | {("b", 2): 4, ("c", 2): 9, ("d", 3): 3}
HELD_BACK = {"data": "jsonl:/held-back"}
FEDBUFF = {
    "strategy": "ffa-lora",
    "rounds": 3,
    "asynchronous": {"buffer": 2, "concurrency": 3, "max_staleness": 2},
}


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def federation(tmp_path, make_plan, imagined):
    """Return a function that makes a run in a workspace of its own, or one to go on with it."""

    def make(home="home", backend=None, die_at=None, copies=False, **changes):
        plan = make_plan(clients=changes.pop("clients_", FOUR), **changes)
        workspace = open_workspace(tmp_path / home)
        if not workspace.ledger.runs():
            config = plan.config.model_dump(mode="json")
            workspace.ledger.create_run("run-1", "task-1", config, plan.to_json())
        seen = []

        def observe(kind, data):
            if kind != "training":
                seen.append(kind)
                if copies:  # as a process that dies here would leave it
                    shutil.copytree(workspace.home, tmp_path / f"{home}-{len(seen)}")
                if len(seen) == die_at:
                    raise Killed

        used = backend or imagined()
        made = Federation(plan, workspace.store, workspace.ledger, used, workspace.home, observe)
        made._collector.clock = lambda: used.now
        return made

    return make


def events(run, *kinds):
    found = run.ledger.events("run-1")
    return [e.data for e in found if e.kind in kinds] if kinds else found


def leaves(run, version):
    return run.store.version(version).recipe["updates"]


def test_who_goes_too_far_is_refused_and_the_run_goes_on(federation, imagined):
    class Far(type(imagined())):
        def answer(self, asked):
            update = super().answer(asked)
            if asked.client == "b":
                far = {n: t + 100 for n, t in update.tensors.items()}
                update = replace(update, tensors=far)
            return update

    run = federation(backend=Far(imagined().first), max_update_norm=50, rounds=2)
    version = run.run()

    assert [leaf["client"] for leaf in leaves(run, version)] == ["a", "c", "d"]
    refused = events(run, "refused")
    assert [(e["client"], e["round"]) for e in refused] == [("b", 1)]  # then it rests
    assert all("allowed 50 (max_update_norm)" in e["reason"] for e in refused)


def test_the_cohort_is_written_down_before_anybody_is_asked_and_the_set_before_it_counts(
    federation,
):
    run = federation(rounds=1, cohort=2)
    version = run.run()

    kinds = [e.kind for e in events(run)]
    assert kinds == [
        "queued",
        "initialising",
        "started",
        "round",
        "assigned",
        *["accepted"] * 2,
        "closed",
        "committed",
        "completed",
    ]
    [opened], [closed] = events(run, "round"), events(run, "closed")
    assert opened["cohort"] == events(run, "assigned")[0]["assigned"]
    assert (opened["goal"], opened["quorum"]) == (2, 1)
    named = [
        {k: leaf[k] for k in ("client", "digest", "weight", "base")}
        for leaf in leaves(run, version)
    ]
    assert [{k: v for k, v in one.items() if k != "round"} for one in closed["updates"]] == named
    assert [one["weight"] for one in named] == [1.0, 1.0]


def test_a_round_closes_with_its_goal_and_gives_up_who_was_asked_besides(federation, imagined):
    backend = imagined(delays={("b", 1): 50})
    run = federation(backend=backend, rounds=1, cohort={"size": 3, "over_provision": 0.34})
    version = run.run()

    [closed] = events(run, "closed")
    assert [leaf["client"] for leaf in leaves(run, version)] == ["a", "c", "d"]
    assert (closed["spare"], closed["missed"], closed["late"]) == (["b"], [], [])
    assert backend.given_up == ["b"]
    assert backend.now < 50
    assert History().after_all(events(run)).faults == {}


def test_at_the_deadline_a_round_makes_do_with_its_quorum(federation, imagined):
    backend = imagined(delays={("b", 1): 50})
    run = federation(backend=backend, rounds=1, quorum=3, deadline_s=5)
    version = run.run()

    [closed] = events(run, "closed")
    assert [leaf["client"] for leaf in leaves(run, version)] == ["a", "c", "d"]
    assert closed["missed"] == ["b"]
    assert 5 < backend.now < 10
    assert History().after_all(events(run)).faults.keys() == {"b"}


def test_below_its_quorum_a_round_fails_and_goes_on_when_it_is_resumed(federation, imagined):
    delays = {("b", 1): 50, ("c", 1): 50}
    settings = {"rounds": 2, "quorum": 3, "deadline_s": 5}
    run = federation(backend=imagined(delays=delays), **settings)
    with pytest.raises(
        RoundFailed, match=r"round 1: 2 of the 3 updates .*b: missed the round's dea"
    ):
        run.run()

    backend = imagined()
    again = federation(backend=backend, **settings)
    assert again.run() == federation("whole", **settings).run()
    assert ("a", 1) not in backend.asked  # it had answered


def test_a_failure_is_tried_again_and_then_counts(federation, imagined):
    backend = imagined(fails={"a": 1, "b": 2})
    run = federation(backend=backend, rounds=1)
    version = run.run()

    assert [leaf["client"] for leaf in leaves(run, version)] == ["a", "c", "d"]
    assert [e["client"] for e in events(run, "retried")] == ["a", "b"]
    assert [e["client"] for e in events(run, "refused")] == ["b"]
    assert federation("whole", rounds=1, clients_=("a", "c", "d")).run() == version
    none = federation("none", backend=imagined(fails={"a": 1}), rounds=1, retries=0)
    none.run()
    assert events(none, "retried") == []


def test_a_refusal_that_is_final_is_not_asked_for_again(federation, imagined):
    backend = imagined()
    answer = backend.answer
    no = Failure("b", 1, "the site's policy says no", final=True)
    backend.answer = lambda asked: no if asked.client == "b" else answer(asked)
    run = federation(backend=backend, rounds=1, retries=3)
    run.run()

    assert events(run, "retried") == []
    assert [e["client"] for e in events(run, "refused")] == ["b"]


def test_an_initialisation_and_an_evaluation_are_tried_again_as_clients_are(federation, imagined):
    wanted = federation("whole", rounds=1, evaluate=HELD_BACK).run()
    run = federation(backend=imagined(fails={"": 2}), rounds=1, evaluate=HELD_BACK, retries=2)
    assert run.run() == wanted
    assert [e["action"] for e in events(run, "retried")] == ["init", "init"]
    none = federation("none", backend=imagined(fails={"": 1}), rounds=1, retries=0)
    with pytest.raises(RoundFailed, match="the adapter cannot be initialised: out of memory"):
        none.run()


def test_a_client_that_keeps_failing_is_asked_less_and_less_and_then_no_more(federation, imagined):
    backend = imagined(fails={"b": 99})
    run = federation(backend=backend, rounds=12, retries=0, quarantine_after=3, cohort=4)
    run.run()

    asked = [e["round"] for e in events(run, "round") if "b" in e["cohort"]]
    assert asked == [1, 3, 6]  # out of 2; out of 4 and 5; then quarantined


def test_a_released_client_is_asked_again(federation, imagined):
    run = federation(rounds=6, retries=0, quarantine_after=1, backend=imagined(fails={"b": 1}))

    def releasing(kind, data):
        if kind == "committed" and data["round"] == 3:
            run.ledger.record("run-1", "forgiven", {"client": "b"})  # as another process would

    run.observe = releasing
    run.run()
    assert [e["round"] for e in events(run, "round") if "b" in e["cohort"]] == [1, 4, 5, 6]


def test_a_late_update_counts_in_the_next_round_by_its_age(federation, imagined, tensors):
    backend = imagined(delays={("a", 1): 1, ("b", 2): 1, ("c", 2): 1, ("d", 2): 1})
    run = federation(
        backend=backend,
        strategy="ffa-lora",
        rounds=2,
        cohort={"size": 3, "over_provision": 0.34},
        late="keep",
        staleness={"power": 1},
    )
    version = run.run()

    first, second = events(run, "closed")
    assert first["late"] == ["a"]
    assert {(u["client"], u["round"], u["weight"]) for u in second["updates"]} >= {("a", 1, 0.5)}
    assert "a" not in events(run, "round")[1]["cohort"]  # it still trained
    # the arithmetic: B = B1 + (sum n_i w_i change_i) / sum n_i
    parent = run.store.version(version).parents[0].id
    start = run.store.version(parent).parents[0].id
    name = "q.lora_B.weight"
    now, old, after = (run.store.tensors(v)[name].double() for v in (parent, start, version))
    total, moved = 0, torch.zeros_like(now)
    for leaf in leaves(run, version):
        base = old if leaf["base"] == start else now
        seed = 1 if leaf["base"] == start else 2
        sent = run._commits.of(leaf["base"]).state
        [asked] = run._assignments(seed, leaf["base"], [run._collector.people[leaf["client"]]])
        assert sent.adapter[name].double().equal(base)
        trained = backend.answer(asked).tensors[name].double()
        moved += leaf["num_examples"] * leaf["weight"] * (trained - base)
        total += leaf["num_examples"]
    assert torch.allclose(after, now + moved / total, atol=1e-6)
    assert torch.equal(run.store.tensors(version)["q.lora_A.weight"], tensors()["q.lora_A.weight"])


def test_who_is_late_for_too_long_is_waited_for_no_more_and_its_answer_is_ignored(
    federation, imagined
):
    run = federation(
        backend=imagined(delays={("a", 1): 40, ("b", 4): 60}),
        **KEEP | {"rounds": 6, "cohort": {"size": 3, "over_provision": 0.34}, "quorum": 1},
        staleness={"max_staleness": 2},
        deadline_s=10,
    )
    run.run()

    [refused] = [e for e in events(run, "refused") if e["client"] == "a"]
    assert refused["round"] == 1
    assert "3 versions old, allowed 2" in refused["reason"]
    assert ("a", 1) not in {
        (u["client"], u["round"]) for e in events(run, "closed") for u in e["updates"]
    }


def test_what_comes_too_late_is_not_taken_for_the_answer_to_what_was_asked_since(
    federation, imagined
):
    backend = imagined(delays={("a", 1): 38, ("a", 6): 8})
    run = federation(
        backend=backend,
        clients_=("a", "b"),
        **KEEP | {"rounds": 6, "cohort": 2, "quorum": 1},
        staleness={"max_staleness": 2},
        deadline_s=10,
        retries=0,
    )
    run.run()

    [refused] = events(run, "refused")
    assert (refused["client"], refused["round"]) == ("a", 1)
    assert "3 versions old" in refused["reason"]
    assert ("a", 6) in {(e["client"], e["round"]) for e in events(run, "accepted")}


@pytest.mark.parametrize("settings", [KEEP, FEDBUFF], ids=["quorum and late", "asynchronous"])
def test_what_was_decided_stays_decided_wherever_the_process_dies(federation, imagined, settings):
    """Killed at every event in turn: decided rounds come out as they did, none is decided twice."""
    whole = federation("whole", imagined(SLOW), copies=True, **settings)
    whole.run()
    wanted = {e["round"]: e["version"] for e in events(whole, "committed")}
    decided = {e["round"]: e for e in events(whole, "closed")}
    assert any(u["weight"] < 1 for e in decided.values() for u in e["updates"])

    for at in range(1, len(events(whole))):  # the last says that it is completed
        resumed = federation(f"whole-{at}", imagined(SLOW), **settings)
        before = events(resumed, "closed")
        resumed.run()
        closed = events(resumed, "closed")
        committed = {e["round"]: e["version"] for e in events(resumed, "committed")}
        assert closed[: len(before)] == before == [decided[e["round"]] for e in before]
        assert [e["round"] for e in closed] == list(wanted)
        assert all(committed[e["round"]] == wanted[e["round"]] for e in before), at
        opened = [e["round"] for e in events(resumed, "round")]
        assert opened == list(wanted)  # whom a round asks is decided once
        digests = [u["digest"] for e in closed for u in e["updates"]]
        assert len(set(digests)) == len(digests)  # nothing is aggregated twice


def test_without_deadlines_every_crash_ends_at_the_same_version(federation):
    settings = {"rounds": 2, "cohort": 0.75, "strategy": "fedsvd"}
    whole = federation("whole", copies=True, **settings)
    wanted = whole.run()

    for at in range(1, len(events(whole))):
        assert federation(f"whole-{at}", **settings).run() == wanted, at


@pytest.mark.parametrize("settings", [KEEP, FEDBUFF], ids=["quorum and late", "asynchronous"])
def test_an_update_that_is_gone_from_disk_is_had_again(federation, imagined, tmp_path, settings):
    whole = federation("whole", imagined(SLOW), **settings)
    whole.run()
    at = [e.kind for e in events(whole)].index("closed") + 1
    with pytest.raises(Killed):
        federation("killed", imagined(SLOW), die_at=at, **settings).run()
    for file in (tmp_path / "killed" / "runs" / "run-1").glob("round-*/*.safetensors"):
        file.unlink()

    resumed = federation("killed", imagined(SLOW), **settings)
    resumed.run()
    assert events(resumed, "committed")[0] == events(whole, "committed")[0]


def test_an_update_that_comes_back_different_is_not_taken_in_its_place(
    federation, imagined, tmp_path
):
    with pytest.raises(Killed):
        federation("killed", die_at=9, rounds=1).run()
    (tmp_path / "killed" / "runs" / "run-1" / "round-1" / "a.safetensors").unlink()
    other = imagined()
    honest = other.answer
    other.answer = lambda asked: honest(
        asked.__class__(**{f: getattr(asked, f) for f in asked.__slots__} | {"seed": 5})
    )

    run = federation("killed", other, rounds=1)
    with pytest.raises(RoundFailed, match=r"an update of a that is gone.*not the one that"):
        run.run()


def test_an_asynchronous_run_aggregates_whenever_its_buffer_is_full(federation, imagined):
    run = federation(backend=imagined(SLOW), **FEDBUFF)
    run.run()

    closed = events(run, "closed")
    assert [len(e["updates"]) for e in closed] == [2] * 3
    for e in closed:
        for u in e["updates"]:
            assert u["weight"] == (1 + e["round"] - u["round"]) ** -0.5
    waiting = History()
    most = 0
    for event in events(run):
        waiting = waiting.after(event)
        most = max(most, len(waiting.pending))
    assert most == 3


def test_an_asynchronous_run_below_its_quorum_asks_the_others_when_it_goes_on(federation, imagined):
    settings = FEDBUFF | {"rounds": 1, "quorum": 2, "retries": 0}
    run = federation(backend=imagined(fails=dict.fromkeys("abc", 1)), **settings)
    with pytest.raises(RoundFailed, match="1 of the 2 updates"):
        run.run()

    backend = imagined()
    version = federation(backend=backend, **settings).run()
    assert ("d", 1) not in backend.asked
    assert len(leaves(run, version)) == 2
    assert "d" in [leaf["client"] for leaf in leaves(run, version)]


def test_an_asynchronous_run_of_clients_that_fail_goes_on_with_its_quorum(federation, imagined):
    backend = imagined(fails=dict.fromkeys("abc", 99))
    run = federation(backend=backend, **FEDBUFF | {"rounds": 1})
    version = run.run()

    assert [leaf["client"] for leaf in leaves(run, version)] == ["d"]


def test_a_run_stops_when_its_metric_does_and_names_the_best(federation, imagined):
    scores = {r: {"accuracy": a} for r, a in enumerate([0.3, 0.6, 0.5, 0.6, 0.4, 0.9], 1)}
    settings = {
        "rounds": 6,
        "evaluate": HELD_BACK,
        "stop": {"metric": "accuracy", "patience": 2},
        "select": "best",
    }
    run = federation(backend=imagined(scores=scores), **settings)
    version = run.run()

    committed = {e["round"]: e["version"] for e in events(run, "committed")}
    assert list(committed) == [1, 2, 3, 4]
    assert version == committed[2]
    assert run.store.version("task-1").id == version
    assert run.ledger.run("run-1").version == version
    [stopped] = events(run, "stopped")
    assert stopped["reason"] == "accuracy did not improve in 2 evaluations"
    last = federation("last", imagined(scores=scores), **settings | {"select": "last"})
    assert last.run() != version


def test_a_run_stops_when_what_its_clients_tell_does(federation, imagined):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 0.5}
    backend = imagined()
    answer = backend.answer

    def telling(asked):
        update = answer(asked)
        if asked.action != "train":
            return update
        return replace(update, metrics={"loss": losses[asked.round] + 0.1 * ord(asked.client)})

    backend.answer = telling
    stop = {"metric": "train_loss", "patience": 2}
    run = federation(backend=backend, rounds=6, stop=stop, select="best")
    version = run.run()

    committed = {e["round"]: e["version"] for e in events(run, "committed")}
    assert list(committed) == [1, 2, 3, 4]
    assert version == committed[2]
    [stopped] = events(run, "stopped")
    assert stopped["reason"] == "train_loss did not improve in 2 rounds"


def test_a_run_that_was_killed_before_an_evaluation_makes_it_up(federation, imagined):
    scores = {r: {"accuracy": 0.5} for r in range(1, 7)}
    settings = {"rounds": 6, "evaluate": HELD_BACK, "stop": {"metric": "accuracy", "patience": 2}}
    whole = federation("whole", imagined(scores=scores), copies=True, **settings)
    wanted = whole.run()

    for at, event in enumerate(events(whole), 1):
        if event.kind in ("committed", "evaluated", "stopped"):
            run = federation(f"whole-{at}", imagined(scores=scores), **settings)
            assert run.run() == wanted, at
            assert [e["round"] for e in events(run, "evaluated")] == [1, 2, 3]


def test_the_memory_of_a_task_is_of_the_version_that_is_named(federation, imagined):
    scores = {r: {"accuracy": a} for r, a in enumerate([0.6, 0.9, 0.5], 1)}
    settings = {"rounds": 3, "evaluate": HELD_BACK, "select": "best", "regularizers": ["o-lora"]}
    run = federation(backend=imagined(scores=scores), **settings)
    version = run.run()

    [parent] = run.store.version(version).parents
    assert parent.id == events(run, "committed")[1]["version"]
    best, result = run.store.tensors(parent.id), run.store.tensors(version)
    assert all(torch.equal(best[n], result[n]) for n in result)
    memory = run.store.memory(version)
    assert memory
    assert run.store.memory(parent.id) == {}
    assert run.store.version(version).recipe["kind"] == "final"


@pytest.mark.parametrize(("wish", "error"), [("pause", Paused), ("cancel", Cancelled)])
def test_a_run_heeds_what_people_want_between_results_and_goes_on_from_there(
    federation, imagined, wish, error
):
    run = federation(rounds=2)
    run.wanted = lambda: wish if len(events(run, "accepted")) == 2 else "run"
    with pytest.raises(error, match="run-1 is"):
        run.run()

    assert len(events(run, "accepted")) == 2
    backend = imagined()
    assert federation(backend=backend, rounds=2).run() == federation("whole", rounds=2).run()
    assert [c for c, r in backend.asked if r == 1] == ["c", "d"]


def test_a_pause_is_heeded_while_everybody_trains(federation, imagined):
    backend = imagined(delays={(c, 1): 1000 for c in FOUR})
    run = federation(backend=backend, rounds=1)
    run.wanted = lambda: "pause" if backend.now > 3 else "run"

    with pytest.raises(Paused):
        run.run()
    assert backend.now == 4
    assert sorted(backend.given_up) == list(FOUR)


def test_a_pause_is_heeded_while_a_version_is_evaluated(federation, imagined):
    backend = imagined({("", 1): 1000})
    run = federation(backend=backend, rounds=1, evaluate=HELD_BACK)
    run.wanted = lambda: "pause" if backend.now > 20 else "run"

    with pytest.raises(Paused):
        run.run()
    assert backend.now == 21
    assert federation(rounds=1, evaluate=HELD_BACK).run() == run._history().version


def test_the_log_is_json_without_anybody_s_data(federation, imagined):
    run = federation(backend=imagined(SLOW), **KEEP)
    run.run()

    text = json.dumps([e.data for e in events(run)])
    assert "jsonl:" not in text


def test_the_quarantined_are_listed_and_released_by_anybody(federation, imagined):
    run = federation(
        backend=imagined(fails={"b": 1, "c": 2}), rounds=1, retries=0, quarantine_after=1
    )
    run.run()

    assert quarantined_in(run.ledger, "run-1") == ("b", "c")
    release(run.ledger, "run-1", "b")
    assert quarantined_in(run.ledger, "run-1") == ("c",)
    with pytest.raises(NotAtFault, match="'b' has no faults in run run-1; these have: c"):
        release(run.ledger, "run-1", "b")


def test_the_faults_that_people_see_are_those_of_the_whole_log(federation, imagined):
    fails = {"b": 3, "c": 1}
    run = federation(backend=imagined(fails=fails), rounds=5, retries=0, die_at=20)
    with pytest.raises(Killed):
        run.run()  # in the middle of a round

    whole = History().after_all(events(run))
    assert whole.round > 0
    assert whole.faults
    assert _recent(run.ledger, "run-1").faults == whole.faults
