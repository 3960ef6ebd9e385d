"""The command line, in this process: what each command prints, and how it refuses."""

import json
import sqlite3

import pytest

PRIVACY = {"noise_multiplier": 1.0, "delta": 1e-3}


@pytest.fixture
def trained(ok, run_yaml):
    """Leave one finished run in the home."""
    ok("run", run_yaml())


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


def test_a_whole_life_from_the_command_line(ok, read, run_yaml, tmp_path, notes):
    path = run_yaml()
    held_back = notes("test", size=8)

    said = ok("run", path)
    assert "round 2/2: 2 updates, loss " in said
    assert "task-1:v1" in said
    assert "next: weft lineage task-1:v1" in said

    [run] = read("runs", "list")
    assert (run["name"], run["status"], run["round"]) == ("task-1", "completed", 2)
    assert run["id"] in ok("runs")
    assert read("runs", "show", "task-1")["config"]["rounds"] == 2
    log = [json.loads(line) for line in ok("runs", "log", run["id"], "--json").splitlines()]
    assert [e["seq"] for e in log] == list(range(1, len(log) + 1))
    assert log[-1]["kind"] == "completed"

    lineage = read("lineage", "task-1")
    assert len(lineage["versions"]) == 3
    assert lineage["root"] == run["version"]
    drawn = ok("lineage", "task-1")
    assert "round 2 of fedsvd" in drawn
    assert "w0 update" in drawn
    assert read("show", "task-1:v1")["id"] == run["version"]
    assert run["version"] in ok("show", "task-1")

    second = read("run", path, "--set", "name=task-2", "--set", "seed=1")
    merged = read("merge", "task-1", "task-2", "--into", "both", "--weights", "0.5,0.5")
    assert {p["id"] for p in merged["parents"]} == {run["version"], second["id"]}
    assert "both@production" in ok("promote", "both", "--to", "production", "--why", "a test")
    assert read("show", "both@production")["id"] == merged["id"]

    assert "adapter_config.json" in ok("export", "both", tmp_path / "peft")
    scored = read("eval", "both", held_back)
    assert scored["num_examples"] == 8
    assert "accuracy" in ok("eval", "both", held_back, "--labels", "cat,dog")


def test_clients_are_registered_listed_shown_and_removed(ok, read, notes):
    data = notes("north")
    made = ok(
        *("clients", "add", "clinic-7", "--data", data, "--epsilon", 8, "--delta", 1e-5),
        *("--label", "ward=north", "--label", "gpu=a100", "--population", "region"),
    )
    assert made == "registered clinic-7: 12 examples, budget ε 8 (δ 1e-05)\n"
    ok("clients", "add", "clinic-8", "--data", notes("south"), "--examples", 50)

    assert [c["name"] for c in read("clients", "list")] == ["clinic-7", "clinic-8"]
    assert [c["name"] for c in read("clients", "list", "--label", "ward=north")] == ["clinic-7"]
    assert "clinic-8" in ok("clients", "list")
    shown = read("clients", "show", "clinic-7")
    assert (shown["population"], shown["labels"]["gpu"]) == ("region", "a100")
    assert shown["spent"] == {"epsilon": 0.0, "text": "nothing"}
    assert "spent: nothing" in ok("clients", "show", "clinic-7")
    assert ok("clients", "remove", "clinic-7") == "removed clinic-7\n"
    assert [c["name"] for c in read("clients", "list")] == ["clinic-8"]


def test_clients_of_a_file_are_registered_at_once_and_listed_by_page(ok, refused, notes, tmp_path):
    file = tmp_path / "nodes.csv"
    rows = [f"node-{n},{notes('all')},{n % 2}" for n in range(5)]
    file.write_text("\n".join(["name,data,labels.half", *rows]))
    assert ok("clients", "add", "--from", file) == f"registered 5 clients of {file}\n"

    first = ok("clients", "list", "--limit", 3)
    assert "node-2" in first
    assert "node-3" not in first
    assert "more: --after node-2" in first
    last = ok("clients", "list", "--limit", 3, "--after", "node-2")
    assert "node-4" in last
    assert "more" not in last
    assert "node-3" in ok("clients", "list", "--label", "half=1")
    assert "--from FILE describes" in refused("clients", "add", "x", "--from", file)
    assert "give a client's NAME and --data" in refused("clients", "add", "x")
    assert "line 2: a client called 'node-0' is" in refused("clients", "add", "--from", file)


def test_a_client_s_own_columns_are_read(ok, tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text("note,dx\nfever,flu\ncough,cold\n")

    made = ok("clients", "add", "a", "--data", "csv:notes.csv", "--fields", "text=note,label=dx")

    assert "registered a: 2 examples" in made


def test_plugins_are_listed_by_kind_and_shown_with_options(ok, read):
    everything = read("plugins")
    assert {row["kind"] for row in everything} == {
        *("strategy", "adapter", "optimizer", "regularizer", "merge", "encoding", "logger")
    }
    assert {row["kind"] for row in read("plugins", "merge")} == {"merge"}
    [fedsvd] = read("plugins", "strategy", "fedsvd")
    assert fedsvd["options"]["every"] == {"type": "int >= 1", "default": 1}
    assert "FedSVD" not in ok("plugins", "adapter")
    assert "row_scale" in ok("plugins", "strategy", "fedsvd")


def test_a_file_is_written_checked_and_starts_nothing(ok, read, run_yaml, tmp_path):
    assert "next: weft check mine.yaml" in ok("init", "mine.yaml")
    facts = read("check", run_yaml(privacy=PRIVACY))

    assert facts["clients"] == ["w0", "w1"]
    assert facts["run_bytes"] == 2 * facts["round_bytes"]
    assert facts["epsilon"]["w0"]["noise_multiplier"] == 1.0
    assert facts["epsilon"]["w0"]["epsilon"] > 0
    assert "privacy        w0: ε = " in ok("check", tmp_path / "run.yaml")
    assert read("runs", "list") == []
    assert files(tmp_path / "home" / "blobs") == []


def test_a_check_counts_updates_as_they_are_encoded(read, run_yaml):
    plain = read("check", run_yaml())["round_bytes"]
    assert 0.7 < read("check", run_yaml(uplink=["fp16"]))["round_bytes"] / plain < 0.8


def test_a_check_without_privacy_says_so(ok, run_yaml):
    assert "privacy        none: updates are not noised" in ok("check", run_yaml())


def test_a_data_set_is_looked_at(ok, read, weft, notes, tiny_encoder, tmp_path):
    data = notes("train", size=8)
    found = read("data", "check", data, "--labels", "cat,dog,model,rank", "--model", tiny_encoder)
    assert (found["total"], found["num_bad"]) == (8, 0)
    assert found["labels"] == {"cat": 2, "dog": 2, "model": 2, "rank": 2}
    assert found["lengths"]["longest"] >= 6
    assert "label cat" in ok("data", "check", data)

    (tmp_path / "bad.jsonl").write_text('{"text": "x", "label": "cat"}\n{"label": "cat"}\n')
    code, out, _ = weft("data", "check", "jsonl:bad.jsonl")
    assert code == 2
    assert "bad.jsonl, line 2: has no field 'text'" in out


def test_a_private_run_says_what_it_spent_and_hides_the_loss(ok, run_yaml):
    said = ok("run", run_yaml(privacy=PRIVACY, rounds=1))

    assert "round 1/1: 2 updates, loss hidden by DP, max ε = " in said
    assert "(each event counts once)" in ok("lineage", "task-1")


def test_evaluation_is_shown_while_the_run_goes_on(ok, read, run_yaml, notes):
    said = ok("run", run_yaml(evaluate={"data": notes("test"), "every": 2}))

    assert "round 2: accuracy " in said
    assert "round 1: accuracy" not in said
    assert read("show", "task-1")["metrics"].keys() == {"accuracy", "macro_f1", "loss"}


def test_a_failed_run_is_resumed(weft, ok, read, run_yaml, notes, tmp_path):
    path = run_yaml(clients={"select": {}})
    ok("clients", "add", "a", "--data", notes("a"))
    whole = read("run", path)["id"]
    hidden = (tmp_path / "a.jsonl").rename(tmp_path / "hidden")

    code, out, err = weft("run", path)

    run = read("runs", "list")[0]
    assert (code, run["status"], err) == (2, "failed", f"error: {run['error']}\n")
    assert f"weft run --resume {run['id']}" in err
    assert "refused a: " in out
    hidden.rename(tmp_path / "a.jsonl")
    assert read("run", "--resume", run["id"])["id"] == whole


def test_json_on_stdout_is_not_mixed_with_progress(weft, run_yaml):
    code, out, err = weft("run", run_yaml(), "--json")

    assert code == 0
    assert json.loads(out)["names"] == ["task-1:v1"]
    assert "round 2/2" in err


def test_events_are_logged_as_json_beside_the_progress(weft, run_yaml):
    code, out, err = weft("run", run_yaml(privacy=PRIVACY), "--log-format", "json")

    assert code == 0
    assert "round 2/2: 2 updates" in out
    lines = [json.loads(line) for line in err.splitlines()]
    kinds = [line["message"] for line in lines if line["logger"] == "weft.run"]
    assert (kinds[0], kinds[-1]) == ("run", "completed")
    assert [line["round"] for line in lines if line["message"] == "committed"] == [1, 2]
    assert all(line["epsilon"] > 0 for line in lines if line["message"] == "committed")


def test_a_run_is_logged_to_a_file_that_the_environment_names(
    weft, run_yaml, monkeypatch, tmp_path
):
    monkeypatch.setenv("WEFT_LOG_FILE", str(tmp_path / "weft.log"))
    code, _, err = weft("run", run_yaml())

    assert (code, err) == (0, "")
    text = (tmp_path / "weft.log").read_text()
    assert " INFO weft.run accepted run=" in text
    assert " client=w0 " in text
    assert " bytes=" in text


def test_metrics_of_a_run_are_written_to_a_textfile(ok, run_yaml, tmp_path):
    pytest.importorskip("prometheus_client", reason="extra 'metrics' is not installed")
    ok("run", run_yaml(), "--metrics-file", tmp_path / "weft.prom")

    found = (tmp_path / "weft.prom").read_text()
    assert "weft_rounds_total 2.0" in found
    assert 'weft_clients_total{outcome="accepted"} 4.0' in found


def test_a_metrics_port_that_is_none_is_refused(refused, run_yaml, read):
    pytest.importorskip("prometheus_client", reason="extra 'metrics' is not installed")
    why = refused("run", run_yaml(), "--metrics-port", 70000)

    assert why.startswith("metrics cannot be served on 127.0.0.1, port 70000")
    assert read("runs", "list") == []


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "lorra"}, "no adapter is called 'lorra'; did you mean 'lora'?"),
        ({"strategy": "cat"}, "no strategy is called 'cat'; 'cat' is a merge"),
        (
            {"adapter": {"name": "lora", "r": "big"}},
            "adapter 'lora': r must be int >= 1, got 'big'",
        ),
        ({"adapter": {"name": "lora", "r": 64}}, "got 64"),
        ({"optimizer": {"name": "adamw", "lr": -1}}, "optimizer 'adamw': lr must be > 0, got -1"),
        ({"model": "/no/such/model"}, "/no/such/model"),
        ({"labels": ["cat", "dog"]}, "outside the label set (cat, dog)"),
        ({"start_from": "nothing", "start": "stack"}, "'nothing'"),
        ({"color": "red"}, "color: there is no such option"),
        ({"clients": {"names": ["nobody"]}}, "no client is called 'nobody'"),
        ({"notify": {"url_env": "WEFT_NOWHERE"}}, "variable WEFT_NOWHERE is not set"),
        (
            {"clients": {"simulate": {"data": "jsonl:gone.jsonl", "parts": 2}}},
            "gone.jsonl",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_and_leaves_nothing(
    refused, read, run_yaml, tmp_path, changes, message
):
    path = run_yaml(**changes)

    assert message in refused("run", path)
    assert message in refused("check", path)
    assert read("runs", "list") == []
    assert files(tmp_path / "home" / "blobs") == []
    assert not (tmp_path / "home" / "runs").exists()


def test_a_malformed_record_is_named_by_file_and_line(refused, run_yaml, tmp_path):
    path = run_yaml(rounds=1)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "secret words", "label": "bird"}\n')

    why = refused("run", path)

    assert "train.jsonl, line 13: label 'bird' is outside the label set" in why
    assert "secret" not in why


def test_a_spent_budget_is_refused(refused, ok, run_yaml, notes, read):
    data = notes("a")
    ok("clients", "add", "a", "--data", data, "--epsilon", 0.01, "--delta", 1e-5)
    path = run_yaml(
        clients={"select": {}},
        privacy={"epsilon": 8, "delta": 1e-3, "accountant": "rdp"},
        batch_size=12,
        steps=1000,
        rounds=100,
    )

    why = refused("run", path)

    assert why.startswith("a: its population 'a' cannot keep within ε = 0.01 (δ = 1e-05)")
    assert read("runs", "list") == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "gone.yaml"], "there is no file gone.yaml; weft init writes one"),
        (["run"], "give a run's YAML file, or --resume RUN"),
        (["run", "a.yaml", "--resume", "x"], "give a run's YAML file, or --resume RUN"),
        (["run", "--resume", "x", "--set", "rounds=3"], "--set cannot change a run that goes on"),
        (["run", "--resume", "x", "--ray-address", "h:1"], "nor --ray-address"),
        (["run", "a.yaml", "--accept-unbounded"], "--reason WHY go together"),
        (["run", "--resume", "no-such-run"], "'no-such-run'"),
        (["runs", "show", "nope"], "'nope'"),
        (["runs", "log", "nope"], "'nope'"),
        (["show", "nope"], "'nope'"),
        (["lineage", "nope:v3"], "nope"),
        (["export", "nope", "out"], "'nope'"),
        (["eval", "nope", "jsonl:x"], "'nope'"),
        (["promote", "nope", "--to", "production"], "'nope'"),
        (["merge", "nope", "--into", "x"], "a merge needs at least two versions"),
        (["merge", "nope", "nada", "--into", "x"], "'nope'"),
        (["merge", "a", "b", "--into", "x", "-m", "fedsvd"], "'fedsvd' is a strategy"),
        (["merge", "a", "b", "--into", "x", "--weights", "1,x"], "--weights takes numbers"),
        (["merge", "a", "b", "--into", "x", "--option", "rank"], "--option takes key=value"),
        (["merge", "a", "b", "--into", "x", "--option", "rank=["], "'[' is not YAML"),
        (["merge", "a", "b", "--into", "x", "--option", "rank=1"], "has no option 'rank'"),
        (["clients", "show", "nope"], "no client is called 'nope'"),
        (["clients", "remove", "nope"], "no client is called 'nope'"),
        (["clients", "list", "--label", "ward"], "--label takes key=value, got 'ward'"),
        (["clients", "add", "a", "--data", "jsonl:gone.jsonl"], "gone.jsonl"),
        (["clients", "add", "a", "--data", "gone.jsonl"], "has no scheme"),
        (["plugins", "strategi"], "no kind of plug-in is called 'strategi'"),
        (["plugins", "strategy", "lorra"], "did you mean 'flora'?"),
        (["data", "check", "jsonl:gone.jsonl"], "gone.jsonl"),
        (["data", "check", "jsonl:gone.jsonl", "--fields", "text"], "--fields takes key=value"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(refused, argv, message):
    assert message in refused(*argv)


def test_a_client_s_name_and_budget_are_checked(refused, ok, notes, read):
    data = notes("a")
    ok("clients", "add", "a", "--data", data, "--population", "ward")

    def add(name, *more):
        return refused("clients", "add", name, "--data", data, *more)

    assert "'a'" in add("a")
    assert "client name 'a b' must be" in add("a b")
    assert "give both" in add("b", "--epsilon", 8)
    assert "epsilon > 0 and delta in (0, 1)" in add("b", "--epsilon", 8, "--delta", 2)
    assert "population 'ward' has no budget" in add(
        "b", "--population", "ward", "--epsilon", 8, "--delta", 1e-5
    )
    assert [c["name"] for c in read("clients", "list")] == ["a"]


def test_nothing_is_written_over(refused, ok, trained, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")

    assert "run.yaml exists; --force overwrites it" in refused("init")
    assert "taken is not empty" in refused("export", "task-1", "taken")
    assert files(tmp_path / "taken") == ["thesis.tex"]


def test_a_corrupt_blob_is_refused_wherever_it_is_read(refused, trained, tmp_path, notes):
    for blob in (tmp_path / "home" / "blobs").rglob("*"):
        if blob.is_file():
            data = bytearray(blob.read_bytes())
            data[-1] ^= 1
            blob.chmod(0o600)
            blob.write_bytes(data)

    for argv in (("export", "task-1", "out"), ("eval", "task-1", notes("test"))):
        assert "corrupt" in refused(*argv) or "digest" in refused(*argv)
    assert not (tmp_path / "out").exists()


def test_a_moved_base_model_that_is_another_is_refused(refused, trained, tiny_decoder, notes):
    why = refused("eval", "task-1", notes("test"), "--model", tiny_decoder)

    assert "the adapter was trained on" in why


def test_a_store_of_a_newer_weft_is_refused(refused, ok, tmp_path):
    ok("runs", "list")
    with sqlite3.connect(tmp_path / "home" / "weft.db") as database:
        database.execute("UPDATE weft_revision SET version_num = '9999'")
    database.close()

    assert "was written by a newer weft (schema 9999)" in refused("runs", "list")


def test_a_database_that_is_none_is_refused(refused, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "weft.db").write_text("not a database, but long enough to be read" * 99)

    assert "cannot open the store" in refused("runs", "list")


def test_a_bug_shows_its_traceback(weft, monkeypatch):
    def broken(home=None, database=None):
        raise KeyError("oh")

    monkeypatch.setattr("orchestrator.workspace.open_workspace", broken)

    with pytest.raises(KeyError, match="oh"):
        weft("runs", "list")


def test_an_interrupt_is_not_an_error_of_the_user(weft, monkeypatch):
    def interrupted(home=None, database=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.workspace.open_workspace", interrupted)

    code, _, err = weft("runs", "list")

    assert code == 130
    assert "Traceback" not in err


def test_brackets_in_names_are_printed_as_they_are(ok, notes):
    ok("clients", "add", "a", "--data", notes("a"), "--label", "note=[/bold]")
    ok("clients", "add", "b", "--data", notes("b"), "--population", "[red]x")

    listed = ok("clients", "list")

    assert "note=[/bold]" in listed
    assert "[red]x" in listed
