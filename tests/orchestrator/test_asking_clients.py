"""``weft eval --clients``: scores of what clients hold out, exact or noised and charged."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clients import data
from clients.accounting import epsilon
from clients.assignment import DataSpec, ModelSpec
from clients.evaluate import Evaluation
from clients.keys import data_key, run_folder
from clients.noise import MARGIN
from orchestrator import asking_clients, gating, service
from orchestrator.asking_clients import Noised, NotHeldOut, Question, ScoresTell, selector
from orchestrator.backends.inline import InlineBackend
from orchestrator.client_scores import refusal, table
from orchestrator.config import BadConfig, parse_config
from orchestrator.epsilons import spend_from_row
from orchestrator.gate_file import parse_gate
from orchestrator.gate_setting import set_gate
from orchestrator.versions import EvaluationFailed
from orchestrator.workspace import open_workspace
from storage.ledger import ClientRecord

LABELS = ("cat", "dog", "model", "rank")
NOISED = Noised(epsilon=50.0, delta=1e-3)


def write(path, start, size):
    """Write records that nobody else has; return their URI."""
    labels = [LABELS[i % 4] for i in range(size)]
    rows = [{"text": f"{x} {start + i} learns", "label": x} for i, x in enumerate(labels)]
    path.write_text("".join(json.dumps({**row, "ward": "w"}) + "\n" for row in rows))
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_encoder):
    """A home with a version, and two clients: one holds out a quarter, one another data set."""
    folder = tmp_path_factory.mktemp("site")
    home = open_workspace(folder / "home")
    for name, start, holdout in (("a", 100, "0.25"), ("b", 300, write(folder / "t.jsonl", 500, 8))):
        uri = write(folder / f"{name}.jsonl", start, 40)
        service.register_client(home, ClientRecord(name, uri, name, holdout=holdout))
    config = {
        **{"name": "task-1", "labels": list(LABELS), "rounds": 1, "steps": 2, "batch_size": 4},
        "model": {"id": str(tiny_encoder), "max_length": 16},
        "adapter": {"name": "lora", "r": 2, "layers": [0]},
        **{"clients": {"select": {}}, "backend": "inline"},
    }
    service.launch(home, parse_config(config))
    home.close()
    return folder / "home"


@pytest.fixture
def site(made, tmp_path, monkeypatch):
    """A copy of that home, which is the one that commands find."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "home"))
    return open_workspace(tmp_path / "home")


def exactly(home, spec, key=None):
    """Return the exact scores of the version on some records, and their number."""
    found = service.evaluate(home, "task-1", spec)
    return found.metrics, found.num_examples


def held_by_a(home, tmp_path):
    """Return the records that a holds out, in a file of their own."""
    record = home.ledger.client("a")
    whole = DataSpec(record.data)
    model = ModelSpec("m", "classification", labels=LABELS)
    spec = replace(whole, part="holdout", holdout=0.25)
    kept = {e.text for e in data.examples(spec, model, data_key(home.sites))}
    text = Path(record.data.removeprefix("jsonl:")).read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines if x["text"] in kept))
    return DataSpec(f"jsonl:{path}")


def test_exact_scores_are_those_of_what_is_held_out_weighted_by_examples(site, read, tmp_path):
    found = read("eval", "task-1", *("--clients", "all"), "--accept-unbounded", "--reason", "test")
    own = {row["client"]: row for row in found["rows"]}
    expected = {
        "a": exactly(site, held_by_a(site, tmp_path)),
        "b": exactly(site, DataSpec(site.ledger.client("b").holdout)),
    }
    for client, (metrics, size) in expected.items():
        assert own[client]["num_examples"] == size
        for metric in ("accuracy", "loss", "macro_f1"):
            assert own[client]["scores"][metric]["value"] == pytest.approx(metrics[metric])
    sizes = {client: size for client, (_, size) in expected.items()}
    mean = sum(m["loss"] * n for m, n in expected.values()) / sum(sizes.values())
    assert found["mean"]["loss"] == {"value": pytest.approx(mean), "error": 0.0}
    losses = {client: metrics["loss"] for client, (metrics, _) in expected.items()}
    assert found["worst"]["loss"] == max(losses, key=losses.get)
    [bare] = {one.run for one in site.ledger.unprotected.of(["a", "b"]) if one.reason == "test"}
    assert bare.startswith("eval-")
    assert site.ledger.spends("a") == []


def test_exact_scores_of_private_data_are_refused_unless_that_is_agreed_to(site, refused):
    said = refused("eval", "task-1", "--clients", "a,b")
    assert said.startswith("a: what a model scores on data tells of them")
    assert "--accept-unbounded --reason WHY" in said


def test_noised_scores_are_charged_before_anything_is_sent(site, tmp_path):
    order = []

    class Watching(InlineBackend):
        def run(self, assignments, started, stepped=None):
            order.append([row.population for row in site.ledger.spends("a")])
            return super().run(assignments, started)

    found = asking_clients.score(site, "task-1", Question("all", NOISED), backend=Watching())
    assert order == [["a"]]
    assert [row.population for row in site.ledger.spends("b")] == ["b"]
    [row] = site.ledger.spends("a")
    assert (row.mechanism, row.unit, row.adjacency) == ("gaussian", "example", "add-remove")
    assert (row.parameters["sample_rate"], row.parameters["steps"]) == (1.0, 1.0)
    assert epsilon([spend_from_row(row)], NOISED.delta) <= NOISED.epsilon
    assert found.private
    noise = math.sqrt(3) * row.parameters["noise_multiplier"] * MARGIN
    held = Path(held_by_a(site, tmp_path).uri.removeprefix("jsonl:")).read_text()
    sizes = {"a": len(held.splitlines()), "b": 8}
    for one in found.rows:
        assert one.num_examples == pytest.approx(sizes[one.client], abs=6 * noise)
        assert 0 <= one.scores["accuracy"].value <= 1
        assert one.scores["accuracy"].error > 0


def test_the_keys_of_an_evaluation_are_gone_after_it(site):
    asking_clients.score(site, "task-1", Question("all", NOISED))
    [row] = site.ledger.spends("a")
    folder = run_folder(site.sites, row.run, "a")
    assert folder.is_dir()
    assert not (folder / "key").exists()


def test_an_evaluation_over_a_budget_is_refused_and_the_others_go_on(site, ok):
    ok("clients", "budget", "a", "--epsilon", 1, "--delta", "0.001")
    found = asking_clients.score(site, "task-1", Question("all", Noised(3.0, 1e-3)))
    assert "a has spent ε = 0.00 of 1" in found.failed["a"]
    assert list(found.failed) == ["a"]
    assert site.ledger.spends("a") == []
    assert len(site.ledger.spends("b")) == 1


def test_an_evaluation_that_nobody_may_answer_is_refused_in_a_sentence(site, ok, refused):
    ok("clients", "budget", "a", "--epsilon", 1, "--delta", "0.001")
    said = refused("eval", "task-1", "--clients", "a", "--epsilon", 3, "--delta", "0.001")
    assert said.startswith("no client told its scores (a: a has spent ε = 0.00 of 1")


def test_two_evaluations_compose_with_each_other_against_a_budget(site, ok):
    ok("clients", "budget", "a", "--epsilon", 4, "--delta", "0.001")
    question = Question(["a"], Noised(2.5, 1e-3))
    asking_clients.score(site, "task-1", question)
    with pytest.raises(EvaluationFailed, match=r"a has spent ε = 2\.5"):
        asking_clients.score(site, "task-1", replace(question, noised=Noised(3.5, 1e-3)))


def test_spends_of_another_unit_are_refused_against_a_budget(site, ok):
    ok("clients", "budget", "a", "--epsilon", 4, "--delta", "0.001")
    asking_clients.score(site, "task-1", Question(["a"], Noised(1.0, 1e-3)))
    with pytest.raises(EvaluationFailed, match="cannot be added"):
        asking_clients.score(site, "task-1", Question(["a"], Noised(1.0, 1e-3, unit="ward")))


def test_a_delta_that_means_nothing_is_refused(site):
    with pytest.raises(BadConfig, match="is not below 1/30, the size of a"):
        asking_clients.score(site, "task-1", Question(["a"], Noised(1.0, 0.1)))


def test_an_insecure_seed_does_not_go_with_a_budget(site, ok):
    ok("clients", "budget", "a", "--epsilon", 4, "--delta", "0.001")
    with pytest.raises(BadConfig, match="insecure_seed gives no privacy"):
        asking_clients.score(site, "task-1", Question(["a"], replace(NOISED, insecure_seed=1)))


def test_a_client_that_withdrew_is_not_asked(site, ok):
    ok("clients", "withdraw", "a")
    found = asking_clients.score(site, "task-1", Question("all", NOISED))
    assert [row.client for row in found.rows] == ["b"]


def test_nothing_is_spent_on_a_client_whose_site_is_out_of_reach(site):
    record = ClientRecord("far", "site:notes", "far", num_examples=90, holdout="0.1")
    site.ledger.add_client(record)
    found = asking_clients.score(site, "task-1", Question(["b", "far"], NOISED))
    assert "its data lie at its site" in found.failed["far"]
    assert site.ledger.spends("far") == []
    assert len(site.ledger.spends("b")) == 1


def test_clients_are_asked_by_name_by_label_or_all():
    assert selector("all") == "all"
    assert selector("region=north, tier=1") == {"region": "north", "tier": "1"}
    assert selector("clinic-1,clinic-2") == ["clinic-1", "clinic-2"]
    with pytest.raises(BadConfig, match="clients are all, labels"):
        selector("region=north,clinic-1")


def test_who_holds_nothing_out_is_not_scored_on_what_it_trains_on(site, ok, refused, notes):
    ok("clients", "add", "c", "--data", notes("c"))
    assert "c holds nothing out" in refused("eval", "task-1", "--clients", "c", "--epsilon", 1)
    everybody = asking_clients.score(site, "task-1", Question("all", NOISED))
    assert [row.client for row in everybody.rows] == ["a", "b"]
    with pytest.raises(NotHeldOut, match="no client with"):
        asking_clients.score(site, "task-1", Question({"region": "x"}, NOISED))
    with pytest.raises(ScoresTell):
        asking_clients.score(site, "task-1", Question(["a"]))


def test_scores_with_a_name_are_kept_with_the_version(site, ok, read):
    said = ok(
        *("eval", "task-1", "--clients", "all", "--epsilon", 50, "--delta", 0.001),
        *("--name", "clinics"),
    )
    assert "±" in said
    assert "each client spent ε = 50 (δ = 0.001, unit example, add-remove)" in said
    kept = read("show", "task-1")["metrics"]
    names = {key.rpartition("/")[2] for key in kept if key.startswith("suite/clinics@")}
    assert names == {"accuracy", "accuracy_error", "loss", "loss_error", "num_examples"}
    assert "clinics" in ok("show", "task-1")


def test_a_runs_privacy_section_says_with_which_privacy(site, ok, run_yaml):
    path = run_yaml(privacy={"epsilon": 20, "delta": 1e-3}, clients={"select": {}})
    ok("eval", "task-1", "--clients", "b", "--privacy", path)
    [row] = site.ledger.spends("b")
    assert epsilon([spend_from_row(row)], 1e-3) == pytest.approx(20, rel=0.01)


def test_a_gate_asks_clients_once_about_each_version(site):
    clinics = {"clients": ["b"], "epsilon": 50.0, "delta": 1e-3}
    asked = {"metrics": {"clinics": {"accuracy": {"at_least": 0.0}}}}
    document = {"suite": {"clinics": clinics}, "aliases": {"production": asked}}
    set_gate(site, "task-1", parse_gate(document), "ada")

    decisions = [gating.check(site, ("task-1", "production"), "task-1:v1") for _ in range(2)]

    assert decisions[0].to_json() == decisions[1].to_json()
    assert decisions[0].passed
    assert decisions[0].checks[0].error > 0
    assert len(site.ledger.spends("b")) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["notes.jsonl", "--clients", "all"], "not both"),
        ([], "give a data set to score on, or --clients"),
        (["--clients", "all", "--delta", "0.1"], "give --epsilon too"),
        (["--clients", "all", "--reason", "x"], "go together"),
        (["notes.jsonl", "--epsilon", "1"], "are of clients' scores"),
        (["--clients", "all", "--epsilon", "1", "--name", "No Name"], "--name: a data set"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_asked(refused, options, says):
    assert says in refused("eval", "task-1", *options)


def test_answers_from_outside_that_are_none_are_refused(site):
    asked = []

    class Keeping(InlineBackend):
        def run(self, assignments, started, stepped=None):
            asked.extend(assignments)
            return super().run(asked, started)

    asking_clients.score(site, "task-1", Question(["b"], NOISED), backend=Keeping())
    [one] = asked
    sums = {"count": 3.0, "loss": 1.0, "accuracy": 0.0}
    good = Evaluation("b", 1, 3, {}, sums=sums)
    assert refusal(good, one) is None
    for bad in (
        replace(good, sums={}),
        replace(good, sums=sums | {"loss": math.nan}),
        replace(good, sums=sums | {"count": 1e300}),
        replace(good, sums=sums | {"f1": 1.0}),
    ):
        assert refusal(bad, one)
        assert table([bad], asked).failed
    plain = replace(one, privacy=None)
    assert refusal(Evaluation("b", 1, 3, {"accuracy": 1.0}), plain) is None
    assert refusal(Evaluation("b", 1, 0, {"accuracy": 1.0}), plain)
    assert refusal(Evaluation("b", 1, 3, {"accuracy": math.inf}), plain)
