"""Merges beside PEFT's ``add_weighted_adapter``: where that is wrong, ours is right.

Both are held against the dense sum of the adapters' changes, and ours after export and loading.
"""

import peft
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from clients.assignment import PluginChoice
from orchestrator import service

IDS = torch.tensor([[2, 9, 11, 40, 3, 17]])
TARGETS = ["q_proj", "v_proj"]


def adapters(base, rslora, shared):
    """A PEFT model with two trained adapters, of one A where they are to share it."""
    model = None
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=4,
            lora_alpha=8 if seed else 4,
            use_rslora=rslora,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        if model is None:
            loaded = AutoModelForCausalLM.from_pretrained(base)
            model = peft.get_peft_model(loaded, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    if shared:
        for module in layers(model):
            module.lora_A["b"].weight.data.copy_(module.lora_A["a"].weight.data)
    return model.eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]


def change(model, name):
    return torch.cat([m.get_delta_weight(name).flatten() for m in layers(model)]).detach()


@pytest.fixture
def ours(home, tmp_path, tiny_decoder):
    """Return a function that merges a model's adapters through weft and loads the export."""

    def merged(model, method, weights):
        folder = tmp_path / str(len(home.store.versions()))
        model.save_pretrained(folder, selected_adapters=["a", "b"])
        for name in "ab":
            service.import_adapter(home, folder / name, name, base=str(tiny_decoder))
        service.merge(home, ["a", "b"], method, "both", weights)
        service.export(home, "both", folder / "both")
        base = AutoModelForCausalLM.from_pretrained(tiny_decoder)
        return peft.PeftModel.from_pretrained(base, folder / "both").eval()

    return merged


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def summed(model, weights):
    """Logits with the dense sum in the base weights."""
    base = AutoModelForCausalLM.from_pretrained(model.base_model.model.config._name_or_path)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            parts = [w * module.get_delta_weight(n) for n, w in zip("ab", weights, strict=True)]
            base.get_submodule(name).weight.data += sum(parts).detach()
    return logits(base.eval())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_cat_and_svd_of_rslora_are_the_sum_and_peft_s_are_root_r_times_that(
    ours, tiny_decoder, rslora
):
    weights = [0.5, 1.5]
    model = adapters(tiny_decoder, rslora, shared=False)
    exact = 0.5 * change(model, "a") + 1.5 * change(model, "b")
    model.add_weighted_adapter(["a", "b"], weights, "cat", combination_type="cat")
    model.add_weighted_adapter(["a", "b"], weights, "svd", combination_type="svd", svd_rank=8)
    wrong = 8**0.5 if rslora else 1.0  # PEFT copies use_rslora and sets alpha to the rank
    for name in ("cat", "svd"):
        assert_close(change(model, name), wrong * exact, rtol=1e-3, atol=1e-4)
        model.delete_adapter(name)
    merged = ours(model, PluginChoice("svd", {"rank": 8}), weights)
    assert_close(change(merged, "default"), exact, rtol=1e-4, atol=1e-5)
    assert_close(logits(merged), summed(model, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_linear_over_a_shared_a_is_the_mean_and_peft_s_is_twice_it(ours, tiny_decoder):
    model = adapters(tiny_decoder, rslora=False, shared=True)
    for module in layers(model):
        module.scaling["b"] = module.scaling["a"]
    model.peft_config["b"].lora_alpha = model.peft_config["a"].lora_alpha
    exact = (change(model, "a") + change(model, "b")) / 2
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "theirs", combination_type="linear")
    assert_close(change(model, "theirs"), 2 * exact, rtol=1e-4, atol=1e-5)
    model.delete_adapter("theirs")
    merged = ours(model, PluginChoice("linear"), [0.5, 0.5])
    assert_close(change(merged, "default"), exact, rtol=1e-4, atol=1e-5)
    assert_close(logits(merged), summed(model, [0.5, 0.5]), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ties_does_not_depend_on_the_gauge_of_the_factors_and_peft_s_does(ours, tiny_decoder):
    """``(B G^-1)(G A)`` is the same adapter."""
    model = adapters(tiny_decoder, rslora=False, shared=False)
    options = {"combination_type": "ties", "density": 0.3}
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "before", **options)
    theirs = change(model, "before")
    ties = PluginChoice("ties", {"density": 0.3})
    before = change(ours(model, ties, None), "default")
    for module in layers(model):
        module.lora_A["b"].weight.data[0] *= 8
        module.lora_B["b"].weight.data[:, 0] /= 8
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "after", **options)
    assert (change(model, "after") - theirs).norm() > 0.05 * theirs.norm()
    after = change(ours(model, ties, None), "default")
    assert_close(after, before, rtol=1e-3, atol=1e-4 * float(before.norm()))
