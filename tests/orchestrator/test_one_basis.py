"""Versions in one basis are loaded as what they are in it, and the basis is stored once."""

import pytest
import torch
from torch.testing import assert_close

from clients.assignment import DataSpec
from orchestrator import service
from orchestrator.config import BadConfig
from orchestrator.merge_parts import Allow, parts_of
from orchestrator.merging import BadMerge, NotAModel, effective, split_head
from orchestrator.one_basis import in_one_basis
from strategies.shared import share
from strategies.tensors import lora_layers
from strategies.terms import merge_terms
from tests.orchestrator.conftest import LABELS_OF

TASKS = ("billing", "login", "spam")


@pytest.fixture
def tasks(publish):
    """Three versions of one base model, by name."""
    return {
        name: publish(name, seed, kind="classification", r=r)
        for seed, (name, r) in enumerate(zip(TASKS, (2, 2, 3), strict=True))
    }


def products(tensors):
    """Every layer's product, dense."""
    layers = lora_layers(split_head(tensors)[0])
    return {n: f.scaling.double() * f.b.double() @ f.a.double() for n, f in layers.items()}


def used(workspace, ref):
    return effective(workspace.store, workspace.store.version(ref))


def test_each_is_loaded_as_its_projection_with_its_own_head(workspace, tasks):
    found = in_one_basis(workspace, TASKS, {"rank": 3}, "bot")
    parts = parts_of(workspace, TASKS, Allow())
    layers = merge_terms(parts.vectors, [1.0] * 3)
    wanted = share(layers, rank=3)
    for number, core in enumerate(found.cores):
        assert core.of == tasks[TASKS[number]]
        mine = used(workspace, f"bot.{TASKS[number]}")
        projected = products(wanted.member(number, layers))
        assert_close(products(split_head(mine)[0]), projected, rtol=1e-5, atol=1e-6)
        heads = [split_head(one)[1] for one in (mine, workspace.store.tensors(core.of))]
        assert heads[0].keys() == heads[1].keys() != set()
        assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
        assert core.energy == pytest.approx(wanted.metrics[f"captured_energy_of/{number}"])
        assert 0 < core.energy < 1
        parents = {p.id: p.kind for p in workspace.store.version(core.version).parents}
        assert parents == {core.of: "merge", found.basis: "basis"}


def test_with_all_energy_nothing_is_lost_and_scores_stay(workspace, tasks, notes):
    found = in_one_basis(workspace, TASKS, {"energy": 1.0}, "bot")
    held = DataSpec(notes("held", labels=LABELS_OF["classification"]))
    for core in found.cores:
        assert_close(
            products(split_head(used(workspace, core.version))[0]),
            products(split_head(used(workspace, core.of))[0]),
            rtol=1e-5,
            atol=1e-5,
        )
    before, after = (
        service.evaluate(workspace, ref, held).metrics["loss"] for ref in ("spam", "bot.spam")
    )
    assert after == pytest.approx(before, rel=1e-5)


def test_the_basis_is_stored_once(workspace, tasks, read, ok):
    told = read(
        "merge", *TASKS, "--into", "bot", "-m", "eigenlorax", "--option", "rank=2", "--apart"
    )
    again = ok(
        "merge", *TASKS, "--into", "bot", "-m", "eigenlorax", "--option", "rank=2", "--apart"
    )
    on_disk = {
        p.name: p.stat().st_size for p in (workspace.home / "blobs").rglob("*") if p.is_file()
    }
    files = [workspace.store.version(one).tensors for one in (told["basis"], *names_of(told))]
    sizes = [next(v for k, v in on_disk.items() if digest.endswith(k)) for digest in files]
    assert len(set(files)) == 4  # a basis and three cores
    assert told["bytes_after"] == told["num_bytes"] + sum(o["num_bytes"] for o in told["cores"])
    assert told["bytes_after"] <= sum(sizes) < told["bytes_before"]
    assert [one["name"] for one in told["cores"]] == [f"bot.{name}:v1" for name in TASKS]
    assert f"all of it {told['bytes_after']} B, and {told['bytes_before']} B before" in again


def names_of(told):
    return [one["version"] for one in told["cores"]]


def test_a_core_can_be_trained_on(workspace, tasks, tiny, notes):
    in_one_basis(workspace, TASKS, {"rank": 2}, "bot")
    core = workspace.store.version("bot.login")
    options = core.recipe["adapter"]["options"]
    made = service.launch(
        workspace,
        tiny(
            labels=list(LABELS_OF["classification"]),
            adapter={"name": "lora-sb", **options},
            strategy="fed-sb",
            start="continue",
            start_from="bot.login",
            clients={
                "simulate": {"data": notes("new", labels=LABELS_OF["classification"]), "parts": 1}
            },
        ),
    )
    before, after = (workspace.store.tensors(ref) for ref in ("bot.login", made))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("lora_core.weight") for name in moved)
    assert not any(name.endswith(("lora_A.weight", "lora_B.weight")) for name in moved)


def test_the_basis_is_no_model(workspace, tasks, notes):
    in_one_basis(workspace, TASKS, {}, "bot")
    with pytest.raises(NotAModel, match="is the basis that other versions are written in, and no"):
        service.evaluate(workspace, "bot.basis", DataSpec(notes("held")))


def test_what_has_no_low_rank_and_what_has_one_name_is_refused(workspace, tasks, publish, weft):
    publish("shifted", 5, kind="classification", bias="lora_only", modules_to_save=[])
    with pytest.raises(BadMerge, match="is trained whole, and a basis is of low-rank layers"):
        in_one_basis(workspace, ("shifted", "billing"), {}, "bot", Allow(union=True))
    publish("basis", 6, kind="classification")
    with pytest.raises(BadConfig, match=r"two versions would be called 'bot\.basis'"):
        in_one_basis(workspace, ("basis", "billing"), {}, "bot")
    for more in (("-m", "svd"), ("-m", "eigenlorax", "--weights", "1,1")):
        code, _, said = weft("merge", "billing", "login", "--into", "bot", "--apart", *more)
        assert (code, "--apart keeps versions in one basis, without" in said) == (2, True)
