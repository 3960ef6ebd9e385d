"""A client that withdraws is used no more, and what it sent is buried; no id changes."""

import pytest

from orchestrator import service
from orchestrator.federation import Federation, RoundFailed
from orchestrator.registering import ClientWithdrew
from orchestrator.upkeep import back_up, fsck, restore
from storage.contributions import Deployment
from storage.ledger import ClientRecord, UnknownClient


def files(home, pattern):
    return sorted(str(p.relative_to(home.home)) for p in home.home.glob(f"runs/*/{pattern}"))


def clients_of(home, ref):
    return [leaf["client"] for leaf in home.store.version(ref).recipe["updates"]]


def test_a_withdrawn_client_is_registered_no_more(home, tiny, notes):
    service.withdraw(home, "a", "asked to")
    assert [client.name for client in home.ledger.clients()] == ["b"]
    with pytest.raises(ClientWithdrew, match="a client called 'a' withdrew on "):
        service.register_client(home, ClientRecord("a", notes("a"), "a"))
    service.launch(home, tiny())
    assert clients_of(home, "task-1") == ["b"]


def test_its_updates_give_way_to_tombstones(home, tiny, kept):
    version = service.launch(home, tiny(rounds=2, retention="all"))
    before = home.store.lineage(version)
    its = {at: digest for at, digest in kept(home).items() if at[1] == "a"}
    done = service.withdraw(home, "a", "asked to")

    assert (done.buried, done.later) == (2, ())
    assert set(kept(home)) == {(1, "b"), (2, "b")}
    assert kept(home, buried=True) == its
    assert fsck(home).store.problems == fsck(home).store.orphans == ()

    assert home.store.lineage(version) == before
    [found] = service.replay(home, version)
    assert (found.outcome, found.why.endswith("of a in round 2 was withdrawn")) == ("gone", True)


def test_what_was_buried_does_not_come_back_with_a_backup(home, tiny, kept, tmp_path):
    service.launch(home, tiny(retention="all"))
    back_up(home, tmp_path / "backup")
    service.withdraw(home, "a")
    before = set(home.blobs.place.entries())
    restore(home, tmp_path / "backup")
    assert (set(kept(home)), set(kept(home, buried=True))) == ({(1, "b")}, {(1, "a")})
    assert set(home.blobs.place.entries()) == before


def test_it_says_which_deployed_versions_contain_the_client(home, tiny):
    service.launch(home, tiny(name="with"))
    service.launch(home, tiny(name="stacked", start="stack", start_from="with", cohort=1))
    service.launch(home, tiny(name="without", clients={"names": ["b"]}))
    for name in ("stacked", "without"):
        service.promote(home, name, "production", name)
    done = service.withdraw(home, "a")
    assert done.deployed == (Deployment("stacked@production", home.store.resolve("stacked")),)


def test_withdrawing_again_reports_how_things_stand(home, tiny):
    service.launch(home, tiny(retention="all"))
    first = service.withdraw(home, "a", "asked to")
    again = service.withdraw(home, "a", "another reason")
    assert (first.buried, again.buried) == (1, 0)
    assert again.record == first.record


def test_who_never_was_cannot_withdraw(home):
    with pytest.raises(UnknownClient, match="'aa'; did you mean 'a'"):
        service.withdraw(home, "aa")
    assert home.ledger.withdrawals.all() == {}


@pytest.fixture
def going(workspace, make_plan, imagined):
    """Return a function that makes a run of imagined clients, or goes on with it."""

    def make(observe=lambda kind, data: None, **changes):
        plan = make_plan(**changes)
        if not workspace.ledger.runs():
            config = plan.config.model_dump(mode="json")
            workspace.ledger.create_run("run-1", "task-1", config, plan.to_json())
        made = (plan, workspace.store, workspace.ledger, imagined(), workspace.home)
        return Federation(*made, observe)

    return make


def test_a_run_that_goes_on_uses_it_no_more(workspace, going, kept):
    def observe(kind, data):
        if kind == "committed" and data["round"] == 1:
            workspace.ledger.withdrawals.add("a", "me", "")

    version = going(observe, retention="all", rounds=2).run()
    newest, first, _ = workspace.store.lineage(version).nodes
    assert clients_of(workspace, first) == ["a", "b", "c"]
    assert clients_of(workspace, newest) == ["b", "c"]
    assert set(kept(workspace, buried=True)) == {(1, "a")}


@pytest.mark.parametrize("when", ["assigned", "accepted"])
def test_an_update_under_way_is_not_used(workspace, going, when):
    def observe(kind, data):
        if kind == when:
            workspace.ledger.withdrawals.add("a", "me", "")

    version = going(observe, rounds=1, retention="all").run()
    assert clients_of(workspace, version) == ["b", "c"]
    assert files(workspace, "round-1/*") == []


def test_a_round_that_is_decided_is_finished_and_buried_after(workspace, going, kept):
    def killed(kind, data):
        if kind == "closed":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        going(killed, rounds=1, retention="all").run()
    done = service.withdraw(workspace, "a")
    assert (done.buried, done.later) == (0, ("run-1",))
    assert files(workspace, "round-1/a.safetensors") != []

    version = going(rounds=1, retention="all").run()
    assert clients_of(workspace, version) == ["a", "b", "c"]
    assert (set(kept(workspace)), files(workspace, "round-1/*")) == ({(1, "b"), (1, "c")}, [])
    assert set(kept(workspace, buried=True)) == {(1, "a")}


def test_a_decided_round_that_is_cancelled_leaves_no_update(workspace, going):
    def killed(kind, data):
        if kind == "closed":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        going(killed, rounds=1, retention="all").run()
    service.withdraw(workspace, "a")
    service.cancel(workspace, "run-1")
    assert files(workspace, "round-1/*") == []


def test_a_run_that_stopped_before_it_decided_goes_on_without_it(workspace, going):
    def killed(kind, data):
        if kind == "accepted" and data["client"] == "b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        going(killed, rounds=1, retention="all").run()
    assert service.withdraw(workspace, "a").buried == 1

    assert clients_of(workspace, going(rounds=1, retention="all").run()) == ["b", "c"]


def test_a_round_that_is_short_of_it_fails_and_can_go_on(workspace, going):
    def observe(kind, data):
        if kind == "accepted" and data["client"] == "a":
            workspace.ledger.withdrawals.add("a", "me", "")

    settings = {"clients": ("a", "b"), "rounds": 1, "quorum": 2}
    with pytest.raises(RoundFailed, match="a: the client withdrew; its updates are used no more"):
        going(observe, **settings).run()


def test_the_command_stops_its_use_and_claims_no_unlearning(ok, read, refused, notes, run_yaml):
    ok("clients", "add", "a", "--data", notes("a"))
    ok("clients", "add", "b", "--data", notes("b", shift=1))
    ok("run", run_yaml(clients={"select": {}}, retention="all"))
    ok("promote", "task-1", "--to", "production")
    said = ok("clients", "withdraw", "a", "--why", "asked to")
    assert "a withdrew; 2 stored updates are buried" in said
    assert "deployed with it: task-1@production" in said
    assert "nothing is unlearned" in said
    assert read("clients", "withdraw", "a")["record"]["why"] == "asked to"
    assert "withdrew on" in refused("clients", "add", "a", "--data", notes("a"))


def test_of_a_client_at_a_site_it_says_what_did_not_happen_there(ok, home):
    home.ledger.add_client(ClientRecord("far", "site:notes", "far", node="clinic-north"))

    said = ok("clients", "forget", "far") + ok("clients", "withdraw", "far")

    assert said.count("at the site of node clinic-north nothing was deleted") == 2
    assert "its owner's to delete" in said
