"""Runs in which a strategy's mask decides which entries clients train."""

import pytest
import torch

from clients.wire import unpack
from orchestrator import service
from orchestrator.backends.inline import InlineBackend


def test_a_private_run_trains_on_the_mask_alone_and_is_made_again(home, tiny, kept):
    config = tiny(
        strategy={"name": "lori", "sparsity": 0.75, "weighting": "uniform"},
        rounds=3,
        privacy={"noise_multiplier": 1.0, "max_grad_norm": 1.0, "insecure_seed": 3},
        retention="all",
    )
    version = service.launch(home, config, backend=InlineBackend())

    mask = {
        name.removeprefix("mask/"): tensor
        for name, tensor in home.store.auxiliary(version).items()
        if name.startswith("mask/")
    }
    whole = torch.cat([m.flatten() for m in mask.values()])
    assert int(whole.sum()) == whole.numel() // 4
    tensors = home.store.tensors(version)
    assert all(not tensors[n][~m].any() and tensors[n][m].all() for n, m in mask.items())
    for (round_, _), digest in kept(home).items():
        update = unpack(home.store.updates.read(digest))
        sent = {n: list(update.tensors[n].shape) for n in mask}
        assert sent == {
            n: list(m.shape) if round_ == 1 else [int(m.sum())] for n, m in mask.items()
        }
    events = home.ledger.events(home.ledger.run("task-1").id)
    up = [(e.data["round"], e.data["bytes"]) for e in events if e.kind == "accepted"]
    dense, *masked = (max(size for round_, size in up if round_ == r) for r in (1, 2, 3))
    saved = sum(4 * (m.numel() - int(m.sum())) for m in mask.values())
    assert all(dense - size == pytest.approx(saved, abs=64) for size in masked)  # JSON besides
    assert {one.outcome for one in service.replay(home, version, whole=True)} == {"same"}
