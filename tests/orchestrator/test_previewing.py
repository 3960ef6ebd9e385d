"""What a merge would be is told before there is one."""

import pytest
import torch
import yaml

from clients.assignment import DataSpec, PluginChoice
from orchestrator import service
from orchestrator.gate_file import parse_gate
from orchestrator.gate_setting import set_gate
from orchestrator.merge_draft import draft
from orchestrator.previewing import preview
from tests.orchestrator.conftest import LABELS_OF


@pytest.fixture
def trained(publish):
    """Two versions of bot."""
    return [publish("bot", seed, kind="classification") for seed in (1, 2)]


def test_a_preview_is_what_the_merge_is_then(workspace, trained, notes, read):
    document = {
        "suite": {"mail": notes("held", labels=LABELS_OF["classification"])},
        "aliases": {"*": {}},
    }
    set_gate(workspace, "bot", parse_gate(document), "ada")
    before = [version.id for version in workspace.store.versions()]

    merge = ("merge", *trained, "--into", "bot", "--method", "cat", "--weights", "0.5,0.5")
    found = read(*merge, "--preview")

    assert [version.id for version in workspace.store.versions()] == before
    merged = service.merge(workspace, trained, PluginChoice("cat", {}), "bot", [0.5, 0.5])
    measured = [
        service.evaluate(workspace, ref, DataSpec(document["suite"]["mail"]))
        for ref in (*trained, merged)
    ]
    assert [one["version"] for one in found["scores"]] == [*trained, ""]
    assert [one["scores"]["mail"]["loss"] for one in found["scores"]] == [
        pytest.approx(one.metrics["loss"], rel=1e-5) for one in measured
    ]
    assert found["captured_energy"] == pytest.approx(1)
    assert all(0 < layer["disagreement"] < 1 for layer in found["layers"])
    assert all(layer["captured_energy"] == pytest.approx(1) for layer in found["layers"])


def test_stages_are_seen_as_they_will_be_and_nothing_is_committed(
    workspace, trained, notes, read, ok, tmp_path
):
    held = notes("held", labels=LABELS_OF["classification"])
    set_gate(workspace, "bot", parse_gate({"suite": {"mail": held}, "aliases": {"*": {}}}), "ada")
    stages = [
        {"name": "both", "of": list(trained), "method": "cat"},
        {
            "name": "less",
            "of": [{"ref": "both", "weight": 0.5}, trained[0]],
            "method": {"name": "svd", "rank": 1},
        },
    ]
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump({"into": "bot", "stages": stages}))
    before = [version.id for version in workspace.store.versions()]

    told = ok("merge", "--recipe", file, "--preview")
    first, last = read("merge", "--recipe", file, "--preview")

    assert [version.id for version in workspace.store.versions()] == before
    assert "stage less: svd of 0.5 both (" in " ".join(told.split())
    merged = workspace.store.version(read("merge", "--recipe", file)["id"])
    assert {p.id for p in merged.parents} == set(last["parents"])
    assert first["captured_energy"] == pytest.approx(1)
    assert 0 < last["captured_energy"] < 1
    for seen, ref in ((first, last["parents"][0]), (last, merged.id)):
        scored = service.evaluate(workspace, ref, DataSpec(held))
        mine = seen["scores"][-1]["scores"]["mail"]["loss"]
        assert mine == pytest.approx(scored.metrics["loss"], rel=1e-5)


def test_a_preview_says_what_a_rank_loses_and_needs_no_suite(weft, workspace, grow):
    versions = [grow("bot", private=False, model=MODEL, task_labels=[]) for _ in range(2)]
    found = preview(workspace, draft(workspace, versions, PluginChoice("svd", {"rank": 1})), "bot")
    assert 0 < found.energy < 1
    assert found.scores == ()

    code, told, said = weft(
        "merge", *versions, "--into", "bot", "--method", "svd", "--option", "rank=1", "--preview"
    )
    assert code == 0
    assert "bot has no evaluation suite" in said
    assert f"{found.energy:.1%}" in told
    assert "nothing was committed" in told
    assert len(workspace.store.versions()) == 2


def test_what_lies_underneath_a_merge_is_part_of_what_it_does(workspace, grow):
    below = grow("bot", private=False, model=MODEL, task_labels=[])
    above = [
        grow("bot", private=False, model=MODEL, task_labels=[], stack=[below]) for _ in range(2)
    ]
    made = draft(workspace, above, PluginChoice("cat", {}))
    committed = service.merge(workspace, above, PluginChoice("cat", {}), "bot")
    used = service.use(workspace, workspace.store.version(committed), DataSpec("jsonl:x"))
    mine = made.effective(workspace.store)
    assert mine.keys() == used.broadcast.tensors.keys()
    assert all(torch.equal(mine[k], used.broadcast.tensors[k]) for k in mine)


MODEL = {
    "id": "some-model",
    "revision": "main",
    "hash": "ab" * 32,
    "labels": ["x"],
    "kind": "classification",
    "pooling": "mean",
}
