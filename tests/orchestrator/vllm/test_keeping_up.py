"""A server that follows an alias goes where it points, and says so once nobody else answers."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from orchestrator import service
from orchestrator.deployments import Deployment
from orchestrator.gateway_client import GatewayFailed, RemoteGateway
from orchestrator.keeping_up import KeepingUp, Server
from orchestrator.routes import Routes
from storage.followers import Followers

POINTER = "bot@production"


@pytest.fixture
def followers(bot):
    return Followers(bot.engine)


@pytest.fixture
def follow(followers):
    """Return a function that follows with a rollout that waits for nobody."""

    def make(rollout):
        server = Server("host:1", "http://gateway", followers)
        return KeepingUp([replace(rollout, drain_s=0.0)], server, poll_s=0.01)

    return make


def confirmed(followers):
    [found] = followers.following("bot", "production")
    return found.version, found.problem


def test_promote_and_rollback_reach_the_server_and_are_confirmed(
    bot, fake, place, follow, followers
):
    server = fake()
    following = follow(place(server))
    for move, ref in (
        (lambda: None, "bot:v1"),
        (lambda: service.promote(bot, "bot", "production", "bot:v2"), "bot:v2"),
        (lambda: service.rollback(bot, POINTER), "bot:v1"),
    ):
        move()
        following.look()
        version = bot.store.resolve(ref)
        assert confirmed(followers) == (version, None)
        assert list(server.adapters) == [f"{POINTER}:{version[:16]}"]
    asked = list(server.asked)
    following.look()
    assert server.asked == asked


def test_a_version_is_confirmed_only_when_nobody_is_answered_by_another(
    bot, fake, place, follow, followers, tmp_path
):
    server = fake()
    routes = Routes([POINTER], tmp_path / "own.json")
    following = follow(replace(place(server), switches=[routes]))
    following.look()
    with routes.taken("bot") as before:
        service.promote(bot, "bot", "production", "bot:v2")
        following.look()
        assert confirmed(followers) == (None, None)
        assert before in server.adapters
    following.look()
    assert confirmed(followers) == (bot.store.resolve("bot:v2"), None)
    assert before not in server.adapters


def test_what_cannot_be_served_is_said_and_the_one_before_goes_on(
    bot, fake, place, follow, followers, caplog
):
    server = fake()
    following = follow(place(server))
    following.look()
    server.max_lora_rank = 2
    service.promote(bot, "bot", "production", "bot:v2")  # of rank 4
    following.look()
    following.look()
    version, problem = confirmed(followers)
    assert version == bot.store.resolve("bot:v1")
    assert "LoRA rank 4 is greater than max_lora_rank 2" in problem
    assert list(server.adapters) == [f"{POINTER}:{version[:16]}"]
    assert sum("requests are answered as before" in text for text in caplog.messages) == 1
    server.max_lora_rank = 16
    following.look()
    assert confirmed(followers) == (bot.store.resolve("bot:v2"), None)


def test_nothing_is_confirmed_while_gateways_lead_to_different_versions(
    bot, fake, place, follow, followers, tmp_path, monkeypatch
):
    rollout, own = place(fake()), Routes([POINTER], tmp_path / "own.json")
    following = follow(replace(rollout, switches=[own, *rollout.switches]))
    following.look()
    service.promote(bot, "bot", "production", "bot:v2")

    def refuse(gateway, pointer, model):
        raise GatewayFailed("the gateway does not switch")

    with monkeypatch.context() as patch:
        patch.setattr(RemoteGateway, "flip", refuse)
        following.look()
    assert confirmed(followers) == (None, "the gateway does not switch")
    following.look()
    assert confirmed(followers) == (bot.store.resolve("bot:v2"), None)


def test_a_server_that_lost_its_adapter_gets_it_again(bot, fake, place, follow):
    server = fake()
    following = follow(place(server))
    following.look()
    server.adapters.clear()
    following.look()
    assert len(server.adapters) == 1


def test_a_gateway_that_lost_its_routes_is_switched_again(bot, fake, place, follow, tmp_path):
    routes = Routes([POINTER], tmp_path / "own.json")
    following = follow(replace(place(fake()), switches=[routes]))
    following.look()
    routes.drop(POINTER)
    following.look()
    assert routes.leads(POINTER) == f"{POINTER}:{bot.store.resolve('bot:v1')[:16]}"


def test_a_store_that_is_away_changes_nothing(bot, fake, place, follow, followers, tmp_path):
    server = fake()
    rollout = place(server)
    following = follow(rollout)
    following.look()
    bot.close()
    database = tmp_path / "home" / "weft.db"
    database.rename(tmp_path / "away.db")
    database.write_bytes(b"no database")
    following.look()
    assert len(server.adapters) == 1
    assert rollout.switches[0].routes()["routes"][POINTER] in server.adapters
    bot.close()
    (tmp_path / "away.db").rename(database)
    service.promote(bot, "bot", "production", "bot:v2")
    following.look()
    assert confirmed(followers) == (bot.store.resolve("bot:v2"), None)


def test_a_server_that_was_forgotten_registers_again(bot, fake, place, follow, followers):
    following = follow(place(fake()))
    following.look()
    followers.forget("host:1")
    following.look()
    following.look()
    assert confirmed(followers) == (bot.store.resolve("bot:v1"), None)


def test_who_ends_is_forgotten(bot, fake, place, follow, followers):
    following, stop = follow(place(fake())), threading.Event()
    thread = threading.Thread(target=following.run, args=(stop,))
    thread.start()
    while not followers.following("bot", "production"):
        assert thread.is_alive()
    stop.set()
    thread.join()
    assert followers.following("bot", "production") == []


def test_two_aliases_of_one_version_are_two_adapters(bot, fake, place, follow):
    service.promote(bot, "bot", "canary", "bot:v1")
    server = fake()
    rollout = place(server, gateway=False)
    other = Deployment("bot@canary", "http://vllm", rollout.deployment.adapters)
    rollout.run()
    replace(rollout, deployment=other).run()
    short = bot.store.resolve("bot:v1")[:16]
    assert set(server.adapters) == {f"bot@canary:{short}", f"{POINTER}:{short}"}
