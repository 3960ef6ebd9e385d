"""Merges of versions of any kind: other layers, whole parameters, and what must be converted."""

from dataclasses import replace

import peft
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from clients.assignment import DataSpec, PluginChoice
from clients.evaluate import evaluate as score
from clients.linear_changes import linear_changes, weight_digests
from orchestrator import service
from orchestrator.merge_draft import draft
from orchestrator.merge_parts import Allow
from orchestrator.merging import BadMerge
from orchestrator.recipes import round_recipe
from orchestrator.versions import using
from strategies.energy import captured_energy
from strategies.tensors import lora_layers

CAT = PluginChoice("cat")
NORM = "encoder.layer.0.attention.output.LayerNorm"


@pytest.fixture
def commit(workspace, make_plan, tensors):
    """Return a function that commits a version of drawn tensors and of others, by id."""

    def make(seed, layers=("q",), more=None, adapter="lora", **options):
        plan = replace(make_plan(), adapter=PluginChoice(adapter, {"r": 2, **options}))
        made = tensors(seed, 2, layers) | (more or {})
        return workspace.store.commit(made, parents={}, recipe=round_recipe(plan, 1, []))

    return make


def dense(tensors):
    return {
        n: f.scaling.double() * f.b.double() @ f.a.double() for n, f in lora_layers(tensors).items()
    }


def test_other_layers_are_refused_and_with_union_count_as_zero(workspace, commit):
    one, two = commit(1, ("q", "v")), commit(2, ("q",))
    message = f"{one} and {two} change different layers: 'v' is in {one} only; --union"
    with pytest.raises(BadMerge, match=message):
        draft(workspace, [one, two], CAT)
    merged = dense(draft(workspace, [one, two], CAT, [2.0, 1.0], Allow(union=True)).merged)
    first, second = (dense(workspace.store.tensors(one)) for one in (one, two))
    assert_close(merged["v"], 2 * first["v"], rtol=1e-5, atol=1e-5)
    assert_close(merged["q"], 2 * first["q"] + second["q"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (PluginChoice("svd", {"rank": 1}), [3.0, -6.0, 1.0]),
        (PluginChoice("ties", {"density": 1.0}), [1.5, -3.0, 1.0]),
        (PluginChoice("magmax"), [2.0, -4.0, 1.0]),
    ],
)
def test_biases_and_whole_modules_are_merged_entry_by_entry(workspace, commit, method, expected):
    kinds = {"bias": "lora_only", "modules_to_save": ["LayerNorm"]}
    names = {"q.shift.bias": (3,), f"{NORM}.shift.weight": (3, 1)}
    refs = []
    for seed, factor, last in ((1, 1.0, 1.0), (2, 2.0, 0.0)):
        values = torch.tensor([factor, -2 * factor, last])
        refs.append(commit(seed, more={n: values.reshape(s) for n, s in names.items()}, **kinds))
    version = service.merge(workspace, refs, method, "both")
    merged = workspace.store.tensors(version)
    for name, shape in names.items():
        assert_close(merged[name], torch.tensor(expected).reshape(shape))
    assert workspace.store.version(version).recipe["adapter"]["options"]["bias"] == "lora_only"


def test_whole_parameters_of_different_kinds_are_refused(workspace, commit):
    shift = {"q.shift.bias": torch.ones(3)}
    one = commit(1, more=shift, bias="lora_only", modules_to_save=[])
    two = commit(2, more=shift, bias="all", modules_to_save=[])
    with pytest.raises(BadMerge, match="train different biases or modules whole"):
        draft(workspace, [one, two], CAT)


def test_a_made_merge_has_all_that_its_energy_is_measured_from_and_writes_nothing(
    workspace, commit
):
    refs = [commit(1), commit(2)]
    before = workspace.store.versions()
    made = draft(workspace, refs, PluginChoice("svd", {"rank": 1}), [1.0, -0.5])
    assert captured_energy(made.vectors, made.weights, made.merged) == pytest.approx(made.metrics)
    assert workspace.store.versions() == before
    version = service.merge(workspace, refs, PluginChoice("svd", {"rank": 1}), "x", [1.0, -0.5])
    assert workspace.store.version(version).recipe == made.recipe


def test_a_dora_is_merged_as_the_nearest_lora_which_says_how_near(home, tiny, notes):
    adapter = {"name": "dora", "r": 2, "layers": [0]}
    refs = [service.launch(home, tiny(name=f"task-{n}", adapter=adapter, seed=n)) for n in (1, 2)]
    with pytest.raises(BadMerge, match="is a dora adapter, which is not a plain product B A; --co"):
        service.merge(home, refs, CAT, "both")

    version = service.merge(home, refs, CAT, "both", [0.5, 0.5], Allow(convert=True, rank=32))

    found = home.store.version(version)
    told = {k: v for k, v in found.metrics.items() if k.startswith("converted_energy/")}
    assert told == {f"converted_energy/{ref[:12]}": pytest.approx(1) for ref in refs}
    assert found.recipe["adapter"]["name"] == "lora"
    assert found.recipe["converted"] == {ref: {"from": "dora", "rank": 32} for ref in refs}
    data = DataSpec(notes("test"))
    made = draft(home, refs, CAT, [0.5, 0.5], Allow(convert=True, rank=32))
    stored = service.evaluate(home, version, data)
    assert score(
        using(home, made.version, made.effective(home.store), data)
    ).metrics == pytest.approx(stored.metrics)


def test_a_method_that_weft_does_not_train_is_merged_through_conversion(
    home, tiny_decoder, tmp_path
):
    refs, changes = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_decoder)
        untouched = weight_digests(base)
        config = peft.LoHaConfig(
            r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_weights=False
        )
        model = peft.get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path / str(seed))
        prefix = "base_model.model."
        changes.append(dict(linear_changes(model, prefix, untouched)))
        service.import_adapter(home, tmp_path / str(seed), f"bot-{seed}", base=str(tiny_decoder))
        refs.append(f"bot-{seed}")
    allow = Allow(convert=True, rank=4)

    made = draft(home, refs, PluginChoice("task-arithmetic"), [1.0, -1.0], allow)

    for name, change in dense(made.merged).items():
        expected = (changes[0][name] - changes[1][name]).double()
        assert_close(change, expected, rtol=1e-3, atol=1e-3 * float(expected.norm()))
    assert made.recipe["converted"][made.parts[0].id] == {"from": "loha", "rank": 4}
