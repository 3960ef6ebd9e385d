"""Sites behind a SuperLink: what is sent, what comes back, and what goes wrong on the way."""

import stat
import threading
from dataclasses import replace
from itertools import islice

import pytest
import torch

from clients.assignment import DataSpec
from clients.evaluate import Evaluation
from clients.flower_messages import Unreadable
from clients.flower_runtime import Endpoint, Lost, RuntimeGone, TaskLost
from clients.orders import Refusal, Reply, Terms, pack_reply, unpack_order
from orchestrator.backends.base import Failure, complete
from orchestrator.backends.sites import Calling, SitesBackend
from orchestrator.backends.sites_answers import MOST_BYTES, most_bytes
from orchestrator.backends.superlink import Arrived, Mishap, Node, Refused, Task
from orchestrator.plan import RoundInputs, plan_round
from strategies.base import Broadcast, Update

TERMS = Terms("fedavg", "notes", "0.1.0", "1.41", 0.0)
KEYS = {
    name: b"-----BEGIN PUBLIC KEY-----\n%s\n-----END PUBLIC KEY-----\n" % key
    for name, key in (
        (
            "north",
            b"MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEyljA/IZk7/3KH74hejrXJg5aSlhP0fmo\n"
            b"oO+b9VL6IREzFiDM+78Qr2AnkZkCAKCh/AXKcsA37L9W7I5oisLsZcBJT5EhZEp/\n"
            b"fQ8FWyl/eBnkg6qt08A+Vd9Myfr4tzE5",
        ),
        (
            "south",
            b"MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEvTo69u6wTTAe9JJiXYb902d2eOH5m4mo\n"
            b"NO/HcubMhopMqKMJcjTgnX2ZkRZQj5ha7moaHOBjY09dT0Zc5Scgl/AnqsdkTkva\n"
            b"nSEUnajMmlrLnGfN/7lfWnrVdFBTR3rt",
        ),
    )
}
AT = {"a": "north", "b": "south", "c": "south"}


class Link:
    """A SuperLink in memory, whose nodes answer when they are told to, or at once."""

    def __init__(self):
        self.endpoint = Endpoint("superlink:9092", plain=True)
        self.online = {"north": 1.0, "south": 1.0}
        self.pushed = []  # (message, node, assignment)
        self.answers = {}
        self.answer = echo
        self.gone = False
        self.runs = 0
        self.alive = set()
        self.lock = threading.RLock()

    def check(self):
        if self.gone:
            raise RuntimeGone("superlink:9092 does not answer")

    def nodes(self):
        self.check()
        return [
            Node(i, KEYS[name], name, "online" if at else "offline", at or 0.0, at or 1.0)
            for i, (name, at) in enumerate(self.online.items())
        ]

    def claim(self):
        self.check()
        with self.lock:
            self.runs += 1
            self.alive.add(self.runs)
        return Claimed(self, Task(f"token-{self.runs}", self.runs, self.runs))

    def attach(self, task):
        self.check()
        if task.run not in self.alive:
            raise TaskLost("over")
        return Claimed(self, task)

    def close(self):
        pass


class Claimed:
    def __init__(self, link, task):
        self.link, self.task = link, task
        self.finished = False

    @property
    def lost(self):
        return self.task.run not in self.link.alive

    def check(self):
        self.link.check()
        if self.lost:
            raise TaskLost("over")

    def push(self, node, order, deadline, group):
        self.check()
        assignment, terms = unpack_order(order)
        assert terms == replace(TERMS, deadline=deadline)
        name = list(self.link.online)[node]
        with self.link.lock:
            message = f"m{len(self.link.pushed) + 1}"
            self.link.pushed.append((message, name, assignment))
            said = self.link.answer(assignment)
            if said is not None:
                self.link.answers[message] = said
        return message

    def replies(self, ids):
        self.check()
        with self.link.lock:
            return [
                Arrived(i, self.link.answers.pop(i)) for i in sorted(ids) if i in self.link.answers
            ]

    def fetch(self, arrived, most_bytes, wanted):
        self.check()
        if isinstance(arrived.tree, Exception):
            raise arrived.tree
        if callable(arrived.tree):
            return arrived.tree(wanted)
        if isinstance(arrived.tree, bytes) and len(arrived.tree) > most_bytes:
            raise Unreadable(f"it is larger than {most_bytes} bytes")
        return arrived.tree

    def finish(self, problem=""):
        self.link.alive.discard(self.task.run)

    def close(self):
        pass


def echo(assignment):
    """Return the reply of a client that sends back what it was sent."""
    if assignment.action == "evaluate":
        result = Evaluation(assignment.client, assignment.round, 1, {"accuracy": 1.0})
    else:
        sent = assignment.broadcast.tensors
        result = Update(assignment.client, assignment.round, assignment.base, sent, 1)
    return pack_reply(Reply(result, {"seconds": 1}))


def silence(assignment):
    """Answer nothing."""


@pytest.fixture
def link():
    return Link()


@pytest.fixture
def backend(link, tmp_path):
    """Return a function that makes a backend over the link, as a process would that starts."""

    def node_of(client):
        return (AT[client], KEYS[AT[client]]) if client in AT else f"{client} is at no node"

    def make(**options):
        calling = Calling(TERMS, **{"patience_s": 60.0, "node_of": node_of, **options})
        return SitesBackend(link, calling, tmp_path / "run" / "sites.json")

    return make


@pytest.fixture
def asked(make_plan, tensors):
    """Return a round's assignments of clients a, b and c."""
    plan = make_plan(noise=None)
    plan = replace(plan, model=replace(plan.model, hash="0" * 64))
    inputs = RoundInputs(1, "f" * 64, {}, {}, "")
    sent = Broadcast(tensors())
    planned = plan_round(plan, inputs, lambda client: sent, plan.participants)
    return [replace(a, data=DataSpec(f"site:{a.client}")) for a in planned]


def run(backend, assignments, began=None):
    started = (lambda a: None) if began is None else (lambda a: began.append(a.client))
    return {r.client: r for r in complete(backend, assignments, 60.0, started)}


def start(backend, assignments):
    """Return the results to come, and a list of who was sent an order, which grows."""
    began = []
    return backend.run(assignments, lambda a: began.append(a.client)), began


def until(results, seen):
    """Take ticks and results until something is seen; return the results."""
    found = []
    for result in islice(results, 500):
        found += [result] * (result is not None)
        if seen():
            return found
    raise AssertionError("it was not seen")


def test_every_order_reaches_its_node_and_every_reply_comes_back(link, backend, asked):
    began = []
    asked[1] = replace(asked[1], action="evaluate")

    results = run(backend(), asked, began)

    assert {c: type(r) for c, r in results.items()} == {"a": Update, "b": Evaluation, "c": Update}
    assert {a.client: node for _, node, a in link.pushed} == AT
    assert sorted(began) == ["a", "b", "c"]
    for name, tensor in asked[0].broadcast.tensors.items():
        assert torch.equal(results["a"].tensors[name], tensor)


def test_a_node_is_sent_several_orders_before_it_answers_one(link, backend, asked):
    link.answer = silence
    results, began = start(backend(), asked)

    assert until(results, lambda: len(began) == 3) == []

    for message, _, assignment in reversed(link.pushed):
        link.answers[message] = echo(assignment)
    assert {r.client for r in results if r is not None} == {"a", "b", "c"}


@pytest.mark.parametrize("code", range(10))
def test_every_error_of_flower_is_a_failure_in_one_sentence(link, backend, asked, code):
    def fail(assignment):
        link.online["north"] = 0.0 if code == 5 else 1.0
        return Mishap(code, "why\nnot")

    link.answer = fail

    [failure] = run(backend(away_s=0.0), asked[:1]).values()

    assert isinstance(failure, Failure)
    assert "node north" in failure.reason
    assert "\n" not in failure.reason
    assert ("why not" in failure.reason) == (code in (2, 6, 9))


def test_a_client_of_no_node_fails_at_once(link, backend, asked):
    [failure] = run(backend(), [replace(asked[0], client="elsewhere")]).values()

    assert failure.reason == "elsewhere is at no node"
    assert link.pushed == []


def test_who_is_away_for_too_long_fails_and_nobody_waits_for_it(link, backend, asked):
    link.online = {"north": 0.0}

    results = run(backend(away_s=0.5), asked[:2])

    assert "node north has not been there since" in results["a"].reason
    assert "does not know node south" in results["b"].reason


def test_a_node_that_is_shut_out_while_it_works_is_waited_for_no_more(
    link, backend, asked, monkeypatch
):
    link.answer = silence
    results, began = start(backend(), asked[:2])
    until(results, lambda: len(began) == 2)

    monkeypatch.delitem(AT, "a")
    del link.online["north"]
    failure = next(result for result in results if result is not None)

    assert failure.reason == "a is at no node"


def test_who_comes_late_is_sent_its_order_then(link, backend, asked):
    link.online["north"] = 0.0
    results = backend().run(asked[:2], lambda a: None)
    until(results, lambda: len(link.pushed) == 1)

    link.online["north"] = 5.0
    until(results, lambda: len(link.pushed) == 2)

    assert link.pushed[1][1] == "north"


def test_who_was_away_meanwhile_is_asked_once_more_and_its_first_answer_counts(
    link, backend, asked
):
    link.answer = silence
    results, began = start(backend(), asked[:1])
    until(results, lambda: began)

    link.online["north"] = 4e9  # it came back, by a clock that is ahead of this one
    until(results, lambda: len(link.pushed) >= 2)
    assert list(islice(results, 20)) == [None] * 20
    assert len(link.pushed) == 2
    link.answers[link.pushed[0][0]] = echo(asked[0])

    assert [r.client for r in results if r is not None] == ["a"]


def test_closing_gives_up_what_runs_and_the_backend_can_be_used_again(link, backend, asked):
    link.answer = silence
    sites = backend()
    results, began = start(sites, asked)
    until(results, lambda: len(began) == 3)
    results.close()

    link.answer = echo
    later = [replace(a, round=2) for a in asked]

    assert {r.round for r in run(sites, later).values()} == {2}
    assert link.runs == 1


def test_another_process_collects_what_is_on_its_way_without_asking_again(link, backend, asked):
    link.answer = silence
    results, began = start(backend(), asked)
    until(results, lambda: len(began) == 3)
    for message, _, assignment in link.pushed:
        link.answers[message] = echo(assignment)

    found = run(backend(), asked)

    assert {type(r) for r in found.values()} == {Update}
    assert len(link.pushed) == 3
    assert link.runs == 1


def test_what_another_process_took_and_lost_is_asked_again(link, backend, asked):
    link.answer = silence
    results, began = start(backend(), asked[:1])
    until(results, lambda: began)
    link.answers[link.pushed[0][0]] = Mishap(3, "no such message")
    link.answer = echo

    assert isinstance(run(backend(), asked[:1])["a"], Update)
    assert len(link.pushed) == 2


def test_where_the_run_is_over_another_is_begun_and_all_is_asked_again(link, backend, asked):
    link.answer = silence
    results, began = start(backend(), asked)
    until(results, lambda: len(began) == 3)
    link.alive.clear()
    link.answer = echo

    assert {type(r) for r in run(backend(), asked).values()} == {Update}
    assert link.runs == 2


def test_a_run_that_is_lost_on_the_way_is_begun_anew(link, backend, asked):
    link.answer = silence
    results, began = start(backend(), asked)
    until(results, lambda: len(began) == 3)

    link.answer = echo
    link.alive.clear()

    assert {r.client for r in results if r is not None} == {"a", "b", "c"}
    assert link.runs == 2


def test_what_is_written_down_is_its_owner_s_alone_and_gone_after_an_orderly_end(
    link, backend, asked, tmp_path
):
    link.answer = silence
    sites = backend()
    results, began = start(sites, asked)
    until(results, lambda: len(began) == 3)
    path = tmp_path / "run" / "sites.json"

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "token-1" in path.read_text()
    results.close()
    sites.close()
    assert not path.exists()
    assert link.alive == set()


@pytest.mark.parametrize("damage", ["", "{", '{"superlink": "superlink:9092"}', "[]"])
def test_a_damaged_file_is_as_good_as_none(link, backend, asked, tmp_path, damage):
    path = tmp_path / "run" / "sites.json"
    path.parent.mkdir()
    path.write_text(damage)

    assert isinstance(run(backend(), asked[:1])["a"], Update)


def test_a_reply_to_something_else_is_no_reply(link, backend, asked):
    odd = {
        "a": pack_reply(Reply(Update("b", 1, "f" * 64, {}, 1))),
        "b": b"nonsense",
        "c": pack_reply(Reply(Evaluation("c", 1, 1, {}))),
    }
    link.answer = lambda assignment: odd[assignment.client]

    results = run(backend(), asked)

    assert "answered for 'b' in round 1" in results["a"].reason
    assert "no reply that can be read" in results["b"].reason
    assert "was asked to train and sent evaluation" in results["c"].reason


def test_a_refusal_reaches_us_with_its_reason(link, backend, asked):
    refusal = Refusal("a", 1, "the policy of node north says no", not_held=True, final=True)
    link.answer = lambda assignment: pack_reply(Reply(refusal))

    [failure] = run(backend(), asked[:1]).values()

    assert failure == Failure("a", 1, "the policy of node north says no", not_held=True, final=True)


def test_a_node_that_cannot_read_its_order_says_why_without_naming_whose_it_was(
    link, backend, asked
):
    unread = Refusal("north", 0, "the order cannot be used: assignment.new is not known here")
    link.answer = lambda assignment: pack_reply(Reply(unread))

    [failure] = run(backend(), asked[:1]).values()

    assert failure == Failure("a", 1, unread.reason)


def test_a_reply_that_does_not_arrive_whole_is_a_failure(link, backend, asked):
    link.answer = lambda assignment: Unreadable("a part of it did not arrive")

    [failure] = run(backend(), asked[:1]).values()

    assert failure.reason == "the reply of node north is no use: a part of it did not arrive"


def test_an_answer_of_which_a_part_does_not_come_is_asked_for_once_more(
    link, backend, asked, monkeypatch
):
    stalled_s = []

    def stall(wanted):
        stalled_s.append(next(s for s in range(1000) if not wanted(float(s))))
        raise Lost("a part of it did not arrive")

    answers = iter([stall, Lost("a part of it is there no more")])
    link.answer = lambda assignment: next(answers, None) or echo(assignment)

    [update] = run(backend(), asked[:1]).values()

    assert isinstance(update, Update)
    assert [assignment.client for _, _, assignment in link.pushed] == ["a"] * 3
    assert stalled_s == [30]  # less than Flower's own 180


def test_whose_answer_was_lost_is_not_asked_before_it_is_there_again(link, backend, asked):
    def lose(assignment):
        link.online["north"] = None
        return Lost("a part of it did not arrive")

    link.answer = lose
    results, began = start(backend(), asked[:1])
    until(results, lambda: began and link.online["north"] is None)
    waited = [result for result in islice(results, 5) if result is not None]
    link.answer = echo
    link.online["north"] = 2.0
    found = until(results, lambda: len(link.pushed) == 2)
    found += [result for result in results if result is not None]

    assert not waited
    assert [type(result) for result in found] == [Update]
    assert len(link.pushed) == 2


def test_replies_that_arrive_slowly_keep_nobody_else_waiting(link, backend, asked, monkeypatch):
    slow = [f"slow-{n}" for n in range(8)]
    for name in slow:
        monkeypatch.setitem(AT, name, "south")

    def drip(wanted):
        while wanted(0.0):
            threading.Event().wait(0.01)
        raise Unreadable("a part of it did not arrive")

    link.answer = lambda a: echo(a) if a.client == "a" else drip
    results, began = start(backend(), [*(replace(asked[1], client=c) for c in slow), asked[0]])

    found = until(results, lambda: "a" in began)
    while not found:
        found += [result for result in islice(results, 1) if result is not None]
    results.close()

    assert [result.client for result in found] == ["a"]


def test_a_reply_that_trickles_in_is_waited_for_until_the_round_s_deadline(link, backend, asked):
    def drip(wanted):
        while wanted(0.0):
            threading.Event().wait(0.01)
        raise Lost("a part of it did not arrive")

    link.answer = lambda assignment: drip

    [failure] = run(backend(patience_s=0.5), asked[:1]).values()

    assert failure.reason == "the reply of node north did not arrive in time"
    assert len(link.pushed) == 1


def test_a_reply_may_be_several_times_as_large_as_what_was_asked_for(asked):
    asked = replace(asked[0], held={})
    sent = asked.broadcast.tensors
    [name, *others] = sorted(name for name in sent if not name.endswith(".scaling"))
    large = {name: torch.zeros(1000, 1000)}
    one = replace(asked, broadcast=replace(asked.broadcast, tensors=sent | large))
    scores, reads = replace(one, action="evaluate"), replace(one, action="prepare")
    frozen = replace(one, broadcast=replace(one.broadcast, trainable=others[0]))
    left = {n: tensor for n, tensor in sent.items() if n != name}
    held = replace(asked.broadcast, tensors=left)

    assert 2 * 4 * 10**6 < most_bytes(one) < 10**8
    assert most_bytes(scores) == most_bytes(reads) < most_bytes(frozen) < most_bytes(one) - 10**7
    assert most_bytes(replace(asked, broadcast=held, held={f"tensors/{name}": "0"})) == MOST_BYTES
    assert most_bytes(replace(asked, held={f"mask/{name}": "0"})) < most_bytes(one)


def test_what_is_larger_than_a_reply_may_be_is_not_fetched(link, backend, asked):
    link.answer = lambda assignment: bytes(2**26)

    [failure] = run(backend(), asked[:1]).values()

    assert "the reply of node north is no use: it is larger than" in failure.reason


def test_what_a_node_says_of_itself_is_learned_before_its_result_is_used(link, backend, asked):
    learned = []
    sites = backend(learn=lambda node, about: learned.append((node, dict(about))))

    next(r for r in sites.run(asked[:1], lambda a: None) if r is not None)

    assert learned == [("north", {"seconds": 1})]


def test_a_superlink_that_is_silent_is_waited_for(link, backend, asked):
    link.gone = True
    results = backend().run(asked, lambda a: None)
    assert set(islice(results, 3)) == {None}

    link.gone = False

    assert {r.client for r in results if r is not None} == {"a", "b", "c"}


def test_a_superlink_that_stays_silent_is_why_everybody_fails(link, backend, asked):
    link.gone = True

    reasons = {r.reason for r in run(backend(away_s=0.3), asked).values()}

    assert reasons == {"superlink:9092 does not answer"}


def test_a_superlink_that_refuses_us_is_why_everybody_fails(link, backend, asked, monkeypatch):
    def refused():
        raise Refused("the SuperLink does not take the secret")

    monkeypatch.setattr(link, "claim", refused)

    reasons = {r.reason for r in run(backend(), asked).values()}

    assert reasons == {"the SuperLink does not take the secret"}


def test_an_order_that_names_a_place_is_not_sent(link, backend, asked):
    here = replace(asked[0], data=DataSpec("jsonl:/data/notes.jsonl"))

    [failure] = run(backend(), [here]).values()

    assert isinstance(failure, Failure)
    assert link.pushed == []
