"""A gate asks before an alias moves, and what it found stays with the move."""

import getpass
import json
import socket
from dataclasses import replace

import pytest
import yaml

from clients import worker
from clients.assignment import DataSpec, PluginChoice
from orchestrator import deploying, gating, service, signing
from orchestrator.config import BadConfig
from orchestrator.gate_file import parse_gate, read_gate
from orchestrator.gate_setting import PrivateData, set_gate
from orchestrator.gate_suite import scored_draft, task_of
from orchestrator.merge_draft import draft
from orchestrator.suite import prefix
from storage.aliases import NoReason
from storage.gates import Gates
from storage.ledger import ClientRecord

BOT = ("bot", "production")
SCORES = {"accuracy": 0.9, "loss": 0.4, "num_examples": 5000.0}


@pytest.fixture
def suite(notes):
    """A suite's two data sets, as the file says them."""
    return {"mail": notes("mail"), "chat": {"data": notes("chat"), "fields": {}}}


@pytest.fixture
def score(workspace, suite):
    """Returns a function that says how a version scores on the suite, so that none is run."""

    def record(ref, **by_data):
        gate = parse_gate({"suite": suite, "aliases": {"*": {}}})
        for name, one in gate.suite.items():
            before = prefix(task_of(name, one))
            values = SCORES | by_data.get(name, {})
            workspace.store.record_metrics(ref, {before + k: v for k, v in values.items()})

    return record


@pytest.fixture
def gate(workspace, suite):
    """Returns a function that gives bot a gate for production."""

    def give(**asked):
        document = {"suite": suite, "aliases": {"production": asked}}
        return set_gate(workspace, "bot", parse_gate(document), "ada")

    return give


@pytest.fixture
def bot(grow, score):
    """bot:v1, where production points, and bot:v2, whose accuracy on mail is 0.1 less."""
    first = grow("bot", private=False)
    second = grow("bot", private=False, round=2)
    score("bot:v1")
    score("bot:v2", mail={"accuracy": 0.8})
    return first, second


@pytest.fixture
def deployed(workspace, bot):
    service.promote(workspace, *BOT, "bot:v1")
    return bot


FALLS = {"metrics": {"mail": {"accuracy": {"at_least": 0.75, "worse_by": 0.04}}}}


def failed(decision):
    return [(one.check, one.subject, pytest.approx(one.short)) for one in decision.failed]


def test_a_version_that_is_worse_is_not_promoted(workspace, gate, deployed):
    gate(**FALLS)
    with pytest.raises(deploying.GateFailed, match=r"1 of 2 checks .* 0\.1 worse than") as refused:
        service.promote(workspace, *BOT, "bot:v2")

    assert failed(refused.value.decision) == [("metrics", "mail accuracy", 0.06)]
    assert workspace.store.pointing(*BOT) == deployed[0]
    assert workspace.store.promotions(*BOT)[0].evidence is None


def test_what_a_gate_found_stays_with_the_move(workspace, gate, deployed):
    row = gate(metrics={"mail": {"accuracy": {"worse_by": 0.2}}}, tasks={"tau": 0.2})
    move = service.promote(workspace, *BOT, "bot:v2", why="good enough")

    kept = workspace.store.promotions(*BOT)[0].evidence
    assert kept == move.evidence
    assert kept["gate"] == {"number": 1, "digest": row.digest}
    assert (kept["version"], kept["against"]) == (deployed[1], deployed[0])
    assert [(c["check"], c["subject"], c["passed"]) for c in kept["checks"]] == [
        ("metrics", "mail accuracy", True),
        ("tasks", "chat", True),
        ("tasks", "mail", True),
    ]
    assert kept["forced"] is None
    (alias,) = service.lineage(workspace, "bot:v2").decisions.items()
    assert alias == ("bot@production", kept)


def test_an_overridden_gate_says_who_did_it_where_and_why(workspace, gate, deployed):
    gate(**FALLS)
    with pytest.raises(NoReason, match="say it with --reason"):
        deploying.promote_as(workspace, BOT, "bot:v2", deploying.Intent(force=" "))
    forced = deploying.Intent(why="release", force="the old one leaks")
    move = deploying.promote_as(workspace, BOT, "bot:v2", forced)

    assert move.version == deployed[1]
    assert move.evidence["passed"] is False
    assert move.evidence["forced"] == {
        "reason": "the old one leaks",
        "who": getpass.getuser(),
        "host": socket.gethostname(),
    }


def test_an_alias_of_which_nothing_is_asked_moves(workspace, gate, deployed):
    gate(**FALLS)
    assert service.promote(workspace, "bot", "staging", "bot:v2").evidence is None
    assert gating.check(workspace, ("bot", "staging"), "bot:v2") is None


def test_every_other_alias_is_asked_what_the_star_asks(workspace, suite, deployed):
    document = {"suite": suite, "aliases": {"*": FALLS, "dev": {}}}
    set_gate(workspace, "bot", parse_gate(document), "ada")
    assert gating.check(workspace, BOT, "bot:v2").failed
    assert gating.check(workspace, ("bot", "dev"), "bot:v2").checks == ()


def test_a_removed_gate_asks_nothing(workspace, gate, deployed):
    gate(**FALLS)
    Gates(workspace.engine).set("bot", None, who="ada")
    assert service.promote(workspace, *BOT, "bot:v2").evidence is None


def test_a_rollback_is_never_asked(workspace, gate, deployed):
    service.promote(workspace, *BOT, "bot:v2")
    gate(metrics={"mail": {"accuracy": {"at_least": 0.99}}})
    assert service.rollback(workspace, "bot@production").version == deployed[0]


def test_past_tasks_must_not_fall(workspace, gate, deployed):
    gate(tasks={"tau": 0.02})
    found = gating.check(workspace, BOT, "bot:v2")
    assert [one.subject for one in found.failed] == ["mail"]
    assert found.failed[0].short > 0.05


def test_a_client_s_own_data_are_no_suite(workspace, notes, gate, bot, tmp_path):
    workspace.ledger.add_client(ClientRecord("north", notes("mail"), "north"))
    with pytest.raises(PrivateData, match="'mail' has the data of client 'north'"):
        gate(**FALLS)
    copied = notes("copied")
    document = {"suite": {"copy": copied}, "aliases": {"*": {"tasks": {"tau": 0.1}}}}
    with pytest.raises(PrivateData, match="'copy' has the data of client 'north'"):
        set_gate(workspace, "bot", parse_gate(document), "ada")


def test_data_that_became_a_client_s_are_not_scored_any_more(workspace, notes, gate, deployed):
    gate(**FALLS)
    workspace.ledger.add_client(ClientRecord("north", notes("mail"), "north"))
    found = gating.check(workspace, BOT, "bot:v1")
    assert [one.check for one in found.failed] == ["suite"]
    assert "client 'north'" in found.failed[0].said


def test_public_data_of_a_client_may_be_scored(workspace, notes, gate, deployed):
    workspace.ledger.add_client(ClientRecord("north", notes("mail"), "north", public=True))
    gate(metrics={"mail": {"accuracy": {"at_least": 0.5}}})
    assert gating.check(workspace, BOT, "bot:v2").passed


def test_data_that_are_gone_fail_the_check_and_can_be_overridden(workspace, gate, deployed):
    gate(**FALLS)
    for path in workspace.home.parent.glob("*.jsonl"):
        path.unlink()
    found = gating.check(workspace, BOT, "bot:v2")
    assert "cannot be checked" in found.failed[0].said
    forced = deploying.Intent(force="the disk broke")
    assert deploying.promote_as(workspace, BOT, "bot:v2", forced).version == deployed[1]


def test_size_and_base_are_checked(workspace, grow, gate, deployed):
    model = {"id": "other", "revision": None, "hash": "cd" * 32, "labels": ["x"]}
    grow("bot", private=False, model=model)
    gate(size={"max_rank": 1, "max_bytes": 10_000}, base={"hashes": ["ab" * 8]})

    assert gating.check(workspace, BOT, "bot:v2").failed[0].said == (
        "rank is 2, and must be at most 1"
    )
    found = gating.check(workspace, BOT, "bot:v3")
    assert [one.subject for one in found.failed] == ["rank", "hash", "same"]


@pytest.mark.parametrize(("text", "passed"), [("license: mit", True), ("license: [x", False)])
def test_the_licence_is_read_from_the_base_model_s_card(
    workspace, grow, gate, tiny_encoder, tmp_path, text, passed
):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in tiny_encoder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "README.md").write_text(f"---\n{text}\n---\n# a model\n")
    model = {"id": str(folder), "revision": None, "hash": "ab" * 32, "labels": ["x"]}
    model |= {"kind": "classification", "pooling": "mean", "max_length": 16}
    grow("bot", private=False, model=model)
    gate(licences={"allowed": ["MIT"]})
    assert gating.check(workspace, BOT, "bot").passed == passed


def test_a_signature_by_a_certain_key_is_asked_for(workspace, gate, deployed):
    ring = signing.keys(workspace.home)
    ring.new("release")
    ring.new("laptop")
    gate(signature={"by": ["release"]})
    signing.sign(workspace, "bot:v2", "laptop")
    (found,) = gating.check(workspace, BOT, "bot:v2").failed
    assert "must be signed by release, and is signed by laptop" in found.said
    assert gating.check(workspace, BOT, "bot:v2", sign="release").passed
    signing.sign(workspace, "bot:v2", "release")
    assert gating.check(workspace, BOT, "bot:v2").passed


def test_an_epsilon_is_composed_over_the_history_and_those_who_share_records(workspace, grow, gate):
    first = grow("bot", clients=("a",))
    grow("bot", {first: "round"}, clients=("b",))
    ceiling = {"population": "people-a", "unit": "example", "delta": 1e-6, "at_most": 0.001}
    gate(epsilon=[ceiling])
    (alone,) = gating.check(workspace, BOT, "bot").failed
    workspace.ledger.relations.add({"people-a": {"people-b"}})
    (shared,) = gating.check(workspace, BOT, "bot").failed

    assert alone.subject == shared.subject == "people-a by example"
    assert shared.found > alone.found > 0.01
    gate(epsilon=[{**ceiling, "at_most": 8}])
    assert gating.check(workspace, BOT, "bot").passed


def test_no_ceiling_holds_for_data_without_privacy(workspace, grow, gate):
    grow("bot", clients=("a",), private=False)
    gate(epsilon=[{"unit": "example", "delta": 1e-5, "at_most": 8}])
    (found,) = gating.check(workspace, BOT, "bot").failed
    assert found.subject == "people-a by any unit"


def test_a_signed_move_covers_its_evidence(workspace, gate, deployed):
    signing.keys(workspace.home).new("release")
    gate(metrics={"mail": {"accuracy": {"at_least": 0.5}}})
    signing.signed(
        workspace, "bot@production", "release", lambda: service.promote(workspace, *BOT, "bot:v2")
    )
    assert signing.signers(workspace, "bot@production")["alias"] is not None
    with workspace.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE promotions SET evidence = replace(evidence, '0.5', '0.7')"
        )
    assert signing.signers(workspace, "bot@production")["alias"] is None


def tagged(path):
    """A file of tagged words, some of them marked."""
    rows = [
        {"tokens": ["the", "private", "data"], "tags": ["O", "B-T", "I-T"]},
        {"tokens": ["a", "cat", "learns"], "tags": ["O", "B-T", "O"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": f"jsonl:{path}", "fields": {"text": "tokens", "label": "tags"}}


def prompted(path):
    """A file of prompts and their answers."""
    rows = [
        {"prompt": "the private", "completion": "data"},
        {"prompt": "a cat", "completion": "learns a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": f"jsonl:{path}", "generate": 2}


def labelled(path):
    """A file of labelled texts."""
    rows = [{"text": name, "label": name} for name in ("cat", "dog")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": f"jsonl:{path}"}


@pytest.mark.parametrize(
    ("kind", "write", "metrics"),
    [
        ("classification", labelled, ("accuracy", "loss")),
        ("token-classification", tagged, ("accuracy", "entity_f1", "loss")),
        ("causal-lm", prompted, ("loss", "perplexity", "bits_per_byte", "exact_match")),
    ],
)
def test_versions_are_evaluated_where_nothing_is_measured(
    workspace, publish, tmp_path, kind, write, metrics
):
    version = publish("bot", kind=kind)
    test = write(tmp_path / "held.jsonl")
    bounds = {metric: {"at_most": -1.0} for metric in metrics}
    document = {"suite": {"mail": test}, "aliases": {"*": {"metrics": {"mail": bounds}}}}
    set_gate(workspace, "bot", parse_gate(document), "ada")
    found = {one.subject: one.found for one in gating.check(workspace, BOT, version).failed}

    spec = DataSpec(test["data"], test.get("fields", {}))
    measured = service.evaluate(workspace, version, spec).metrics
    assert {f"mail {metric}" for metric in metrics} == found.keys()
    assert 0 <= found.get("mail exact_match", 0.0) <= 1  # `weft eval` asks for no answers
    for metric in measured.keys() & {*metrics}:
        assert found[f"mail {metric}"] == pytest.approx(measured[metric])


@pytest.mark.parametrize("worth", [float("nan"), float("inf")])
def test_what_is_no_number_passes_no_bound(workspace, publish, tmp_path, monkeypatch, worth):
    version = publish("bot", kind="causal-lm")
    good = publish("bot", seed=1, kind="causal-lm")
    test = prompted(tmp_path / "held.jsonl")
    asked = {"metrics": {"mail": {"perplexity": {"at_most": 1e9}}}}
    document = {"suite": {"mail": test}, "aliases": {"*": asked}}
    set_gate(workspace, "bot", parse_gate(document), "ada")
    evaluated = worker.evaluate

    def overflowing(assignment, *args):
        found = evaluated(assignment, *args)
        return replace(found, metrics={**found.metrics, "perplexity": worth})

    monkeypatch.setattr(worker, "evaluate", overflowing)
    for _ in range(2):  # measured, and as it was kept
        (found,) = gating.check(workspace, BOT, version).failed
        assert found.said.startswith("cannot be checked: perplexity ")
    merged = draft(workspace, [version, good], PluginChoice("cat", {}))
    own = scored_draft(workspace, parse_gate(document), merged)
    assert own.problems == {"mail": f"perplexity is {worth}"}
    assert "perplexity" not in own.scores["mail"]


# --- the file and the command line ------------------------------------------------------------


@pytest.fixture
def gate_yaml(tmp_path, suite):
    """Returns a function that writes a gate's file."""

    def write(**asked):
        path = tmp_path / "gate.yaml"
        path.write_text(yaml.safe_dump({"suite": suite, "aliases": {"production": asked}}))
        return path

    return write


def test_paths_in_a_gate_mean_the_same_from_anywhere(tmp_path, notes, monkeypatch):
    notes("mail")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gate.yaml").write_text("suite: {mail: 'jsonl:mail.jsonl'}\naliases: {'*': {}}\n")
    assert read_gate("gate.yaml").suite["mail"].data == f"jsonl:{tmp_path}/mail.jsonl"


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({}, "aliases: is required"),
        ({"aliases": {"*": {}}, "suit": {}}, "suit: there is no such option; did you mean 'suite'"),
        (
            {"aliases": {"*": {"metric": {}}}},
            r"aliases.\*.metric: there is no such option; did you mean 'metrics'",
        ),
        ({"aliases": {"*": {"size": {}}}}, "size: asks nothing; give max_bytes"),
        (
            {"aliases": {"*": {"metrics": {"mail": {"loss": {"at_most": 1}}}}}},
            r"'mail' is no data set of the suite \(none\)",
        ),
        ({"aliases": {"*": {"tasks": {"tau": 0.1}}}}, "the suite has no data set"),
        ({"aliases": {"../x": {}}}, "alias '../x' must be"),
        ({"aliases": {"*": {"epsilon": [{"unit": "example", "at_most": 8}]}}}, "delta: is requir"),
        ({"aliases": {"*": {"base": {"hashes": ["xyz"]}}}}, "8 to 64 hex digits of it, got 'xyz'"),
        (
            {"suite": {"m": "jsonl:x"}, "aliases": {"*": {"metrics": {"m": {"loss": {}}}}}},
            "m.loss: asks nothing; give at_least, at_most or worse_by",
        ),
    ],
)
def test_a_wrong_gate_says_where(document, says):
    with pytest.raises(BadConfig, match=says):
        parse_gate(document)


def test_a_gate_is_set_checked_and_removed_from_the_command_line(
    weft, ok, read, gate_yaml, deployed
):
    told = ok("gate", "set", "bot", gate_yaml(**FALLS), "--why", "a start")
    assert told.startswith(f"# bot  gate 1, by {getpass.getuser()} at ")
    assert "worse_by: 0.04" in ok("gate", "show", "bot")
    code, told, _ = weft("gate", "check", "bot:v2", "--alias", "production", "--json")
    assert (code, [c["passed"] for c in json.loads(told)["checks"]]) == (1, [True, False])
    assert "nothing is asked" in ok("gate", "check", "bot:v2", "--alias", "dev")
    assert "passed" in ok("gate", "check", "bot:v1", "--alias", "production")
    assert ok("gate", "remove", "bot", "--why", "enough") == "bot  gate 2: removed\n"
    assert [row["why"] for row in read("gate", "show", "bot", "--history")] == ["enough", "a start"]
    assert "removed" in ok("gate", "show", "bot", "--history")


def test_a_failed_promotion_says_what_failed_and_by_how_much(weft, ok, read, gate_yaml, deployed):
    ok("gate", "set", "bot", gate_yaml(**FALLS))
    promote = ("promote", "bot:v2", "--to", "production")
    code, told, said = weft(*promote)
    assert (code, "0.06" in told, "bot@production was not moved: 1 of 2 checks" in said) == (
        1,
        True,
        True,
    )
    code, told, _ = weft(*promote, "--json")
    found = json.loads(told)
    assert (code, found["moved"], found["checks"][1]["short"]) == (1, False, pytest.approx(0.06))

    ok(*promote, "--force", "--reason", "the old one leaks")
    assert "the old one leaks" in ok("alias", "log", "bot@production")
    assert read("alias", "log", "bot@production")[0]["evidence"]["forced"]["reason"]
    assert read("lineage", "bot:v2")["decisions"]["bot@production"]["passed"] is False


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--force",), "a gate is overridden for a reason, got none"),
        (("--reason", "x"), "--reason is for --force"),
        (("--wait", "soon"), "--wait takes a time such as 30s, 2m or 0, got 'soon'"),
    ],
)
def test_a_promotion_that_cannot_be_meant_is_refused(refused, deployed, argv, says):
    assert says in refused("promote", "bot:v2", "--to", "production", *argv)
