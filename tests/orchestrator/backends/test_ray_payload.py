"""An assignment on its way to a worker: nothing of it is lost."""

from dataclasses import fields, replace

import torch

from orchestrator.backends.ray_payload import joined, split
from orchestrator.plan import RoundInputs, plan_round
from strategies.base import Broadcast


class Key(str):
    """Stands for a reference to what a worker has."""

    def hex(self):
        return str(self)


def test_every_field_of_an_assignment_reaches_the_worker(make_plan, tmp_path):
    one = {"x": torch.ones(2)}
    sent = Broadcast(one, "x.*", "x", {"x": torch.zeros(2)}, {"teacher": torch.ones(1)})
    assert not [f.name for f in fields(Broadcast) if not getattr(sent, f.name)]
    inputs = RoundInputs(1, "f" * 64, {"under": torch.ones(1)}, {"m": torch.ones(1)}, str(tmp_path))
    plan = make_plan(clients=("a",))
    asked = replace(plan_round(plan, inputs, lambda c: sent, plan.participants)[0], seed=7)
    parts = {}

    def put(tensors, round_):
        parts[str(len(parts))] = tensors
        return Key(len(parts) - 1)

    work, *keys = split(asked, put)

    assert joined(work, parts).digest() == asked.digest()
    assert len(keys) == 5
