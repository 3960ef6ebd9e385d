"""The use cases, in this process, on a tiny encoder and real training."""

import json

import pytest
import torch

from clients import models
from clients.assignment import DataSpec, PluginChoice
from orchestrator import service
from orchestrator.backends.base import Failure
from orchestrator.backends.inline import InlineBackend
from orchestrator.config import BadConfig
from orchestrator.federation import RoundFailed
from orchestrator.loggers import LOGGERS
from orchestrator.observers.webhook import BadWebhook
from storage.ledger import UnknownRun
from strategies.plugins import Plugin, UnknownPlugin

DP = {"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7}


class Dying:
    """A backend that runs inline until round ``last`` and then stops the process's work."""

    def __init__(self, last, error=KeyboardInterrupt):
        self.last, self.error, self.inner = last, error, InlineBackend()

    def run(self, assignments, started, stepped=None):
        yield from self.inner.run(map(self.checked, assignments), started)

    def checked(self, assignment):
        if assignment is not None and assignment.round > self.last:
            raise self.error
        return assignment

    def close(self):
        pass


class Failing:
    """A backend at which the clients in ``names`` fail."""

    def __init__(self, *names):
        self.names, self.inner = names, InlineBackend()

    def run(self, assignments, started, stepped=None):
        for a in assignments:
            if a is not None and a.client in self.names:
                yield Failure(a.client, a.round, "out of memory")
            else:
                yield from self.inner.run([a], started)

    def close(self):
        pass


def kinds(home, run=None):
    return [e.kind for e in home.ledger.events(run or home.ledger.runs()[0].id)]


def test_a_run_ends_in_a_named_version_with_its_rounds_behind_it(home, tiny):
    version = service.launch(home, tiny(rounds=2))

    found = home.store.version("task-1")
    record = home.ledger.runs()[0]
    assert found.id == version
    assert (record.status, record.round, record.version) == ("completed", 2, version)
    history = list(home.store.lineage(version).nodes.values())
    assert [v.recipe["kind"] for v in history] == ["round", "round", "start"]
    assert [leaf["client"] for leaf in found.recipe["updates"]] == ["a", "b"]
    assert kinds(home).count("accepted") == 4


@pytest.mark.parametrize("privacy", [None, DP])
def test_the_same_config_gives_the_same_version(home, tiny, privacy):
    config = tiny(privacy=privacy, strategy="fedsvd")

    assert service.launch(home, config) == service.launch(home, config)
    assert len(home.ledger.runs()) == 2


@pytest.mark.parametrize("privacy", [None, DP])
def test_a_run_that_was_stopped_goes_on_to_the_version_it_would_have_reached(home, tiny, privacy):
    config = tiny(rounds=2, privacy=privacy, strategy="fedsvd")
    whole = service.launch(home, config)
    with pytest.raises(KeyboardInterrupt):
        service.launch(home, config, backend=Dying(last=1))
    stopped = home.ledger.runs()[0]
    spent = len(home.ledger.spends_of_run(stopped.id))

    again = service.resume(home, stopped.id)

    assert (stopped.status, stopped.round, stopped.error) == ("failed", 1, "KeyboardInterrupt")
    assert again == whole
    assert spent == len(home.ledger.spends_of_run(stopped.id)) == (4 if privacy else 0)
    assert home.ledger.run(stopped.id).status == "completed"


def test_a_run_that_is_done_stays_as_it_is(home, tiny):
    version = service.launch(home, tiny())
    run = home.ledger.runs()[0].id
    before = kinds(home)

    assert service.resume(home, run) == version
    assert kinds(home) == before


def test_a_promotion_is_in_the_log_of_the_run_that_made_the_version(home, tiny):
    version = service.launch(home, tiny())
    service.promote(home, "task-1", "production", "task-1:v1", why="scores best")

    event = home.ledger.events(home.ledger.runs()[0].id)[-1]
    assert event.kind == "promoted"
    assert event.data.items() >= {"alias": "production", "version": version}.items()


def test_any_error_of_the_coordinator_is_on_the_run_s_record(home, tiny):
    with pytest.raises(ZeroDivisionError):
        service.launch(home, tiny(), backend=Dying(last=-1, error=ZeroDivisionError("oh")))

    record = home.ledger.runs()[0]
    assert (record.status, record.error) == ("failed", "oh")


def test_a_client_that_fails_is_left_out_with_its_reason(home, tiny):
    version = service.launch(home, tiny(), backend=Failing("a"))

    [leaf] = home.store.version(version).recipe["updates"]
    refused = [e.data for e in home.ledger.events(home.ledger.runs()[0].id) if e.kind == "refused"]
    assert leaf["client"] == "b"
    assert refused == [{"client": "a", "round": 1, "reason": "out of memory", "fault": True}]


def test_a_round_without_any_update_fails_and_can_be_resumed(home, tiny):
    with pytest.raises(RoundFailed, match=r"\(a: out of memory; b: out of memory\).*--resume"):
        service.launch(home, tiny(), backend=Failing("a", "b"))
    run = home.ledger.runs()[0].id

    assert service.resume(home, run) == service.launch(home, tiny())


def test_a_diverging_client_is_refused_by_the_tensor(home, tiny):
    wild = {"name": "sgd", "lr": 1e38}

    with pytest.raises(RoundFailed, match="non-finite values"):
        service.launch(home, tiny(optimizer=wild, steps=4))


def test_resuming_an_unknown_run_is_refused(home):
    with pytest.raises(UnknownRun):
        service.resume(home, "no-such-run")


def test_a_private_run_spends_before_it_trains_and_reports_no_loss(home, tiny):
    version = service.launch(home, tiny(privacy=DP))

    run = home.ledger.runs()[0].id
    accepted = [e.data for e in home.ledger.events(run) if e.kind == "accepted"]
    assert [a["client"] for a in accepted] == ["a", "b"]
    assert all(a.keys() == {"client", "round", "base", "digest", "bytes"} for a in accepted)
    assert kinds(home).index("assigned") < kinds(home).index("accepted")
    assert len(home.ledger.spends_of_run(run)) == 2
    recipe = home.store.version(version).recipe
    assert recipe["private"] is False  # insecure_seed
    assert [e.population for e in service.lineage(home, version).epsilons] == ["a", "b"]


def test_masked_rows_of_the_head_stay_bit_identical_through_a_run(home, tiny):
    options = {"name": "adamw", "lr": 0.05, "weight_decay": 0.5}
    version = service.launch(
        home, tiny(task_labels=["cat", "dog"], rounds=2, optimizer=options, privacy=DP)
    )

    first = [v.id for v in home.store.lineage(version).nodes.values()][-1]
    before, after = home.store.tensors(first), home.store.tensors(version)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(before[name][2:], after[name][2:])
        assert not torch.equal(before[name][:2], after[name][:2])


def test_a_second_task_is_stacked_merged_scored_and_exported(home, tiny, tmp_path, notes):
    first = service.launch(home, tiny(task_labels=["cat", "dog"]))
    method = {"name": "o-lora", "form": "hard"}
    second = service.launch(
        home,
        tiny(
            name="task-2",
            task_labels=["model", "rank"],
            start="stack",
            start_from="task-1",
            strategy="fedsvd",
            regularizers=[method],
        ),
    )
    merged = service.merge(home, ["task-1", "task-2"], PluginChoice("cat"), "both")
    files = service.export(home, "both", tmp_path / "peft").files

    data = DataSpec(notes("test", size=8))
    alike = [service.evaluate(home, ref, data) for ref in ("both", "task-2")]
    assert [e.num_examples for e in alike] == [8, 8]
    assert alike[0].metrics["loss"] == pytest.approx(alike[1].metrics["loss"], rel=1e-5)
    assert {p.id for p in home.store.version(merged).parents} == {first, second}
    assert home.store.version(second).recipe["stack"] == [first]
    assert {f.name for f in files} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_merge_of_adapters_on_different_layers_can_be_scored(home, tiny, notes):
    for name, layer in (("low", 0), ("high", 1)):
        adapter = {"name": "lora", "r": 2, "layers": [layer], "rank_pattern": {"query": 1}}
        service.launch(home, tiny(name=name, adapter=adapter))
    allow = service.Allow(union=True)
    service.merge(home, ["low", "high"], PluginChoice("cat"), "both", allow=allow)

    scored = service.evaluate(home, "both", DataSpec(notes()))

    assert 0 <= scored.metrics["accuracy"] <= 1


def test_a_version_scores_only_what_it_has_seen(home, tiny, notes):
    service.launch(home, tiny(task_labels=["cat", "dog"]))

    seen = service.evaluate(home, "task-1", DataSpec(notes(), labels=("cat", "dog")))
    unseen = service.evaluate(home, "task-1", DataSpec(notes(), labels=("rank",)))

    assert seen.metrics.keys() == {"accuracy", "macro_f1", "loss"}
    # told that it can be nothing else, even who has never heard of it knows
    assert unseen.metrics == {"accuracy": 0.0, "macro_f1": 0.0, "task_accuracy": 1.0}


def test_a_data_set_without_the_labels_cannot_be_scored(home, tiny, notes):
    service.launch(home, tiny())
    data = DataSpec(notes("cats", labels=("cat",)), labels=("dog",))

    with pytest.raises(service.EvaluationFailed, match="holds no example of the asked labels"):
        service.evaluate(home, "task-1", data)


def test_a_base_model_that_moved_is_found_by_hash(home, tiny, tiny_encoder, notes, tmp_path):
    version = service.launch(home, tiny())
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_encoder)
    for note in (home.home / "bases").iterdir():
        note.unlink()

    assert home.store.version(version).recipe["model"]["id"] is None
    with pytest.raises(models.ModelNotFound, match="--model DIR"):
        service.evaluate(home, version, DataSpec(notes()))
    assert service.evaluate(home, version, DataSpec(notes()), str(moved)).num_examples == 12


def test_weights_and_number_of_versions_must_agree(home):
    with pytest.raises(BadConfig, match="2 versions, 1 weights"):
        service.merge(home, ["a", "b"], PluginChoice("cat"), "both", [1.0])
    with pytest.raises(BadConfig, match="at least two versions"):
        service.merge(home, ["a"], PluginChoice("cat"), "both")


def test_an_unknown_merge_says_what_the_name_is(home):
    with pytest.raises(UnknownPlugin, match="'fedsvd' is a strategy"):
        service.merge(home, ["a", "b"], PluginChoice("fedsvd"), "both")


def test_what_a_population_spent_is_said_in_words(home, tiny):
    assert service.spent_by_population(home, "a") == {"epsilon": 0.0, "text": "nothing"}
    service.launch(home, tiny(privacy=DP))

    spent = service.spent_by_population(home, "a")

    assert spent["epsilon"] > 0
    assert spent["text"].endswith("in 1 rounds")
    assert json.dumps(spent)


# --- what watches a run -----------------------------------------------------------------------


class Breaking:
    """A logger that fails whatever it is asked."""

    def __init__(self, run):
        self.run = run

    def log_params(self, config):
        raise ConnectionError("no server")

    def log_metrics(self, values, step):
        raise ConnectionError("no server")

    def close(self, completed):
        raise ConnectionError("no server")


@pytest.fixture
def breaking(monkeypatch):
    """Have a logger called ``breaking``."""
    plugin = Plugin("logger", "breaking", Breaking, "Fails.", context=("run",))
    monkeypatch.setitem(LOGGERS._plugins, "breaking", plugin)


def test_loggers_and_notifications_change_no_version(home, tiny, breaking, monkeypatch, caplog):
    monkeypatch.setenv("WEFT_WEBHOOK", "http://127.0.0.1:9/nobody")
    plain = service.launch(home, tiny())

    watched = service.launch(
        home, tiny(loggers=["breaking"], notify={"url_env": "WEFT_WEBHOOK", "on": ["completed"]})
    )

    assert watched == plain
    assert caplog.text.count("logger breaking failed") == 1
    assert home.ledger.runs()[0].config["notify"]["url_env"] == "WEFT_WEBHOOK"


def test_a_webhook_without_an_address_is_refused_before_there_is_a_run(home, tiny, monkeypatch):
    monkeypatch.delenv("WEFT_WEBHOOK", raising=False)
    with pytest.raises(BadWebhook, match="WEFT_WEBHOOK is not set"):
        service.launch(home, tiny(notify={"url_env": "WEFT_WEBHOOK"}))

    assert home.ledger.runs() == []


def test_a_run_shows_what_was_done_and_spent_before_and_that_it_failed(home, tiny):
    facts, kinds_seen = [], []

    def observe(kind, data):
        kinds_seen.append(kind)
        if kind in ("run", "committed"):
            facts.append((kind, data.get("done"), sum(e.epsilon for e in data["spent"]().values())))

    with pytest.raises(KeyboardInterrupt):
        service.launch(home, tiny(rounds=2, privacy=DP), observe, Dying(last=1))
    assert kinds_seen[-1] == "failed"
    service.resume(home, home.ledger.runs()[0].id, observe)

    first, one, again, two = facts
    assert first == ("run", 0, 0)
    # round 2's spends were reserved before the run was stopped, so they count already
    assert again == ("run", 1, two[2])
    assert 0 < one[2] < two[2]


def test_an_aggregation_is_shown_between_the_last_answer_and_the_commit(home, tiny):
    seen = []
    service.launch(home, tiny(), lambda kind, data: seen.append(kind))

    assert seen[-4:] == ["closed", "aggregated", "committed", "completed"]


def test_an_accepted_update_says_its_size(home, tiny, kept):
    service.launch(home, tiny(retention="all"))

    run = home.ledger.runs()[0].id
    sizes = {
        e.data["client"]: e.data["bytes"]
        for e in home.ledger.events(run)
        if "bytes" in e.data and "client" in e.data
    }
    lengths = {client: len(home.blobs.fetch(one)) for (_, client), one in kept(home).items()}
    assert sizes == lengths
    assert len(sizes) == 2


def test_a_round_without_updates_says_that_it_is_below_its_quorum(home, tiny):
    with pytest.raises(RoundFailed):
        service.launch(home, tiny(), backend=Failing("a", "b"))

    assert kinds(home)[-2:] == ["below quorum", "failed"]
