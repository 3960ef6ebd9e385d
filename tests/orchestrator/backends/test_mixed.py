"""Sites and a local backend behind one stream of assignments."""

from dataclasses import replace

import pytest

from clients.assignment import DataSpec
from orchestrator.backends.base import complete
from orchestrator.backends.inline import InlineBackend
from orchestrator.backends.mixed import MixedBackend
from orchestrator.plan import RoundInputs, plan_round
from strategies.base import Broadcast, Update


class Slow:
    """A backend that answers what it was asked two turns ago, as sites do."""

    def __init__(self):
        self.asked, self.closed, self.given_up = [], False, 0

    def run(self, assignments, started, stepped=None):
        open_ = []
        try:
            for assignment in assignments:
                if assignment is not None:
                    self.asked.append(assignment.client)
                    started(assignment)
                    open_.append(assignment)
                yield None
                yield echo(open_.pop(0)) if open_ and assignment is None else None
            for assignment in open_:
                yield echo(assignment)
        finally:
            self.given_up += 1

    def close(self):
        self.closed = True


def echo(assignment, stepped=None):
    return Update(assignment.client, assignment.round, assignment.base, {}, 1)


@pytest.fixture
def asked(make_plan):
    """Return assignments of clients a to d, of which a and c are at sites."""
    plan = make_plan(clients="abcd", noise=None)
    inputs = RoundInputs(1, "f" * 64, {}, {}, "")
    planned = plan_round(plan, inputs, lambda client: Broadcast({}), plan.participants)
    place = {"a": "site:notes", "c": "site:notes"}
    return [replace(a, data=DataSpec(place.get(a.client, "jsonl:x"))) for a in planned]


def test_each_client_is_asked_where_its_data_are(asked):
    sites, here, began = Slow(), [], []
    mixed = MixedBackend(InlineBackend(lambda a, s: here.append(a.client) or echo(a)), sites)

    results = list(complete(mixed, asked, 60.0, lambda a: began.append(a.client)))

    assert sites.asked == ["a", "c"]
    assert here == ["b", "d"]
    assert sorted(began) == sorted(r.client for r in results) == ["a", "b", "c", "d"]


def test_what_is_nobody_s_is_done_here(asked):
    sites = Slow()
    first = replace(asked[0], action="init", data=DataSpec("none:"))

    [result] = [r for r in MixedBackend(InlineBackend(echo), sites).run([first], print) if r]

    assert result.client == "a"
    assert sites.asked == []


def test_a_stream_that_has_nothing_now_is_asked_again(asked):
    mixed = MixedBackend(InlineBackend(echo), Slow())

    def coming():
        yield None
        yield asked[1]
        yield None
        yield asked[0]
        for _ in range(9):
            yield None

    results = [r.client for r in mixed.run(coming(), lambda a: None) if r is not None]

    assert results == ["b", "a"]


def test_closing_gives_up_at_both_and_both_can_be_used_again(asked):
    sites = Slow()
    mixed = MixedBackend(InlineBackend(echo), sites)
    results = mixed.run(asked, lambda a: None)
    next(results)
    results.close()

    assert sites.given_up == 1
    assert len([r for r in mixed.run(asked, lambda a: None) if r is not None]) == 4


def test_closing_reaches_both_even_where_one_fails():
    class Broken(Slow):
        def close(self):
            raise OSError("no network")

    local = Slow()
    with pytest.raises(OSError, match="no network"):
        MixedBackend(local, Broken()).close()
    assert local.closed
