"""A whole run of which a part stays at the clients: what of it goes on, and what is refused."""

import pytest
import torch

from clients.assignment import DataSpec, PluginChoice
from clients.site import Site
from orchestrator import service
from orchestrator.merging import NotAModel
from strategies.base import corrections


def kept(home, run, client, round_):
    return Site(home.home / "sites").state(run, client, round_)


def test_b_stays_at_the_clients_and_no_version_is_used_as_a_model(home, tiny, tmp_path):
    config = tiny(strategy="fedsa-lora", rounds=2, retention="all")
    version = service.launch(home, config)
    [run] = home.ledger.runs()
    end, [before] = home.store.tensors(version), home.store.version(version).parents
    own = [kept(home, run.id, client, 2) for client in "ab"]

    b = sorted(n for n in end if ".lora_B." in n)
    assert b
    assert not any(end[n].any() for n in b)
    assert all(sorted(state) == b for state in own)
    assert not any(torch.equal(own[0][n], own[1][n]) for n in b)
    assert {o.outcome for o in service.replay(home, version, whole=True)} == {"same"}
    assert service.retrain(home, run.id).differs == ""

    for refused in (
        lambda: service.evaluate(home, version, DataSpec(home.ledger.client("a").data)),
        lambda: service.export(home, version, tmp_path / "out"),
        lambda: service.merge(home, [version, before.id], PluginChoice("linear", {}), "both"),
        lambda: service.launch(home, tiny(name="on-top", start="stack", start_from=version)),
    ):
        with pytest.raises(NotAModel, match="a part of the adapter stays at each client"):
            refused()
    assert service.launch(home, tiny(name="on", start="continue", start_from=version))


def test_the_server_s_control_variate_is_the_mean_of_those_at_the_clients(home, tiny):
    sgd = {"name": "sgd", "lr": 0.5}
    config = tiny(strategy="scaffold", optimizer=sgd, rounds=2, cohort=1)
    version = service.launch(home, config)
    [run] = home.ledger.runs()

    common = corrections(home.store.auxiliary(version))
    own = [corrections(kept(home, run.id, client, 2)) for client in "ab"]
    assert any(tensor.any() for tensor in common.values())
    for name, tensor in common.items():
        mean = sum(state.get(name, torch.zeros(()).double()) for state in own) / 2
        torch.testing.assert_close(tensor, mean.to(tensor.dtype), rtol=1e-4, atol=1e-6)
    assert service.retrain(home, run.id).differs == ""
