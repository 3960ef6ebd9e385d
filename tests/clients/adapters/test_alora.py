"""aLoRA: nothing before the invocation is touched, everything from it on is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora.variants import calculate_alora_offsets
from transformers import AutoTokenizer

from clients import models
from clients.adapters import ADAPTERS
from clients.adapters.alora import NotInvoked, counts
from clients.adapters.peft import UnsupportedUnderlay
from clients.assignment import ModelSpec, PluginChoice, Privacy
from clients.export import NotExportable, export_peft
from clients.generation import answers
from clients.lora_layers import AdapterMismatch
from clients.tokens import Encoded
from clients.trainer import train
from strategies.plugins import BadOptions

LAYER = "model.layers.0.self_attn.q_proj"
IDS = torch.tensor([[5, 9, 11, 12, 8, 3], [11, 12, 6, 11, 12, 4], [7, 11, 9, 12, 3, 8]])
MASK = torch.ones_like(IDS)


@pytest.fixture
def spec(tiny_decoder):
    return ModelSpec(str(tiny_decoder), "causal-lm")


@pytest.fixture
def attach(spec):
    """Attach a method with factors that are not zero; detached afterwards."""
    made = []

    def attach(name="alora", spec=spec, underlay=None, **options):
        backbone = models.load(spec).backbone
        adapter = ADAPTERS.get(name).build(**{"r": 4, **options})
        made.append((adapter, backbone))
        torch.manual_seed(1)
        model = adapter.attach(backbone, underlay or {})
        source = torch.Generator().manual_seed(2)
        tensors = {
            n: t + 0.3 * torch.randn(t.shape, generator=source) if "lora_" in n else t
            for n, t in adapter.read(model).items()
        }
        adapter.write(model, tensors)
        return adapter, model, tensors

    yield attach
    for adapter, backbone in made:
        adapter.detach(backbone)


def logits(model, ids=IDS, mask=MASK) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def test_tokens_before_the_invocation_are_the_base_models(attach, spec):
    base = logits(models.load(spec).backbone)
    _, model, _ = attach(invocation=[11, 12])
    found = logits(model)
    assert torch.equal(found[0, :2], base[0, :2])
    assert not torch.isclose(found[0, 2:], base[0, 2:]).all(-1).any()


def test_the_last_invocation_counts(attach, spec):
    base = logits(models.load(spec).backbone)
    _, model, _ = attach(invocation=[11, 12])
    found = logits(model)
    assert torch.equal(found[1, :3], base[1, :3])
    assert not torch.isclose(found[1, 3:], base[1, 3:]).all(-1).any()


def test_a_sequence_without_the_invocation_is_the_base_models(attach, spec):
    base = logits(models.load(spec).backbone)
    _, model, _ = attach(invocation=[11, 12])
    assert torch.equal(logits(model)[2], base[2])


def test_an_invocation_at_the_first_token_makes_it_lora(attach):
    adapter, model, tensors = attach("lora")
    ids = torch.tensor([[11, 12, 8, 3, 9]])
    plain = logits(model, ids, torch.ones_like(ids))
    adapter.detach(model)
    _, model, ours = attach(invocation=[11, 12])
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())
    torch.testing.assert_close(logits(model, ids, torch.ones_like(ids)), plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_move_the_invocation(attach, side):
    _, model, _ = attach(invocation=[11, 12])
    alone = logits(model, IDS[:1], MASK[:1])
    pad = torch.zeros(1, 3, dtype=torch.long)
    order = (pad, IDS[:1]) if side == "left" else (IDS[:1], pad)
    mask = [torch.zeros_like(pad), MASK[:1]]
    padded = logits(model, torch.cat(order, 1), torch.cat(mask[:: 1 if side == "left" else -1], 1))
    kept = padded[:, 3:] if side == "left" else padded[:, :-3]
    torch.testing.assert_close(kept, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("invocation", [[11, 12], [11], [5], [3], [99], list(range(20))])
def test_offsets_are_those_of_peft(invocation):
    from peft import LoraConfig

    config = LoraConfig(alora_invocation_tokens=invocation, task_type="CAUSAL_LM")
    theirs = calculate_alora_offsets({"a": config}, "a", IDS)
    assert counts(IDS, invocation).tolist() == [offset or 0 for offset in theirs]


def test_tokens_before_the_invocation_give_no_gradient_to_the_layers(attach):
    adapter, model, _ = attach(invocation=[11, 12], target_modules=["q_proj"], layers=[1])
    model.train()
    for live in adapter.parameters(model).values():
        live.grad = None
    model(input_ids=IDS[:1], attention_mask=MASK[:1]).logits[0, :2].sum().backward()
    model.eval()
    assert all(not p.grad.any() for p in adapter.parameters(model).values())


def test_a_batch_without_any_invocation_is_refused(attach):
    adapter, model, _ = attach(invocation=[42])
    with pytest.raises(NotInvoked, match=r"none of a batch's 3 sequences has .* \[42\]"):
        adapter.refuse_batch(model, IDS)
    adapter.detach(model)
    adapter, model, _ = attach(invocation=[11, 12])
    adapter.refuse_batch(model, IDS)  # two of them have it


def test_training_says_that_the_data_lack_the_invocation_but_not_under_privacy(
    assign, tiny_decoder
):
    plain = assign(
        rows=[{"prompt": "a cat", "completion": "sings"}],
        model=ModelSpec(str(tiny_decoder), "causal-lm", max_length=16),
        adapter=PluginChoice("alora", {"r": 2, "invocation": [9, 9, 9]}),
    )
    with pytest.raises(NotInvoked):
        train(plain)
    private = replace(plain, privacy=Privacy(0.5, 1.0, 1.0, insecure_seed=1))
    assert train(private).spends


def test_gradient_checkpointing_recomputes_the_same(attach, spec, tiny_decoder):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        kind = ModelSpec(str(tiny_decoder), "causal-lm", gradient_checkpointing=checkpointing)
        adapter, model, _ = attach(spec=kind, invocation=[11, 12])
        model.train()
        model(input_ids=IDS, attention_mask=MASK).logits.square().sum().backward()
        model.eval()
        found = [p.grad.clone() for p in adapter.parameters(model).values()]
        adapter.detach(model)
        return found

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again)


def test_a_text_is_tokenised_by_the_base_models_tokenizer(attach, tiny_decoder):
    adapter, model, _ = attach(invocation=" thread*")
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    found = adapter.read(model)[f"{LAYER}.invocation"]
    assert found.dtype == torch.int64
    assert tokenizer.decode(found.tolist()) == " thread*"


def test_auto_is_what_the_chat_template_puts_before_an_answer(tiny_decoder, tmp_path, attach):
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    for file in tiny_decoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    adapter, model, _ = attach(spec=ModelSpec(str(tmp_path), "causal-lm"))
    ids = adapter.read(model)[f"{LAYER}.invocation"].tolist()
    assert tokenizer.decode(ids) == "<assistant>"


def test_auto_without_a_chat_template_is_refused(attach):
    with pytest.raises(BadOptions, match="'auto' is what the tokenizer's chat template puts"):
        attach()


@pytest.mark.parametrize("invocation", ["", [], [3, -1]])
def test_what_is_no_invocation_is_refused(invocation):
    with pytest.raises(BadOptions, match="invocation must be a text or token ids >= 0"):
        ADAPTERS.get("alora").build(invocation=invocation)


def test_detaching_takes_the_hook_away(attach):
    adapter, model, _ = attach(invocation=[11])
    before = len(model._forward_pre_hooks)
    adapter.detach(model)
    assert len(model._forward_pre_hooks) == before - 1


def test_the_invocation_is_written_with_the_factors(attach):
    adapter, model, tensors = attach(invocation=[11, 12])
    others = {n: torch.tensor([9, 12]) for n in tensors if n.endswith(".invocation")}
    before = logits(model)
    adapter.write(model, {**tensors, **others})
    assert not torch.allclose(logits(model)[2], before[2])
    assert adapter.read(model)[f"{LAYER}.invocation"].tolist() == [9, 12]


def test_layers_with_different_invocations_are_refused(attach):
    adapter, model, tensors = attach(invocation=[11, 12])
    mixed = {**tensors, f"{LAYER}.invocation": torch.tensor([3])}
    with pytest.raises(AdapterMismatch, match="the layers have different invocations"):
        adapter.write(model, mixed)


def test_plain_factors_are_not_taken_for_an_activated_adapter(attach):
    adapter, model, tensors = attach(invocation=[11])
    plain = {n: t for n, t in tensors.items() if not n.endswith(".invocation")}
    with pytest.raises(AdapterMismatch, match=r"has no tensor .*\.invocation; it was trained by"):
        adapter.write(model, plain)


def test_neither_stacks_on_the_other(attach):
    adapter, model, below = attach("lora")
    adapter.detach(model)
    with pytest.raises(UnsupportedUnderlay, match="alora cannot be trained on top of a frozen"):
        attach(invocation=[11], underlay=below)
    assert not any(type(h).__name__ == "_Activation" for h in model._forward_pre_hooks.values())
    adapter, model, below = attach(invocation=[11])
    adapter.detach(model)
    with pytest.raises(UnsupportedUnderlay, match=r"has .*invocation, so its delta is not low"):
        attach("lora", underlay=below)


def test_an_export_keeps_the_invocation(attach, spec, tmp_path):
    _, _, tensors = attach(invocation=[11, 12])
    given = {"spec": spec, "card": "An adapter.", "extra": {}}
    (tmp_path / "out").mkdir()
    export_peft(tmp_path / "out", tensors=tensors, **given)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [11, 12]
    mixed = {**tensors, f"{LAYER}.invocation": torch.tensor([3])}
    with pytest.raises(NotExportable, match="the layers have different invocations"):
        export_peft(tmp_path / "other", tensors=mixed, **given)


def test_an_answer_is_generated_with_the_adapter_acting_on_every_token_of_it(attach, spec):
    adapter, model, tensors = attach(invocation=[11, 12])
    loud = {n: 8 * t if n.endswith("lora_B.weight") else t for n, t in tensors.items()}
    adapter.write(model, loud)
    tokenizer = models.load(spec).tokenizer
    prompts = [torch.tensor([7, 9, 11, 12, 5]), torch.tensor([9, 11, 12]), torch.tensor([9, 5])]
    asked = [Encoded(ids, torch.full_like(ids, -100)) for ids in prompts]

    said = answers(model, tokenizer, asked, most=6)

    for ids, answer in zip(prompts, said, strict=True):
        whole = ids.tolist()
        for _ in range(6):
            whole.append(int(logits(model, torch.tensor([whole]), None)[0, -1].argmax()))
            if whole[-1] == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
