"""A version gets onto a vLLM server whole, or what answered before goes on answering."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import product

import httpx
import peft
import pytest
import torch
from peft.utils import load_peft_weights

from clients.assignment import ModelSpec
from orchestrator import adapter_folders, service
from orchestrator.deploying import BadPointer
from orchestrator.deployments import BadUrl, deployments, plain_url
from orchestrator.exporting import NotServable
from orchestrator.gateway_client import GatewayFailed
from orchestrator.manifest import check_manifest
from orchestrator.rollout import FolderAltered, OtherBase
from orchestrator.routes import Routes
from orchestrator.signing import Unsigned, set_policy
from orchestrator.vllm import VllmRefused, VllmUnreachable

POINTER = "bot@production"


class Killed(BaseException):
    """The process was killed."""


def names(bot):
    """Return what both versions are called at a server."""
    return [f"{POINTER}:{bot.store.resolve(f'bot:v{n}')[:16]}" for n in (1, 2)]


def move(bot, to):
    service.promote(bot, "bot", "production", f"bot:v{to}")


@pytest.mark.parametrize("release", ["new", "old"])
def test_a_promotion_loads_switches_and_unloads(bot, fake, place, release):
    server = fake(release=release)
    first, second = names(bot)
    rollout = place(server)
    done = rollout.run()
    assert (done.model, done.loaded, done.unloaded, done.left) == (first, True, (), ())
    move(bot, 2)
    done = rollout.run()
    assert (done.model, done.loaded, done.unloaded, done.left) == (second, True, (first,), ())
    assert list(server.adapters) == [second]
    assert rollout.switches[0].routes()["routes"] == {POINTER: second}
    assert server.asked == [("load", first), ("load", second), ("unload", first)]
    assert server.wrongs == []
    again = rollout.run()
    assert (again.loaded, again.unloaded) == (False, ())
    assert server.asked[3:] == []
    [known] = deployments(bot.home)
    assert (known.model, known.version) == (second, bot.store.resolve("bot:v2"))


def test_every_layer_is_served_with_its_own_rank_and_scaling(bot, fake, place, folders):
    # vLLM passes over rank_pattern and alpha_pattern, which this adapter has
    server = fake()
    move(bot, 2)
    place(server).run()
    config = peft.PeftConfig.from_pretrained(folders[1])
    given = load_peft_weights(folders[1], device="cpu")
    for layer, found in server.products[names(bot)[1]].items():
        rank = 4 if "v_proj" in layer else config.r
        alpha = 7.0 if "q_proj" in layer else config.lora_alpha
        a, b = (given[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(found, alpha / rank * b @ a)


def test_a_rollout_that_is_killed_anywhere_is_finished_by_the_next(bot, fake, place):
    second, killed = names(bot)[1], 0
    for moment, step in product(("before", "after"), range(1, 9)):
        server = fake()
        move(bot, 1)
        place(server).run()
        move(bot, 2)
        heard = Counter()

        def dies(when, moment=moment, step=step, heard=heard):
            heard[when] += 1
            if when == moment and heard[when] == step:
                raise Killed

        with suppress(Killed):
            place(server, dies).run()
        killed += heard[moment] == step
        rollout = place(server)  # another process, beside a gateway that was started anew
        assert rollout.switches[0].routes()["routes"][POINTER] in server.adapters
        assert rollout.run().model == second
        assert list(server.adapters) == [second]
        assert rollout.switches[0].routes()["routes"] == {POINTER: second}
        assert server.wrongs == []
    assert killed == 2 * 7  # list, load, probe, switch, list, ask who is answered, unload


def folders_there(tmp_path):
    """Return the adapters' folders that are there."""
    return {path.name for path in (tmp_path / "served").iterdir() if path.name[0] != "."}


def adapters_of(bot):
    """Return what the folders of both versions are called."""
    return [name.rpartition(":")[2] for name in names(bot)]


def test_a_rollback_uses_the_folder_that_is_there(bot, fake, place, tmp_path):
    server = fake()
    rollout = place(server)
    rollout.run()
    move(bot, 2)
    rollout.run()

    def written():
        found = (tmp_path / "served").glob("[!.]*/*")
        return {path: path.stat().st_mtime_ns for path in found}

    made = written()
    service.rollback(bot, POINTER)
    assert rollout.run().model == names(bot)[0]
    assert written() == made
    assert len(made) > 2
    assert list(server.adapters) == [names(bot)[0]]


def test_folders_that_nobody_serves_any_more_are_removed_but_for_the_one_before(
    bot, fake, place, tmp_path
):
    rollout = place(fake())
    first, second = adapters_of(bot)
    assert rollout.run().removed == ()
    move(bot, 2)
    assert rollout.run().removed == ()
    one_rank = replace(rollout, deployment=replace(rollout.deployment, rank=1))
    assert one_rank.run().removed == (first,)
    assert folders_there(tmp_path) == {second, f"{second}-rank-1"}
    assert one_rank.run().removed == ()
    one_rank.end()
    assert folders_there(tmp_path) == set()


def test_a_folder_that_another_deployment_serves_stays(bot, fake, place, tmp_path):
    server, rollout = fake(), place(fake())
    other = place(server)
    other = replace(other, deployment=replace(other.deployment, url="http://other"))
    rollout.run(), other.run()
    first, second = adapters_of(bot)
    rollout.end()
    assert folders_there(tmp_path) == {first, second}  # nobody said a word of the second
    assert other.run().model in server.adapters
    other.end()
    assert folders_there(tmp_path) == {second}


def test_a_folder_of_what_is_still_loaded_stays(bot, fake, place, tmp_path):
    rollout = place(fake(), gateway=False)  # nobody can tell whether it is still asked
    for version, rank in ((1, None), (2, None), (2, 1), (1, 1)):
        move(bot, version)
        done = replace(rollout, deployment=replace(rollout.deployment, rank=rank)).run()
    assert len(done.left) == 3
    assert len(folders_there(tmp_path)) == 4
    rollout.end()
    assert folders_there(tmp_path) == set()


def test_a_removal_that_was_killed_is_finished_by_the_next(bot, fake, place, tmp_path, monkeypatch):
    rollout = place(fake())
    rollout.run()
    right, moved = adapter_folders.shutil.rmtree, []

    def dies(path, **options):
        if path.exists():
            moved.append(path)
            raise Killed

    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(adapter_folders.shutil, "rmtree", dies)
        rollout.end()
    assert len(moved) == 1
    assert adapter_folders.shutil.rmtree is right
    assert rollout.end() == ((), ())
    assert not moved[0].exists()
    assert list((tmp_path / "served" / ".weft-uses").glob("*/*")) == []


def test_a_folder_that_was_altered_since_is_not_removed(bot, fake, place, tmp_path):
    rollout = place(fake())
    rollout.run()
    folder = tmp_path / "served" / adapters_of(bot)[0]
    (folder / "notes.txt").write_text("mine")
    rollout.end()
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_folder_that_was_altered_is_not_served(bot, fake, place, tmp_path):
    folder = tmp_path / "served" / bot.store.resolve("bot:v1")[:16]
    assert check_manifest(folder).problems == ()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(FolderAltered, match=r"adapter_config\.json was altered.*; remove it, and"):
        place(fake()).run()


def test_a_server_that_was_started_anew_gets_its_adapter_again(bot, fake, place):
    server = fake()
    rollout = place(server)
    rollout.run()
    server.adapters.clear()
    assert rollout.run().loaded
    assert list(server.adapters) == [names(bot)[0]]


def test_a_folder_is_told_as_the_server_sees_it(bot, fake, place, tmp_path):
    server = fake(sees={"/adapters": tmp_path / "served"})
    with pytest.raises(
        VllmRefused, match=r"No adapter found for .*; if it sees the adapters in an"
    ):
        place(fake(sees={str(tmp_path / "served"): "/nowhere"})).run()
    place(server, mounted="/adapters/").run()
    assert server.adapters == {names(bot)[0]: f"/adapters/{names(bot)[0].rpartition(':')[2]}"}


def test_other_adapters_of_the_server_are_left_alone(bot, fake, place):
    server = fake()
    server.adapters |= {"other@production:1234": "/other", "bot@canary:1234": "/canary"}
    rollout = place(server)
    rollout.run()
    move(bot, 2)
    rollout.run()
    assert {"other@production:1234", "bot@canary:1234"} < set(server.adapters)


def test_without_a_gateway_nothing_is_unloaded(bot, fake, place):
    server = fake()
    rollout = place(server, gateway=False)
    rollout.run()
    move(bot, 2)
    assert rollout.run().left == (names(bot)[0],)
    assert set(server.adapters) == set(names(bot))


def test_nothing_is_unloaded_where_a_gateway_does_not_answer(bot, fake, place):
    server = fake()
    rollout = place(server)
    rollout.run()
    move(bot, 2)
    gone = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(502, json={})))
    broken = type(rollout.switches[0])("http://other", "root", gone)
    with pytest.raises(GatewayFailed, match="http://other answers 502"):
        replace(rollout, switches=[*rollout.switches, broken]).run()
    assert set(server.adapters) == set(names(bot))


REFUSED = {
    "dynamic loading is off": (
        {"dynamic": False},
        r"takes no adapters while it runs; start it wit",
    ),
    "the rank is above the server's": (
        {"max_lora_rank": 1},
        r"rank 2 is greater .* --max-lora-rank",
    ),
    "the key is another": ({"key": "right"}, "refuses the API key"),
}


@pytest.mark.parametrize("release", ["new", "old"])
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_the_server_refuses_is_said_and_changes_nothing(bot, fake, place, release, case):
    options, message = case
    server = fake(release=release, **options)
    rollout = place(server)
    if server.key:
        rollout = replace(
            rollout, vllm=type(rollout.vllm)("http://vllm", "wrong", rollout.vllm._client)
        )
    with pytest.raises(VllmRefused, match=message):
        rollout.run()
    assert server.adapters == {}
    assert rollout.switches[0].routes()["routes"] == {}


def test_a_server_that_is_not_there_is_said(bot, fake, place):
    rollout = place(fake())
    gone = replace(rollout, vllm=type(rollout.vllm)("http://nowhere", None, rollout.vllm._client))
    with pytest.raises(VllmUnreachable, match="no vLLM answers at http://nowhere"):
        gone.run()


def test_what_is_no_vllm_is_said(bot, fake, place):
    rollout = place(fake())
    gate = replace(
        rollout, vllm=type(rollout.vllm)("http://gateway/weft", None, rollout.vllm._client)
    )
    with pytest.raises(VllmRefused, match="answers 404 and no list of models"):
        gate.run()


def test_an_adapter_of_another_base_model_is_not_loaded(bot, fake, place, tiny_encoder):
    server = fake()
    server.base = "another/model"
    rollout = place(server)
    with pytest.raises(OtherBase, match=r"was trained on .*, and http://vllm serves another/model"):
        rollout.run()
    assert server.adapters == {}
    named = replace(rollout.deployment, base="another/model")
    replace(rollout, deployment=named).run()
    assert server.adapters


def test_a_probe_that_fails_keeps_what_answers(bot, fake, place):
    server = fake()
    rollout = place(server)
    rollout.run()
    move(bot, 2)
    right = server.complete

    async def failing(request):
        if (await request.json())["model"] == names(bot)[1]:
            return server.error("CUDA error: shapes", "InternalServerError", 500)
        return await right(request)

    server.app.router.routes[1].app = httpx_app(failing)
    with pytest.raises(VllmRefused, match="and fails: CUDA error: shapes"):
        rollout.run()
    assert rollout.switches[0].routes()["routes"] == {POINTER: names(bot)[0]}


def httpx_app(endpoint):
    from starlette.routing import request_response

    return request_response(endpoint)


def test_a_version_that_is_not_signed_is_not_deployed_where_it_must_be(bot, fake, place):
    set_policy(bot.home, "require")
    server = fake()
    with pytest.raises(Unsigned):
        place(server).run()
    assert server.adapters == {}


def test_what_vllm_cannot_serve_is_refused_or_converted(bot, fake, place, tiny_decoder, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_decoder), config)
    model.save_pretrained(tmp_path / "loha")
    service.import_adapter(bot, tmp_path / "loha", "bot")
    move(bot, 3)
    server = fake()
    with pytest.raises(NotServable, match=r"\(loha\) is not: it is kept in PEFT's own format; co"):
        place(server).run()
    place(server, rank=4).run()
    [folder] = [path for path in (tmp_path / "served").iterdir() if path.name.endswith("-rank-4")]
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4


def test_a_classifier_is_refused(workspace, grow, tiny_encoder, tmp_path):
    spec = ModelSpec(str(tiny_encoder), "classification", labels=("x", "y"))
    grow("task-1", model={**asdict(spec), "labels": ["x", "y"]})
    with pytest.raises(
        NotServable, match=r"is a classification model, and vLLM serves adapters of"
    ):
        service.export(workspace, "task-1", tmp_path / "out", to=service.ForVllm())
    assert not (tmp_path / "out").exists()


def test_another_rank_is_another_adapter(bot, fake, place):
    server = fake()
    place(server, rank=2).run()
    done = place(server, rank=1).run()
    assert (done.loaded, list(server.adapters)) == (True, [f"{names(bot)[0]}-rank-1"])
    for factor in server.products[done.model].values():
        assert torch.linalg.matrix_rank(factor) == 1


@pytest.mark.parametrize("pointer", ["bot", "bot:v1", "@production", "bot@"])
def test_what_is_no_alias_is_not_deployed(bot, fake, place, pointer):
    server = fake()
    rollout = place(server)
    wanted = replace(rollout.deployment, pointer=pointer)
    with pytest.raises(BadPointer, match="an alias is written NAME@ALIAS"):
        replace(rollout, deployment=wanted).run()
    assert deployments(bot.home) == []
    assert server.adapters == {}


def test_what_is_undeployed_is_unloaded_and_forgotten(bot, fake, place):
    server = fake()
    server.adapters["bot@canary:1234"] = "/canary"
    rollout = place(server)
    rollout.run()
    assert rollout.end() == ((names(bot)[0],), ())
    assert list(server.adapters) == ["bot@canary:1234"]
    assert rollout.switches[0].leads(POINTER) is None
    assert deployments(bot.home) == []
    assert rollout.end() == ((), ())


def test_what_still_answers_is_not_undeployed(bot, fake, place, tmp_path):
    server = fake()
    routes = Routes([POINTER], tmp_path / "own.json")
    rollout = replace(place(server), switches=[routes], drain_s=0.0)
    rollout.run()
    with routes.taken("bot") as model:
        assert rollout.end() == ((), (model,))
        assert model in server.adapters
        assert len(deployments(bot.home)) == 1
    assert rollout.end() == ((model,), ())
    assert server.adapters == {}


def test_without_a_gateway_what_is_undeployed_is_unloaded_at_once(bot, fake, place):
    server = fake()
    rollout = place(server, gateway=False)
    rollout.run()
    assert rollout.end() == ((names(bot)[0],), ())
    assert server.adapters == {}


@pytest.mark.parametrize(
    "url",
    [
        "vllm:8000",
        "ftp://vllm",
        "http://",
        "http://[",
        "http://x:99999999",
        "http://x/?a=b",
        "http://x y",
        "file:///etc/passwd",
        "http://me:hush@x",
    ],
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(BadUrl, match="is written http://HOST:PORT") as refused:
        plain_url(url)
    assert "hush" not in str(refused.value)


def test_a_url_is_written_down_in_one_way():
    assert plain_url("http://x:8000/") == plain_url("http://x:8000") == "http://x:8000"
