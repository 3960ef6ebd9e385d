"""Promotions and rollbacks reach a running server: nothing is lost, nothing is mixed up."""

import asyncio
import shutil
import threading

import pytest

from clients.serving.changes import Unservable
from orchestrator.serving.announcing import Announcer
from orchestrator.serving.loading import OtherBase
from orchestrator.serving.shelf import Served, Shelf, UnknownModel
from orchestrator.signing import Unsigned, set_policy, sign
from orchestrator.signing import keys as keys_of
from storage.followers import Followers
from storage.refs import UnknownVersion
from tests.orchestrator.serving.conftest import ask, client_of

CATS = {"model": "cats", "prompt": "the cat", "max_tokens": 3, "temperature": 0}
POINTER = "cats@production"


@pytest.fixture
def three(publish, move):
    versions = [publish("cats", seed) for seed in range(3)]
    move(POINTER, versions[0])
    return versions


def version_now(app):
    (answer,) = ask(app, ("/v1/completions", CATS))
    return answer.json()["version"]


def test_requests_during_twenty_moves_get_the_old_or_the_new_version(three, move, serve):
    with serve(POINTER, waiting=1000) as (made, app, said):
        text = {}
        for version in three:
            move(POINTER, version)
            made.follower.look()
            (answer,) = ask(app, ("/v1/completions", CATS))
            text[answer.json()["version"]] = answer.json()["choices"][0]["text"]
        assert len(set(text.values())) == 3

        async def flip():
            found = []
            async with client_of(app) as client:

                async def one(allowed):
                    body = CATS | {"stream": len(found) % 3 == 0}
                    answer = await client.post("/v1/completions", json=body)
                    version = answer.headers["weft-version"]
                    assert answer.status_code == 200
                    assert version in allowed
                    if not body["stream"]:
                        assert answer.json()["choices"][0]["text"] == text[version]
                    found.append(version)

                for number in range(20):
                    old, new = three[(number + 2) % 3], three[number % 3]
                    begun = [asyncio.create_task(one({old, new})) for _ in range(4)]
                    move(POINTER, new)
                    look = asyncio.to_thread(made.follower.look)
                    begun += [asyncio.create_task(one({old, new})) for _ in range(4)]
                    await look
                    await one({new})  # what is asked after the switch gets the new one alone
                    await asyncio.gather(*begun)
            return found

        found = asyncio.run(flip())
        made.follower.look()
        assert len(made.model.bank) == 1  # what nobody uses is gone
    assert len(found) == 20 * 9
    assert set(found) == set(three)
    assert said[-1] == (POINTER, three[1], None)


def test_an_alias_is_confirmed_once_no_older_answer_is_under_way(three, move, serve):
    with serve(POINTER) as (made, app, said):
        made.follower.look()
        assert said == [(POINTER, three[0], None)]
        with made.shelf.borrowed("cats") as borrowed:
            move(POINTER, three[1])
            made.follower.look()
            assert borrowed.served.version == three[0]
            assert version_now(app) == three[1]
            assert said[1:] == [(POINTER, None, None)]
            assert len(made.model.bank) == 2
        made.follower.look()
        made.follower.look()
        assert said[2:] == [(POINTER, three[1], None)]
        assert len(made.model.bank) == 1


def test_a_version_that_cannot_be_served_is_not_switched_to_and_the_reason_is_said(
    three, move, publish, serve, tiny_decoder, tmp_path, caplog
):
    other = tmp_path / "other"
    shutil.copytree(tiny_decoder, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    foreign = publish("cats", 9, base=other)
    with serve(POINTER) as (made, app, said):
        move(POINTER, foreign)
        for _ in range(3):
            made.follower.look()
        assert version_now(app) == three[0]
        (ready,) = ask(app, ("/readyz", None))
        assert ready.json()["models"][POINTER]["version"] == three[0]
        assert "belongs to the base model" in ready.json()["models"][POINTER]["problem"]
        assert said[-1][:2] == (POINTER, three[0])
        assert "belongs to the base model" in said[-1][2]
        assert caplog.text.count("is served as before") == 1
        move(POINTER, three[1])
        made.follower.look()
        assert version_now(app) == three[1]
        assert made.follower.problems() == {}
        assert said[-1] == (POINTER, three[1], None)


def test_a_version_that_nobody_signed_is_not_loaded_where_the_policy_requires_it(
    workspace, three, move, serve
):
    keys_of(workspace.home).new("alice")
    with serve(POINTER) as (made, app, said):
        set_policy(workspace.home, "require")
        move(POINTER, three[1])
        made.follower.look()
        assert version_now(app) == three[0]
        assert "no signature by a trusted key" in said[-1][2]
        sign(workspace, POINTER, "alice")
        made.follower._troubles.clear()  # as after ten seconds
        made.follower.look()
        assert version_now(app) == three[1]
    move("cats@other", three[2])
    with pytest.raises(Unsigned), serve("cats@other"):
        pass


def test_a_server_goes_on_while_the_store_is_down_and_follows_when_it_is_back(
    three, move, serve, caplog
):
    def down(*pointer):
        raise ConnectionError("no route to the database")

    with serve(POINTER) as (made, app, _):
        pointing = made.follower._pointing
        made.follower._pointing = down
        move(POINTER, three[1])
        for _ in range(3):
            made.follower.look()
        assert version_now(app) == three[0]
        (ready,) = ask(app, ("/readyz", None))
        assert (ready.status_code, ready.json()["store"]) == (200, "down")
        assert caplog.text.count("out of reach") == 1
        made.follower._pointing = pointing
        made.follower.look()
        assert version_now(app) == three[1]
        assert ask(app, ("/readyz", None))[0].json()["store"] == "up"


def test_what_cannot_be_told_is_told_again(three, serve):
    with serve(POINTER) as (made, _, _):
        told = []

        def report(*what):
            told.append(what)
            if len(told) == 1:
                raise ConnectionError("no route to the database")

        made.follower._report = report
        made.follower.look()
        made.follower.look()
        made.follower.look()
    assert told == [(POINTER, three[0], None)] * 2


def test_aliases_of_one_version_share_its_place(three, move, serve):
    move("cats@canary", three[0])
    with serve(POINTER, "cats@canary") as (made, app, _):
        assert len(made.model.bank) == 1
        move("cats@canary", three[1])
        made.follower.look()
        bodies = [CATS | {"model": f"cats@{alias}"} for alias in ("production", "canary")]
        answers = ask(app, *(("/v1/completions", body) for body in bodies))
        assert [answer.json()["version"] for answer in answers] == three[:2]
        (ambiguous,) = ask(app, ("/v1/completions", CATS))
        assert "choose one (there are: cats@production, cats@canary)" in ambiguous.text


def test_the_thread_that_follows_looks_by_itself(three, move, serve):
    with serve(POINTER) as (made, app, _):
        switched = threading.Event()
        made.follower._report = lambda pointer, version, problem: (
            switched.set() if version == three[1] else None
        )
        made.follower.start(0.01)
        move(POINTER, three[1])
        assert switched.wait(30)
        assert version_now(app) == three[1]


def test_a_server_does_not_begin_with_what_it_cannot_serve(publish, move, serve, workspace):
    labels, text = publish("topics", 1, kind="classification"), publish("cats", 1)
    move("topics@production", labels)
    move("cats@production", text)
    refused = pytest.raises(OtherBase, match="serve it by a server of its own")
    with refused, serve("cats@production", "topics@production"):
        pass
    with pytest.raises(UnknownVersion), serve("cats@nowhere"):
        pass
    version = workspace.store.version(text)
    tensors = workspace.store.tensors(text)
    tensors["model.norm.shift.weight"] = tensors["model.layers.0.self_attn.q_proj.scaling"]
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["model.norm"]}
    recipe = dict(version.recipe) | {"adapter": {"name": "lora", "options": options}}
    whole = workspace.store.commit(tensors, parents={}, recipe=recipe)
    workspace.store.name("whole", whole)
    move("whole@production", whole)
    refused = pytest.raises(Unservable, match=r"trained model\.norm\.weight whole")
    with refused, serve("whole@production"):
        pass


def test_a_shelf_hands_out_what_a_name_stands_for_at_that_moment():
    shelf = Shelf()
    for version in ("a" * 64, "b" * 64):
        shelf.put(Served(version, 1, "causal-lm"))
    shelf.point("bot@production", "a" * 64)
    with shelf.borrowed("bot") as one:
        shelf.point("bot@production", "b" * 64)
        with shelf.borrowed("bot") as other:
            assert (one.served.version[0], other.served.version[0]) == ("a", "b")
        assert not shelf.is_drained("bot@production")
        assert shelf.take_unused() == []
    assert shelf.is_drained("bot@production")
    assert [served.version[0] for served in shelf.take_unused()] == ["a"]
    with pytest.raises(UnknownModel), shelf.borrowed("a" * 64):
        pass


def test_a_server_that_was_forgotten_registers_again_with_all_that_it_serves(workspace):
    followers = Followers(workspace.engine)
    pointers = {f"{name}@production": (name, "production") for name in ("cats", "dogs")}
    announcer = Announcer(followers, "host:1", "http://host", pointers)
    announcer.begin()
    announcer.report("cats@production", "a" * 64, None)
    followers.forget("host:1")
    announcer.report("dogs@production", "b" * 64, "not signed")
    found = {one.name: (one.version, one.problem) for one in followers.following()}
    assert found == {"cats": ("a" * 64, None), "dogs": ("b" * 64, "not signed")}
    announcer.end()
    assert followers.following() == []


def test_what_is_true_is_said_again_and_no_version_while_older_answers_are_under_way(
    three, move, serve
):
    with serve(POINTER) as (made, _, said):
        made.follower.repeat_s = 0.0
        made.follower.look()
        with made.shelf.borrowed("cats"):
            move(POINTER, three[1])
            made.follower.look()
        made.follower.look()
    assert [version for _, version, _ in said] == [three[0], None, three[1]]
