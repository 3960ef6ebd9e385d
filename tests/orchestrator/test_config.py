"""A run's file is understood, or every mistake in it gets a sentence."""

import json

import pytest
import yaml

from clients.builtin import code_mentions
from orchestrator.config import BadConfig, find_plugin, load_config, parse_config
from orchestrator.template import TEMPLATE, FileTaken, write_template
from strategies.plugins import UnknownPlugin

FEDBUFF = {"buffer": 8, "concurrency": 16, "max_staleness": 10, "power": 0.5}


def refusal(document, *overrides) -> str:
    with pytest.raises(BadConfig) as caught:
        parse_config(document, overrides)
    return str(caught.value)


def test_short_forms_mean_the_same_as_the_long_ones(document):
    short = parse_config(document(adapter="lora", regularizers=["proximal"], backend="inline"))
    long = parse_config(
        document(
            model={"id": "some-model"},
            adapter={"name": "lora", "options": {}},
            regularizers=[{"name": "proximal"}],
            strategy={"name": "fedavg", "options": {}},
            backend={"name": "inline"},
        )
    )

    assert short == long


def test_options_stand_beside_the_name(document):
    config = parse_config(document(adapter={"name": "lora", "r": 4, "dropout": 0.1}))

    chosen = config.checked_plugins()["adapter"]

    assert (chosen.options["r"], chosen.options["dropout"]) == (4, 0.1)
    assert chosen.options["target_modules"] == "auto"  # defaults are filled in


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("rounds=7", lambda c: c.rounds == 7),
        ("adapter.r=16", lambda c: c.adapter.options["r"] == 16),
        ("strategy.weighting=uniform", lambda c: c.strategy.options["weighting"] == "uniform"),
        ("model.max_length=32", lambda c: (c.model.id, c.model.max_length) == ("some-model", 32)),
        ("privacy.epsilon=8", lambda c: c.privacy.epsilon == 8),
        ("backend.workers=2", lambda c: (c.backend.name, c.backend.workers) == ("inline", 2)),
        ("backend.workers=auto", lambda c: c.backend.workers is None),
        ("backend.checkpoint_s=600", lambda c: c.backend.checkpoint_s == 600.0),
        ("task_labels=[dog]", lambda c: c.task_labels == ("dog",)),
        ("cohort=null", lambda c: c.cohort.size is None),
        ("model=a=b", lambda c: c.model.id == "a=b"),
    ],
)
def test_an_override_sets_one_value_and_leaves_the_file_alone(document, override, read):
    given = document(adapter="lora")
    before = yaml.safe_dump(given)

    assert read(parse_config(given, [override]))
    assert yaml.safe_dump(given) == before


def test_a_cohort_may_be_written_short(document):
    def cohort(given):
        return parse_config(document(cohort=given)).cohort

    assert cohort(8) == cohort({"size": 8})
    assert cohort(0.25) == cohort({"fraction": 0.25})
    assert cohort(None) == cohort({})


@pytest.mark.parametrize("quorum", [6, 0.8, 1.0, None])
def test_how_rounds_go_is_the_same_after_a_trip_through_json(document, quorum):
    stop = {"metric": "loss", "patience": 2}
    given = {"quorum": quorum, "stop": stop, "evaluate": {"data": "d"}, "select": "best"}
    config = parse_config(document(**given))
    again = parse_config(json.loads(json.dumps(config.model_dump(mode="json"))))

    assert again == config
    assert type(again.quorum) is type(quorum)


def test_late_updates_weigh_something_only_where_they_are_kept(document):
    assert parse_config(document()).stale is None
    assert parse_config(document(late="keep")).stale.power == 0.5
    assert parse_config(document(late="keep", staleness={"power": 1})).stale.power == 1
    assert parse_config(document(asynchronous=FEDBUFF)).stale.max_staleness == 10


def test_a_version_is_judged_by_accuracy_or_loss_unless_it_is_said(document):
    assert parse_config(document()).judge.metric == "accuracy"
    entities = parse_config(document(task="token-classification", labels=["O", "B-X", "I-X"]))
    assert (entities.judge.metric, entities.judge.highest) == ("entity_f1", True)
    words = parse_config(document(task="token-classification"))
    assert words.judge.metric == "accuracy"
    language = parse_config(document(task="causal-lm", labels=None))
    assert (language.judge.metric, language.judge.highest) == ("loss", False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backend.address=10.0.0.1:6379", "backend: address: inline runs in this process"),
        ("rounds", "--set 'rounds' must read path.to.key=value, such as rounds=20"),
        ("adapter..r=1", "--set 'adapter..r=1' must read path.to.key=value"),
        ("rounds.x=1", "--set 'rounds.x=1': rounds is not a mapping"),
        ("rounds=[", "--set rounds: the value is not YAML"),
        ("round=3", "round: there is no such option; did you mean 'rounds'?"),
    ],
)
def test_a_wrong_override_is_refused(document, override, message):
    assert message in refusal(document(), override)


def test_a_way_of_clipping_is_given_by_name_or_with_its_options(document):
    def read(clipping):
        return parse_config(document(privacy={"epsilon": 1, "clipping": clipping}))

    assert read("per-layer").privacy.clipping.mode == "per-layer"
    config = read({"mode": "quantile", "share": 0.1})
    assert (config.privacy.clipping.share, config.privacy.clipping.rate) == (0.1, 0.2)
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stratgy": 1}, "stratgy: there is no such option; did you mean 'strategy'?"),
        (
            {"model": {"id": "m", "max_lenght": 1}},
            "model.max_lenght: there is no such option; did you mean 'max_length'?",
        ),
        (
            {"clients": {"simulate": {"data": "d", "parts": 2, "aplha": 1}}},
            "clients.simulate.aplha: there is no such option; did you mean 'alpha'?",
        ),
        ({"privacy": {"epsilon": 1, "zzz": 2}}, "privacy.zzz: there is no such option (options: e"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_of_its_place(document, changes, message):
    assert message in refusal(document(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["one"]}, "labels: classification needs the declared label set, at least two"),
        ({"task": "causal-lm"}, "labels: causal-lm has no labels"),
        (
            {"task": "token-classification", "labels": ["O"]},
            "labels: token-classification needs the declared label set, at least two",
        ),
        (
            {"task": "token-classification", "labels": ["O", "I-WHO"]},
            "labels: 'I-WHO' marks entities, whose tags are 'O', 'B-NAME' and 'I-NAME' (BIO), and",
        ),
        (
            {
                "task": "token-classification",
                "labels": ["O", "B-WHO", "I-WHO", "B-X"],
                "task_labels": ["O", "B-WHO"],
            },
            "task_labels: without 'I-WHO' entities cannot be told from what is around them",
        ),
        (
            {"task": "token-classification", "model": {"id": "m", "pooling": "cls"}},
            "model.pooling: token-classification has a vector for each token and pools none, got",
        ),
        (
            {
                "task": "token-classification",
                "stop": {"metric": "entity_f1"},
                "evaluate": {"data": "d"},
            },
            "stop.metric: token-classification is not scored by 'entity_f1' (accuracy, macro_f1,",
        ),
        ({"labels": ["a", "b", "a"]}, "labels: the label set names a label twice"),
        ({"task_labels": ["bird"]}, "task_labels: 'bird' is not in labels (cat, dog, model, rank)"),
        ({"steps": 3, "epochs": 1}, "give steps or epochs, not both"),
        ({"privacy": {"epsilon": 1}, "epochs": 1}, "epochs: under privacy a round has a fixed num"),
        ({"start": "stack"}, "start: stack needs start_from, the version to start from"),
        ({"start": "continue"}, "start: continue needs start_from"),
        ({"regularizers": ["proximal", "proximal"]}, "regularizers: one is given twice"),
        ({"cohort": {"size": 3, "fraction": 0.5}}, "cohort: give size or fraction, not both"),
        ({"cohort": {"over_provision": 0.5}}, "cohort: over_provision asks more than a round need"),
        ({"cohort": 5, "quorum": 6}, "quorum: 6 is more than the cohort of 5"),
        (
            {"staleness": {"power": 1}},
            "staleness: late updates are dropped and weigh nothing; it n",
        ),
        ({"asynchronous": FEDBUFF, "late": "keep"}, "late: an asynchronous run keeps late updates"),
        ({"asynchronous": FEDBUFF, "cohort": 5}, "cohort: an asynchronous run asks concurrency"),
        ({"asynchronous": FEDBUFF, "quorum": 9}, "quorum: 9 is more than the buffer of 8"),
        (
            {"stop": {"metric": "loss"}},
            "stop: there is nothing to judge versions by; give evaluate",
        ),
        ({"select": "best"}, "select: best: there is nothing to judge versions by; give evaluate"),
        (
            {"stop": {"metric": "perplexity"}, "evaluate": {"data": "d"}},
            "stop.metric: classification is not scored by 'perplexity' (accuracy, macro_f1, loss,",
        ),
        ({"clients": {"names": ["a", "a"]}}, "clients.names: a client is named twice"),
        (
            {"backend": "superlink", "deadline_s": 2.5},
            "deadline_s: must be at least 5 with backend: superlink, where a site that was idle as",
        ),
        (
            {"privacy": {"epsilon": 1, "clipping": {"share": 0.1}}},
            "privacy.clipping: share is an option of mode quantile, got mode flat; leave it out",
        ),
        (
            {"privacy": {"epsilon": 1, "per_unit": 3}},
            "privacy: per_unit: 3 examples of one unit in a step need a unit that has several",
        ),
        (
            {"privacy": {"epsilon": 1, "unit": "person", "per_unit": 9}, "microbatch": 8},
            "privacy.per_unit: 9 examples that are clipped as one must fit into a microbatch, ",
        ),
    ],
)
def test_what_makes_no_sense_together_is_refused(document, changes, message):
    assert message in refusal(document(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Task 1"}, "name: must be 1 to 64 lower-case letters, digits, '.', '_' and '-'"),
        ({"model": None}, "model: is required"),
        ({"rounds": 0}, "rounds: input should be greater than or equal to 1, got 0"),
        (
            {"task": "regression"},
            "task: input should be 'classification', 'token-classification' or 'causal-",
        ),
        ({"privacy": {}}, "privacy: give either epsilon or noise_multiplier"),
        (
            {"privacy": {"epsilon": 1}, "stop": {"metric": "train_loss"}},
            "stop.metric: train_loss is what clients' data say, and under privacy no loss leaves",
        ),
        (
            {
                "privacy": {"epsilon": 1, "level": "client", "clip": 1, "report": {"loss": 4}},
                "stop": {"metric": "train_loss"},
            },
            "privacy: max_grad_norm, unit, clipping and report are of examples; at level: client",
        ),
        ({"privacy": {"epsilon": 1, "report": {"count": True}}}, "privacy.report.loss: is requ"),
        ({"privacy": {"epsilon": 1, "report": {"loss": 0}}}, "privacy.report.loss: input should"),
        ({"privacy": {"epsilon": 1, "noise_multiplier": 1}}, "privacy: give either epsilon or"),
        ({"privacy": {"epsilon": float("inf")}}, "privacy.epsilon: input should be a finite num"),
        ({"privacy": {"epsilon": 1, "max_grad_norm": float("nan")}}, "privacy.max_grad_norm: inp"),
        (
            {"regularizers": [{"name": "proximal", "mu": float("inf")}]},
            "the config.regularizers[0].mu must be a finite number, got inf",
        ),
        (
            {"optimizer": {"name": "adamw", "lr": 10**400}},
            f"optimizer 'adamw': lr must be float > 0, got {10**400}",
        ),
        (
            {"start_from": "\ud800"},
            "the config.start_from must be text that UTF-8 can write, got '\\ud800'",
        ),
        ({"cohort": "half"}, "cohort: must be a number of clients (8), a share of them (0.25), or"),
        ({"cohort": True}, "cohort: must be a number of clients (8), a share of them (0.25), or"),
        ({"cohort": 1.5}, "cohort.fraction: input should be less than or equal to 1, got 1.5"),
        (
            {"quorum": 0},
            "quorum: must be a number of updates (6) or a share of the cohort (0.8), g",
        ),
        ({"quorum": 1.5}, "quorum: must be a number of updates (6) or a share of the cohort (0.8)"),
        ({"asynchronous": {"buffer": 8}}, "asynchronous.concurrency: is required"),
        (
            {"backend": {"name": "ray", "deadline_s": 60}},
            "backend.deadline_s: there is no such option; it stands at the top, beside name",
        ),
        ({"clients": {}}, "clients: give exactly one of select (labels), names, simulate"),
        ({"clients": {"select": {}, "names": ["a"]}}, "clients: give exactly one of"),
        ({"clients": {"simulate": {"data": "d"}}}, "clients.simulate: by: iid needs parts: N"),
        (
            {"clients": {"simulate": {"data": "d", "by": "column"}}},
            "clients.simulate: by: column needs column: NAME",
        ),
    ],
)
def test_a_wrong_value_is_refused_where_it_stands(document, changes, message):
    assert message in refusal(document(**changes))


def test_every_mistake_is_listed_a_line_each(document):
    fields = refusal(document(rounds=0, cohort=-1, color="red")).splitlines()
    together = refusal(document(labels=["a", "a"], task_labels=["x"], start="stack")).splitlines()

    assert [line.split(":")[0] for line in fields] == ["rounds", "cohort.size", "color"]
    assert [line.split(":")[0] for line in together] == ["labels", "task_labels", "start"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "lorra"}, "no adapter is called 'lorra'; did you mean 'lora'?"),
        ({"strategy": "cat"}, "no strategy is called 'cat'; 'cat' is a merge"),
        ({"adapter": "o_lora"}, "no adapter is called 'o_lora'; 'o_lora' is a regularizer"),
        ({"optimizer": "proximl"}, "the nearest elsewhere is the regularizer 'proximal'"),
        ({"adapter": {"name": "lora", "rank": 8}}, "adapter 'lora' has no option 'rank'"),
        ({"adapter": {"name": "lora", "r": 0}}, "adapter 'lora': r must be >= 1, got 0"),
        ({"optimizer": {"name": "adamw", "lr": "fast"}}, "optimizer 'adamw': lr must be float"),
    ],
)
def test_a_plugin_and_its_options_are_checked_before_any_model(document, changes, message):
    assert message in refusal(document(**changes))


def test_a_hint_for_a_merge_finds_the_optimizer():
    with pytest.raises(UnknownPlugin, match="'sgd' is an optimizer"):
        find_plugin("merge", "sgd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file .*run.yaml; weft init writes one"),
        ("a: [1", "run.yaml is not YAML"),
        ("- a\n- b\n", "run.yaml must hold a mapping of options"),
        ("", "run.yaml must hold a mapping of options"),
        ("1: 2\n", "keys should be strings"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)

    with pytest.raises(BadConfig, match=message) as caught:
        load_config(path)

    assert len(str(caught.value).splitlines()) <= 6


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(BadConfig, match="cannot be read"):
        load_config(path)


def test_the_template_for_tags_is_a_config_that_passes_and_names_tagged_data(tmp_path):
    path = tmp_path / "run.yaml"
    write_template(path, task="token-classification")

    config = load_config(path, ["backend=inline"])

    assert (config.task, config.judge.metric) == ("token-classification", "entity_f1")
    assert config.labels == code_mentions.LABELS
    assert path.read_text().count("builtin:code-mentions?split=") == 2
    lines = [line.partition("# ")[2] for line in path.read_text().splitlines() if line[:2] == "# "]
    for option in ("task_labels", "stop"):
        [line] = [line for line in lines if line.startswith(option)]
        parse_config(yaml.safe_load(path.read_text()) | yaml.safe_load(line))


def test_there_is_no_template_for_what_no_built_in_data_serve(tmp_path):
    with pytest.raises(ValueError, match=r"no template for causal-lm, .*token-classification"):
        write_template(tmp_path / "run.yaml", task="causal-lm")


def test_the_template_is_a_config_that_passes(tmp_path):
    path = tmp_path / "run.yaml"
    write_template(path)

    config = load_config(path, ["backend=inline"])

    assert (config.strategy.name, config.privacy.epsilon) == ("fedsvd", 8)
    assert path.read_text() == TEMPLATE


def test_the_lines_that_the_template_comments_out_are_options_too():
    lines = [line.partition("# ")[2] for line in TEMPLATE.splitlines() if line.startswith("# ")]
    options = [line for line in lines if line.partition(":")[0].isidentifier()]
    document = yaml.safe_load(TEMPLATE)

    assert len(options) >= 5
    for line in options:
        parse_config(document | {"start_from": "task-0"} | yaml.safe_load(line))
    told = {line.partition(":")[0] for line in options}
    assert {"cohort", "quorum", "deadline_s", "late", "stop"} <= told


def test_the_template_is_not_written_over_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("mine")

    with pytest.raises(FileTaken, match="--force overwrites it"):
        write_template(path)

    assert path.read_text() == "mine"
    write_template(path, force=True)
    assert path.read_text() == TEMPLATE


def test_private_rounds_have_a_number_of_steps_by_themselves(document):
    assert parse_config(document()).local_steps is None
    assert parse_config(document(privacy={"epsilon": 1})).local_steps == 10
    assert parse_config(document(privacy={"epsilon": 1}, steps=3)).local_steps == 3


def test_an_override_inside_a_section_that_is_not_there_means_the_default_plugin(document):
    config = parse_config(document(adapter=None), ["adapter.r=16"])
    assert config.adapter.name == "lora"
    assert config.adapter.options == {"r": 16}


def test_a_plugin_without_a_name_is_refused(document):
    with pytest.raises(BadConfig, match=r"adapter\.name: is required"):
        parse_config(document(adapter={"r": 16}))


def test_text_that_no_message_can_hold_is_refused_all_the_same(document):
    """Pydantic fails at writing such a label into the message of its validator."""
    assert "labels[1] must be text that UTF-8 can write, got '\\ud800'" in refusal(
        document(labels=["cat", "\ud800"], task_labels=["dog"])
    )
