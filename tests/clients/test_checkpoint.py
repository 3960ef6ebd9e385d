"""An assignment that goes on after a crash ends with the bytes of one that never stopped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from clients import checkpoint
from clients.assignment import DataSpec, PluginChoice, Privacy
from clients.checkpoint import Checkpoints, NotPlain, pack, unpack
from clients.pace import GivenUp
from clients.site import Site
from clients.trainer import train
from clients.wire import pack as pack_update

STEPS = 5
DP = Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.9, insecure_seed=3)
ADAMW = PluginChoice("adamw", {"lr": 0.02, "weight_decay": 0.1})
SGD = PluginChoice("sgd", {"lr": 0.5, "momentum": 0.9})
PLAIN_SGD = PluginChoice("sgd", {"lr": 0.5})


def interrupted(assignment, at):
    """Train until step ``at`` has been done and the next begins, and be stopped there."""

    def stop(step, steps):
        if step == at and steps == STEPS:
            raise GivenUp("the worker is gone")

    with pytest.raises(GivenUp):
        train(assignment, stop, checkpoint_s=0)


def kept(assignment) -> list[Path]:
    return list(Path(assignment.site).rglob("checkpoint-*"))


@pytest.fixture
def asked(assign):
    """Return a function that makes an assignment in which all that has a state takes part."""

    def make(optimizer=ADAMW, privacy=None, **changes):
        return assign(
            optimizer=optimizer,
            privacy=privacy,
            adapter=PluginChoice("lora", {"r": 2, "dropout": 0.0 if privacy else 0.3}),
            regularizers=(PluginChoice("proximal", {"mu": 0.1}),),
            steps=STEPS,
            **changes,
        )

    return make


@pytest.mark.parametrize("privacy", [None, DP], ids=["plain", "dp"])
@pytest.mark.parametrize("optimizer", [ADAMW, SGD, PLAIN_SGD], ids=["adamw", "momentum", "sgd"])
def test_stopped_at_any_step_it_goes_on_there_and_ends_with_the_same_bytes(
    asked, optimizer, privacy, tmp_path
):
    assignment = asked(optimizer, privacy)
    whole = pack_update(train(replace(assignment, site=str(tmp_path / "whole"))))

    for at in range(STEPS):
        there = replace(assignment, site=str(tmp_path / f"stopped-{at}"))
        for site in (tmp_path / "whole", Path(there.site)):
            Site(site)
        key = tmp_path / "whole" / "data.key"
        if key.exists():  # one client, one key
            (Path(there.site) / "data.key").write_bytes(key.read_bytes())
        interrupted(there, at)
        assert len(kept(there)) == (at > 0)
        steps = []
        resumed = train(there, lambda step, n, steps=steps: steps.append((step, n)), checkpoint_s=0)

        assert pack_update(resumed) == whole
        assert {step for step, n in steps if n == STEPS} - {0} == set(range(max(at, 1), STEPS))
        assert kept(there) == []


def test_it_may_be_stopped_again_and_again(asked):
    assignment = asked()
    whole = train(replace(assignment, site=assignment.site + "-whole", public=True))

    assignment = replace(assignment, public=True)
    for at in range(1, STEPS):
        interrupted(assignment, at)

    assert pack_update(train(assignment, checkpoint_s=0)) == pack_update(whole)


def test_it_goes_on_with_the_engine_that_it_began_with(asked, monkeypatch):
    assignment = asked(privacy=DP)
    interrupted(assignment, 2)
    monkeypatch.setattr("clients.trainer.chosen_engine", lambda *_: pytest.fail("chosen anew"))
    assert train(assignment, checkpoint_s=0).spends


def test_without_checkpoints_nothing_is_kept(asked):
    assignment = asked()

    def stop(step, steps):
        if step == 3:
            raise GivenUp("the worker is gone")

    with pytest.raises(GivenUp):
        train(assignment, stop)

    assert kept(assignment) == []


def test_checkpoints_change_no_bytes(asked, tmp_path):
    assignment = asked(public=True)

    assert pack_update(train(assignment, checkpoint_s=0)) == pack_update(
        train(replace(assignment, site=str(tmp_path / "other")))
    )


@pytest.mark.parametrize("privacy", [None, DP], ids=["plain", "dp"])
def test_on_other_data_the_work_begins_anew(asked, privacy, tmp_path):
    assignment = asked(privacy=privacy)
    interrupted(assignment, 3)
    rows = Path(assignment.data.uri.removeprefix("jsonl:"))
    rows.write_text("\n".join(reversed(rows.read_text().splitlines())).replace("weaves", "sings"))
    steps = []

    train(assignment, lambda step, n: steps.append(step), checkpoint_s=0)

    assert {1, 2} <= set(steps)


def test_one_of_another_assignment_or_library_is_not_used(asked, monkeypatch):
    assignment = asked()
    interrupted(assignment, 3)
    [file] = kept(assignment)
    other = Checkpoints(Site(assignment.site), "run-1", "clinic-7", "0" * 64, "", 0)
    mine = Checkpoints(Site(assignment.site), "run-1", "clinic-7", assignment.digest(), "", 0)

    assert other.found() is None
    assert mine.found() is None  # another fingerprint
    fingerprint = unpack(file.read_bytes())["bound"]["fingerprint"]
    mine.fingerprint = fingerprint
    assert mine.found()["step"] == 3
    monkeypatch.setattr(checkpoint, "_weft", lambda: "0.0.0")
    assert mine.found() is None
    file.write_bytes(file.read_bytes()[:-5])
    assert mine.found() is None


def test_a_given_up_assignment_s_is_dropped_with_the_next_update(asked):
    interrupted(asked(seed=1), 3)
    later = asked(seed=2)

    train(later)

    assert kept(later) == []


def test_it_is_readable_by_its_owner_alone_and_runs_nothing(asked):
    assignment = asked()
    interrupted(assignment, 2)

    [file] = kept(assignment)

    assert file.stat().st_mode & 0o777 == 0o600
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["skeleton"])[0] == "dict"


def test_a_state_comes_back_as_it_was():
    state = {
        "tensors": [torch.tensor(2.0), torch.arange(6).reshape(2, 3).T, torch.empty(0)],
        3: (None, True, 1, 0.1, float("inf"), "text", {}),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }

    back = unpack(pack(state))

    assert back.keys() == state.keys()
    assert back[3] == state[3]
    assert isinstance(back[3], tuple)
    for given, got in zip(
        [*state["tensors"], state["half"]], [*back["tensors"], back["half"]], strict=True
    ):
        assert torch.equal(given, got)
        assert given.dtype == got.dtype


def test_what_is_not_plain_is_refused_with_its_place():
    with pytest.raises(NotPlain, match=r"state\.optimizer\[0\] is a DataSpec"):
        pack({"optimizer": [DataSpec("jsonl:x")]})
