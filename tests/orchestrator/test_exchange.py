"""Adapters come in, go out, and are vouched for: through the service, on tiny models."""

import json
import logging
import warnings

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from clients.assignment import DataSpec, PluginChoice
from clients.importing import NotImportable
from orchestrator import service, signing
from orchestrator.config import parse_config
from orchestrator.manifest import check_manifest
from orchestrator.merging import NotAModel
from orchestrator.signing import BadPolicy, Unsigned
from storage.encoding import BadTensor
from storage.keys import UnknownKey
from storage.refs import BadName

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def outside(tiny_decoder, tmp_path):
    """Make a folder as somebody would who has never heard of weft."""

    def make(config=None, seed=0, name="outside"):
        torch.manual_seed(seed)
        given = config or peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        backbone = AutoModelForCausalLM.from_pretrained(tiny_decoder)
        model = peft.get_peft_model(backbone, given)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def ia3(outside):
    settings = {"target_modules": ["k_proj"], "feedforward_modules": []}
    return outside(peft.IA3Config(task_type="CAUSAL_LM", **settings), name="ia3")


@pytest.fixture
def norms(outside):
    layers = {"target_modules": ["input_layernorm"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        return outside(peft.LNTuningConfig(task_type="CAUSAL_LM", **layers), name="norms")


# --- import -----------------------------------------------------------------------------------


def test_an_import_is_a_version_with_the_digests_of_its_files(home, outside):
    made = service.import_adapter(home, outside(), "bot")
    version = home.store.version("bot")

    assert (made.version, made.name, made.parent, made.kept) == (version.id, "bot:v1", None, "")
    assert version.recipe["kind"] == "import"
    assert version.recipe["source"]["files"].keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert version.recipe["model"]["id"] is None  # a path is no part of a recipe
    assert str(outside()) not in json.dumps(version.recipe)


def test_the_same_folder_is_the_same_version(home, outside):
    first = service.import_adapter(home, outside(), "bot")
    again = service.import_adapter(home, outside(), "bot")
    other = service.import_adapter(home, outside(seed=1), "bot")
    assert (again.version, again.name, other.name) == (first.version, "bot:v1", "bot:v2")


def test_imports_are_merged_with_what_weft_trained_and_scored(home, outside, tmp_path):
    for seed, name in enumerate(("one", "two")):
        service.import_adapter(home, outside(seed=seed, name=name), name)
    service.merge(home, ["one", "two"], PluginChoice("cat"), "both")
    (tmp_path / "text.jsonl").write_text('{"text": "the adapter learns"}\n' * 4)

    found = service.evaluate(home, "both", DataSpec(f"jsonl:{tmp_path}/text.jsonl"))
    assert found.metrics["loss"] > 0
    kinds = sorted(v.recipe["kind"] for v in service.lineage(home, "both").lineage.nodes.values())
    assert kinds == ["import", "import", "merge"]


@pytest.mark.parametrize("start", ["stack", "continue"])
def test_a_run_goes_on_from_an_import(home, outside, tiny_decoder, tmp_path, start):
    service.import_adapter(home, outside(), "bot")
    (tmp_path / "text.jsonl").write_text('{"text": "the adapter learns"}\n' * 4)
    options = home.store.version("bot").recipe["adapter"]["options"]
    config = parse_config(
        {
            "name": "more",
            "model": {"id": str(tiny_decoder), "max_length": 16},
            "task": "causal-lm",
            "adapter": {"name": "lora", **options} if start == "continue" else "lora",
            "strategy": "fedavg",
            "start": start,
            "start_from": "bot",
            "rounds": 1,
            "steps": 1,
            "batch_size": 2,
            "clients": {
                "simulate": {"data": f"jsonl:{tmp_path}/text.jsonl", "by": "iid", "parts": 2}
            },
            "backend": "inline",
        }
    )
    version = service.launch(home, config)
    edges = {edge.kind for edge in home.store.lineage(version).edges}
    assert edges == {start, "init"}


def test_an_unaltered_export_comes_back_as_a_child_of_its_version(home, tiny, tmp_path):
    privacy = {"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7}
    version = service.launch(home, tiny(privacy=privacy))
    service.export(home, version, tmp_path / "out")
    made = service.import_adapter(home, tmp_path / "out", "back")

    assert made.parent == version
    assert [e.kind for e in home.store.lineage(made.version, depth=1).edges] == ["import"]
    spent = [
        [e.epsilon for e in service.lineage(home, v).epsilons] for v in (version, made.version)
    ]
    assert spent[0] == spent[1] != []
    ours, theirs = home.store.tensors(version), home.store.tensors(made.version)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_export_of_another_store_names_the_version_without_a_parent(
    home, outside, tmp_path, monkeypatch
):
    service.import_adapter(home, outside(), "bot")
    service.export(home, "bot", tmp_path / "out")
    elsewhere = service.open_workspace(tmp_path / "elsewhere")
    made = service.import_adapter(elsewhere, tmp_path / "out", "bot")
    assert made.parent is None
    source = elsewhere.store.version(made.version).recipe["source"]
    assert source["version"] == home.store.resolve("bot")
    elsewhere.close()


def test_an_altered_export_is_refused(home, outside, tmp_path):
    service.import_adapter(home, outside(), "bot")
    service.export(home, "bot", tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    save_file({n: 2 * t for n, t in load_file(path).items()}, path)
    with pytest.raises(NotImportable, match=r"adapter_model\.safetensors was altered.*remove weft"):
        service.import_adapter(home, tmp_path / "out", "worse")
    assert [row.name for row in home.store.names()] == ["bot"]


def test_values_that_are_not_finite_are_refused(home, outside):
    folder = outside()
    path = folder / "adapter_model.safetensors"
    save_file({n: t * torch.nan for n, t in load_file(path).items()}, path)
    with pytest.raises(BadTensor, match="values that are not finite"):
        service.import_adapter(home, folder, "bot")
    assert home.store.versions() == []


@pytest.mark.parametrize("name", ["../bot", "Bot", "x" * 10_000, "bot:v1", "b\u0430t"])
def test_a_hostile_name_is_refused_before_anything_is_read(home, tmp_path, name):
    with pytest.raises(BadName):
        service.import_adapter(home, tmp_path / "nothing", name)


def test_another_method_is_kept_and_exported_as_it_came(home, ia3, tmp_path):
    made = service.import_adapter(home, ia3, "bot")
    assert made.kept == "weft trains no IA3"
    service.export(home, "bot", tmp_path / "out")

    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (ia3, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.peft_config["default"].peft_type == "IA3"
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["tags"] == ["weft", "ia3"]
    back = service.import_adapter(home, tmp_path / "out", "bot")
    assert back.parent == made.version


@pytest.mark.parametrize("use", ["evaluate", "merge", "train on"])
def test_what_is_kept_is_used_for_nothing_that_weft_cannot_do(
    home, ia3, outside, tiny_decoder, use, document
):
    service.import_adapter(home, ia3, "bot")
    service.import_adapter(home, outside(), "lora")
    uses = {
        "evaluate": lambda: service.evaluate(home, "bot", DataSpec("jsonl:x")),
        "merge": lambda: service.merge(home, ["lora", "bot"], PluginChoice("cat"), "x"),
        "train on": lambda: service.launch(
            home,
            parse_config(
                document(
                    model=str(tiny_decoder),
                    task="causal-lm",
                    labels=None,
                    start="stack",
                    start_from="bot",
                )
            ),
        ),
    }
    with pytest.raises(NotAModel, match="is a ia3 adapter that weft keeps in PEFT's own format"):
        uses[use]()


# --- export -----------------------------------------------------------------------------------


def test_an_export_says_what_it_is_made_of(home, tiny, notes, tmp_path):
    privacy = {"noise_multiplier": 1.0, "delta": 1e-3, "insecure_seed": 7}
    version = service.launch(
        home, tiny(privacy=privacy, rounds=2, evaluate={"data": notes("test", shift=5)})
    )
    service.export(home, "task-1", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()

    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["weft", "lora"],
    }
    assert "# task-1:v1" in card
    assert f"Version `{version}`" in card
    assert "| strategy | fedavg" in card
    assert "- client updates: a (2), b (2)" in card
    assert "- versions: init (1), round (1)" in card
    [epsilon] = [e for e in service.lineage(home, version).epsilons if e.population == "a"]
    assert f"- a: {epsilon}" in card
    accuracy = home.store.version(version).metrics["accuracy"]
    assert f"| accuracy | {accuracy:.4g} |" in card


def test_the_manifest_of_an_export_covers_every_file(home, outside, tmp_path):
    service.import_adapter(home, outside(), "bot")
    files = service.export(home, "bot", tmp_path / "out").files
    checked = check_manifest(tmp_path / "out")

    assert checked.problems == ()
    assert len(checked.facts["files"]) == len(files) - 1
    version = home.store.version("bot")
    assert checked.version == version.id
    assert checked.facts["base"]["hash"] == version.recipe["model"]["hash"]
    assert (
        checked.facts["tokenizer"]
        == json.loads((tmp_path / "out/weft.json").read_text())["tokenizer"]
    )


def test_a_failed_signature_leaves_no_export(home, outside, tmp_path):
    service.import_adapter(home, outside(), "bot")
    with pytest.raises(UnknownKey):
        service.export(home, "bot", tmp_path / "out", sign="nobody")
    assert not (tmp_path / "out").exists()


# --- export as LoRA ---------------------------------------------------------------------------


def test_another_method_is_exported_as_lora_with_the_energy_that_it_keeps(
    home, outside, read, ok, tmp_path
):
    torch.manual_seed(0)
    folder = outside(peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    kept = service.import_adapter(home, folder, "bot")
    assert kept.kept == "weft trains no LOHA"
    said = read("export", "bot", tmp_path / "cut", "--as", "lora", "--rank", "4")
    ok("export", "bot", tmp_path / "whole", "--as", "lora", "--rank", "32")

    converted = said["converted"]
    facts = json.loads((tmp_path / "cut" / "weft.json").read_text())
    assert facts["converted"] == converted
    assert {layer["rank"] for layer in converted["layers"].values()} == {4}
    assert 0 < converted["energy"] < 0.999
    listed = check_manifest(tmp_path / "cut")
    assert listed.problems == ()
    assert listed.facts["converted"] == {"from": "loha", "energy": converted["energy"]}
    card = (tmp_path / "cut" / "README.md").read_text()
    assert f"LoRA keeps {100 * converted['energy']:.2f} % of the energy" in card
    assert "| `model.layers.1.self_attn.v_proj` | 4 | " in card
    ids = torch.tensor([[2, 9, 11, 40, 3]])
    with torch.no_grad():
        was, whole, cut = (
            peft.AutoPeftModelForCausalLM.from_pretrained(path).eval()(input_ids=ids).logits
            for path in (folder, tmp_path / "whole", tmp_path / "cut")
        )
    torch.testing.assert_close(whole, was, rtol=0, atol=1e-3)
    assert (cut - was).abs().max() > 0.01

    back = service.import_adapter(home, tmp_path / "cut", "bot")
    assert (back.parent, back.kept) == (kept.version, "")  # and can be trained on, merged, scored


def test_what_weft_trained_is_cut_to_a_rank_with_its_head(home, tiny, ok, tmp_path):
    service.launch(home, tiny(adapter={"name": "dora", "r": 2, "layers": [0]}))
    said = ok("export", "task-1", tmp_path / "dora", "--as", "lora", "--rank", "1")
    assert "all" in said.splitlines()[-2]
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    assert (config["r"], config["use_dora"]) == (1, False)
    assert (tmp_path / "dora" / "head.safetensors").exists()
    service.launch(home, tiny(name="plain"))
    service.export(home, "plain", tmp_path / "plain", to=service.AsLora())
    facts = json.loads((tmp_path / "plain" / "weft.json").read_text())
    assert {layer["rank"] for layer in facts["converted"]["layers"].values()} == {2}
    assert facts["converted"]["energy"] == pytest.approx(1)


def test_what_is_no_lora_is_refused_by_name_and_leaves_nothing(home, norms, refused, tmp_path):
    service.import_adapter(home, norms, "bot")
    said = refused("export", "bot", tmp_path / "out", "--as", "lora")
    assert "ln_tuning cannot be exported as LoRA: it changes model.layers.0.input" in said
    assert not (tmp_path / "out").exists()
    service.export(home, "bot", tmp_path / "out")


# --- signatures -------------------------------------------------------------------------------


@pytest.fixture
def signed(home, outside):
    """Return a home with the key alice, and an unsigned version that is in production."""
    service.import_adapter(home, outside(), "bot")
    service.promote(home, "bot", "production", "bot", why="a test")
    signing.keys(home.home).new("alice")
    return home


def test_nothing_is_asked_for_by_default(signed, tmp_path, caplog):
    assert signing.policy(signed.home) == "off"
    assert service.export(signed, "bot", tmp_path / "out")
    assert caplog.text == ""


def test_what_is_not_signed_is_neither_loaded_nor_exported_where_it_must_be(signed, tmp_path):
    signing.set_policy(signed.home, "require")
    uses = [
        lambda: service.export(signed, "bot", tmp_path / "out"),
        lambda: service.evaluate(signed, "bot", DataSpec("jsonl:x")),
        lambda: service.evaluate_many(signed, [(signed.store.version("bot"), DataSpec("x"))]),
        lambda: service.merge(signed, ["bot", "bot"], PluginChoice("cat"), "x"),
    ]
    for use in uses:
        with pytest.raises(Unsigned, match="sign it with: weft sign "):
            use()
    assert not (tmp_path / "out").exists()

    signing.sign(signed, "bot")
    assert service.export(signed, "bot", tmp_path / "out")


def test_a_run_does_not_start_from_an_unsigned_version(signed, tiny):
    signing.set_policy(signed.home, "require")
    with pytest.raises(Unsigned):
        service.launch(signed, tiny(start="stack", start_from="bot"))
    assert signed.ledger.runs() == []


def test_an_alias_needs_its_last_move_signed_too(signed, outside):
    signing.set_policy(signed.home, "require")
    signing.sign(signed, "bot")
    with pytest.raises(Unsigned, match="the last move of bot@production has no signature"):
        service.admitted(signed, "bot@production")

    assert signing.sign(signed, "bot@production").keys() == {"version", "alias"}
    assert service.admitted(signed, "bot@production").names == ("bot:v1",)

    signing.set_policy(signed.home, "off")
    service.import_adapter(signed, outside(seed=1, name="other"), "bot")
    service.promote(signed, "bot", "production", "bot:v2", why="another")
    service.promote(signed, "bot", "production", "bot:v1", why="back")
    signing.set_policy(signed.home, "require")
    with pytest.raises(Unsigned):  # it points where it pointed, but by another move
        service.admitted(signed, "bot@production")


def test_a_move_is_signed_as_it_is_made(signed, ok, refused, outside):
    signing.set_policy(signed.home, "require")
    ok("promote", "bot:v1", "--to", "live", "--sign", "alice")
    assert service.admitted(signed, "bot@live").names == ("bot:v1",)
    signing.set_policy(signed.home, "off")
    service.import_adapter(signed, outside(seed=1, name="other"), "bot")
    signing.set_policy(signed.home, "require")
    ok("promote", "bot:v2", "--to", "live")
    with pytest.raises(Unsigned):
        service.admitted(signed, "bot@live")
    ok("rollback", "bot@live", "--sign", "alice")
    assert service.admitted(signed, "bot@live").names == ("bot:v1",)
    assert signing.signers(signed, "bot:v2") == {"version": None}


def test_a_key_that_cannot_sign_moves_nothing(signed, refused, tmp_path):
    public = signing.keys(tmp_path / "other").new("bob").public
    signing.keys(signed.home).trust("bob", public)
    before = signed.store.promotions("bot", "production")
    for key, problem in (("bob", "the private half of key 'bob' is not here"), ("al", "no key is")):
        assert problem in refused("promote", "bot", "--to", "production", "--sign", key)
        assert problem in refused("rollback", "bot@production", "--sign", key)
    assert signed.store.promotions("bot", "production") == before


def test_another_s_move_that_comes_between_is_not_signed(signed):
    def move():
        made = service.promote(signed, "bot", "production", "bot", why="mine")
        service.promote(signed, "bot", "production", "bot", why="another's")
        return made

    service.signed(signed, "bot@production", "alice", move)
    assert signing.signers(signed, "bot@production")["alias"] is None
    assert signing.signers(signed, "bot@production")["version"].name == "alice"


def test_a_warning_names_what_is_missing_and_lets_it_pass(signed, tmp_path, caplog):
    signing.set_policy(signed.home, "warn")
    with caplog.at_level(logging.WARNING):
        assert service.export(signed, "bot", tmp_path / "out")
    assert "has no signature by a trusted key; sign it with: weft sign bot" in caplog.text


def test_a_key_that_is_trusted_no_more_signs_nothing(signed):
    signing.sign(signed, "bot")
    signing.set_policy(signed.home, "require")
    service.admitted(signed, "bot")
    signing.keys(signed.home).distrust("alice")
    with pytest.raises(Unsigned):
        service.admitted(signed, "bot")


def test_the_stricter_policy_holds(signed, monkeypatch):
    signing.set_policy(signed.home, "warn")
    monkeypatch.setenv("WEFT_SIGNATURES", "require")
    assert signing.policy(signed.home) == "require"
    monkeypatch.setenv("WEFT_SIGNATURES", "off")
    assert signing.policy(signed.home) == "warn"


def test_a_policy_that_cannot_be_read_lets_nothing_pass(signed, monkeypatch):
    (signed.home / "keys" / "policy").write_text("requir")
    with pytest.raises(BadPolicy, match=r"must be one of off, warn, require, got 'requir'"):
        service.admitted(signed, "bot")


def test_an_import_must_be_signed_where_the_policy_says_so(signed, outside, tmp_path):
    service.export(signed, "bot", tmp_path / "plain")
    service.export(signed, "bot", tmp_path / "signed", sign="alice")
    signing.set_policy(signed.home, "require")
    for folder in (outside(), tmp_path / "plain"):
        with pytest.raises(Unsigned):
            service.import_adapter(signed, folder, "back")
    assert service.import_adapter(signed, tmp_path / "signed", "back").name == "back:v1"


# --- the command line -------------------------------------------------------------------------


def test_the_commands_take_an_adapter_in_and_let_it_out_signed(
    ok, read, refused, weft, outside, tmp_path
):
    assert "bot:v1  " in ok("import", outside(), "--name", "bot")
    public = ok("keys", "new", "alice").split()[1]
    assert ok("keys", "show", "alice").strip() == public
    assert "policy: require" in ok("keys", "policy", "require")
    assert read("keys", "list")["policy"] == "require"
    assert "has no signature" in refused("export", "bot", tmp_path / "out")

    assert "signed version" in ok("sign", "bot")
    ok("export", "bot", tmp_path / "out", "--sign", "alice")
    assert "signed by alice" in ok("verify", tmp_path / "out")
    assert read("verify", tmp_path / "out", "--key", public)["problems"] == []

    (tmp_path / "out" / "weft.json").write_text("{}")
    code, said, error = weft("verify", tmp_path / "out")
    assert (code, said) == (2, "")
    assert "weft.json was altered" in error
    code, said, _ = weft("verify", tmp_path / "out", "--json")
    assert (code, len(json.loads(said)["problems"])) == (2, 1)


def test_verifying_needs_neither_home_nor_database(home, outside, tmp_path, weft, monkeypatch):
    service.import_adapter(home, outside(), "bot")
    key = signing.keys(home.home).new("alice")
    service.export(home, "bot", tmp_path / "out", sign="alice")
    monkeypatch.setenv("WEFT_HOME", str(tmp_path / "bare"))
    monkeypatch.setenv("WEFT_DATABASE", "postgresql://nobody@nowhere/none")

    code, said, _ = weft("verify", tmp_path / "out", "--key", key.public)
    assert (code, "signed by" in said) == (0, True)
    assert not (tmp_path / "bare").exists()
    other = signing.keys(tmp_path / "other").new("bob").public
    code, _, error = weft("verify", tmp_path / "out", "--key", other)
    assert (code, "none of its 1 signatures is good" in error) == (2, True)


def test_keys_are_trusted_and_distrusted(ok, read, refused, tmp_path):
    public = signing.keys(tmp_path / "other").new("bob").public
    ok("keys", "trust", "robert", public)
    assert [(k["name"], k["private"]) for k in read("keys", "list")["keys"]] == [("robert", False)]
    assert "is trusted no more" in ok("keys", "distrust", "robert")
    assert "no key is called 'robert'" in refused("keys", "show", "robert")
    assert "must be one of off, warn, require, got 'maybe'" in refused("keys", "policy", "maybe")


def test_a_method_that_weft_lacks_is_kept_and_said(ok, ia3):
    assert "kept in PEFT's own format: weft trains no IA3" in ok("import", ia3, "--name", "bot")
    assert "import of ia3" in ok("lineage", "bot")
