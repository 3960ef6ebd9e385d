"""A batch of different adapters computes what each of them computes alone."""

import pytest
import torch

from clients.serving.bank import BASE, Bank
from clients.serving.changes import Unservable, changes_of
from tests.clients.serving.conftest import KINDS, attached

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def bank(decoder):
    made = Bank(decoder.backbone)
    yield made
    made.close()


def alone(decoder, kind, seed, ids, mask, targets=TARGETS):
    """Return the logits of one adapter by itself, as training attaches it, and its tensors."""
    adapter, model, tensors = attached(decoder.backbone, kind, seed, targets)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    adapter.detach(model)
    return logits, tensors


def tokens(rows, length=7):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 200, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row % 3 :] = 0
    return ids, mask


def logits_of(decoder, bank, slots, ids, mask):
    with torch.no_grad(), bank.using(slots):
        return decoder.backbone(input_ids=ids, attention_mask=mask).logits


def test_a_mixed_batch_computes_what_each_adapter_computes_alone(decoder, bank):
    kinds = [kind for kind in KINDS if kind != "biases"]  # a Llama's layers have none
    ids, mask = tokens(len(kinds) + 1)
    with torch.no_grad():
        wanted = [decoder.backbone(input_ids=ids, attention_mask=mask).logits]
    slots = [BASE]
    for seed, kind in enumerate(kinds):
        logits, tensors = alone(decoder, kind, seed, ids, mask)
        wanted.append(logits)
        slots.append(bank.put(changes_of(decoder.backbone, tensors)))
    found = logits_of(decoder, bank, slots, ids, mask)
    for row, logits in enumerate(wanted):
        real = mask[row].bool()
        torch.testing.assert_close(found[row, real], logits[row, real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[1], wanted[0][1], atol=1e-2)


def test_biases_and_heads_of_an_encoder_are_its_adapters_own(encoder):
    bank = Bank(encoder.backbone)
    ids, mask = tokens(3)
    ids = ids % 90 + 5
    slots, wanted = [], []
    for seed, kind in enumerate(("biases", "dora", "rank 2")):
        adapter, model, tensors = attached(encoder.backbone, kind, seed, ["query", "dense"])
        with torch.no_grad():
            wanted.append(model(input_ids=ids, attention_mask=mask).last_hidden_state)
        adapter.detach(model)
        slots.append(bank.put(changes_of(encoder.backbone, tensors)))
    with torch.no_grad(), bank.using(slots):
        found = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    bank.close()
    for row, hidden in enumerate(wanted):
        torch.testing.assert_close(found[row], hidden[row], atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_adapter_computes_what_it_computes_in_a_mixed_one(decoder, bank):
    ids, mask = tokens(3)
    slots = [
        bank.put(changes_of(decoder.backbone, alone(decoder, kind, 3, ids, mask)[1]))
        for kind in ("rank 2", "dora")
    ]
    for slot in slots:
        mixed = logits_of(decoder, bank, [slot, BASE, slots[0]], ids, mask)
        one = logits_of(decoder, bank, [slot] * 3, ids, mask)
        torch.testing.assert_close(one[0], mixed[0], atol=1e-5, rtol=1e-5)


def test_a_slot_that_was_dropped_leaves_nothing_to_who_gets_it_next(decoder, bank):
    ids, mask = tokens(2)
    _, dora = alone(decoder, "dora", 1, ids, mask)
    wanted, small = alone(decoder, "rslora", 2, ids, mask)  # of one layer alone
    first = bank.put(changes_of(decoder.backbone, dora))
    logits_of(decoder, bank, [first, BASE], ids, mask)
    bank.drop(first)
    assert bank.put(changes_of(decoder.backbone, small)) == first
    assert len(bank) == 1
    found = logits_of(decoder, bank, [first, BASE], ids, mask)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)


def test_a_closed_bank_leaves_the_base_model_as_it_was(decoder):
    ids, mask = tokens(1)
    with torch.no_grad():
        before = decoder.backbone(input_ids=ids, attention_mask=mask).logits
    bank = Bank(decoder.backbone)
    slot = bank.put(changes_of(decoder.backbone, alone(decoder, "rank 2", 1, ids, mask)[1]))
    assert not torch.equal(logits_of(decoder, bank, [slot], ids, mask), before)
    with torch.no_grad():  # outside of a batch nothing is added
        assert torch.equal(decoder.backbone(input_ids=ids, attention_mask=mask).logits, before)
    bank.close()
    assert all(not module._forward_hooks for module in decoder.backbone.modules())


def test_the_slot_of_the_base_model_cannot_be_dropped(bank):
    with pytest.raises(KeyError):
        bank.drop(BASE)


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.norm.shift.weight", torch.zeros(32), "trained model.norm.weight whole"),
        ("model.layers.0.self_attn.q_proj.invocation", torch.tensor([5]), "is an aLoRA"),
        ("model.layers.0.self_attn.q_proj.lora_core.weight", torch.zeros(2, 2), "no low-rank"),
        ("encoder.query.lora_A.weight", torch.zeros(2, 32), "no linear layer encoder.query"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(2, 31), "own base model"),
    ],
)
def test_what_cannot_be_batched_or_is_anothers_is_refused(decoder, name, tensor, reason):
    layer = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": torch.zeros(2, 32),
        f"{layer}.lora_B.weight": torch.zeros(32, 2),
        f"{layer}.scaling": torch.tensor(1.0),
    }
    with pytest.raises(Unservable, match=reason):
        changes_of(decoder.backbone, tensors | {name: tensor})
