import re

import torch

from strategies.base import ClientSpec
from strategies.fedsa_lora import FedSALoRA


def test_a_and_head_travel_and_b_stays(make_adapter):
    sent = FedSALoRA().broadcast(FedSALoRA().init(make_adapter()), ClientSpec("a"))
    trained = {n for n in sent.tensors if re.fullmatch(sent.trainable, n)}
    stays = {n for n in trained if re.fullmatch(sent.personal, n)}
    assert stays == {n for n in sent.tensors if ".lora_B." in n}
    assert trained - stays == {n for n in sent.tensors if ".lora_A." in n or n.startswith("head.")}


def test_the_server_averages_a_and_leaves_b_as_it_was(make_adapter, make_update):
    state = FedSALoRA().init(make_adapter(dtype=torch.float64))
    updates = []
    for seed, count in ((1, 1), (2, 3)):
        made = make_adapter(seed, dtype=torch.float64)
        sent = {n: t for n, t in made.items() if ".lora_A." in n or n.startswith("head.")}
        updates.append(make_update(sent, str(seed), count))
    after = FedSALoRA().aggregate(state, updates).adapter
    for name, tensor in after.items():
        if name in updates[0].tensors:
            mean = (updates[0].tensors[name] + 3 * updates[1].tensors[name]) / 4
            torch.testing.assert_close(tensor, mean)
        else:
            assert tensor is state.adapter[name]
