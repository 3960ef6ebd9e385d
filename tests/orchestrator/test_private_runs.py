"""Whole private runs: with each way of clipping, in lower precision, and with checkpointing."""

from __future__ import annotations

import pytest
import torch

from clients.site import Site
from clients.task_model import TaskModel
from clients.wire import unpack
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from storage.ledger import ClientRecord

DP = {"noise_multiplier": 0.5, "delta": 1e-2, "max_grad_norm": 0.1, "insecure_seed": 3}
LR = 0.5


@pytest.fixture
def run(tmp_path, tiny, notes):
    """Return a function that runs two private rounds of two clients in a home of a name."""

    def whole(name="home", privacy=None, **changes):
        home = service.open_workspace(tmp_path / name)
        for client, shift in (("a", 0), ("b", 5)):
            data = notes(client, shift=shift)
            home.ledger.add_client(ClientRecord(client, data, client, num_examples=12))
        config = tiny(
            rounds=2,
            retention="all",
            optimizer={"name": "sgd", "lr": LR},
            privacy={**DP, **(privacy or {})},
            **changes,
        )
        return home, service.launch(home, config, backend=InlineBackend())

    return whole


def rounds_of(home, version):
    """Return the versions of a run's rounds, the first first."""
    found = [home.store.version(version)]
    while found[0].recipe["kind"] == "round":
        found.insert(0, home.store.version(found[0].parents[0].id))
    return found[1:]


def steps(home, version):
    """Return how far each client's update of each round moved from what it was sent."""
    for made in rounds_of(home, version):
        for leaf in made.recipe["updates"]:
            base = home.store.tensors(leaf["base"])
            sent = unpack(home.store.updates.read(leaf["digest"])).tensors
            yield torch.cat([(t - base[n]).flatten() for n, t in sent.items()]).norm()


@pytest.mark.parametrize("mode", ["per-layer", "automatic", "quantile"])
def test_a_run_with_each_way_of_clipping_is_reproduced_and_spends_what_it_said(run, mode):
    home, version = run(privacy={"clipping": mode})
    _, again = run("again", privacy={"clipping": mode})
    assert again == version

    spends = [row.parameters for row in home.ledger.spends("a")]
    assert [s["noise_multiplier"] for s in spends] == [DP["noise_multiplier"]] * 2
    moved = torch.stack(list(steps(home, version)))
    assert len(moved) == 4
    assert moved.isfinite().all()
    assert moved.min() > 0


def test_a_bound_that_is_learned_goes_on_in_the_next_round_and_stays_at_the_site(run):
    clipping = {"mode": "quantile", "rate": 1.0}
    home, version = run(privacy={"clipping": clipping, "max_grad_norm": 1e-3})
    [run_id] = {row.run for row in home.ledger.spends("a")}
    site = Site(home.sites)
    bounds = [float(site.state(run_id, "a", n)["privacy/bound"]) for n in (1, 2)]

    # every gradient is longer than the first bound: it grows in each of two steps of a round
    assert 1e-3 < bounds[0] < bounds[1] <= 1e-3 * torch.e**4
    for made in rounds_of(home, version):
        held = {**home.store.tensors(made.id), **home.store.auxiliary(made.id)}
        assert not any("bound" in name for name in held)
        for leaf in made.recipe["updates"]:
            assert not any(
                "bound" in n for n in unpack(home.store.updates.read(leaf["digest"])).tensors
            )


@pytest.mark.parametrize(("adapter", "dtype"), [("lora", "bf16"), ("dora", "float32")])
def test_checkpointing_and_lower_precision_go_with_the_first_engine(
    run, tiny_encoder, caplog, adapter, dtype
):
    model = {
        "id": str(tiny_encoder),
        "max_length": 16,
        "compute_dtype": dtype,
        "gradient_checkpointing": True,
    }
    home, version = run(model=model, adapter={"name": adapter, "r": 2, "layers": [0]})

    assert not [r for r in caplog.records if r.name == "clients.verification"]
    assert torch.stack(list(steps(home, version))).min() > 0


def test_a_batch_of_any_size_is_held_a_microbatch_at_a_time(run, monkeypatch):
    sizes = []
    original = TaskModel.forward

    def forward(model, batch):
        sizes.append(len(batch))
        return original(model, batch)

    monkeypatch.setattr(TaskModel, "forward", forward)
    run(batch_size=12, microbatch=3)
    assert max(sizes) == 3
    assert len(sizes) > 4 * 2 * 2
