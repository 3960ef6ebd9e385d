"""A federation of real sites: a SuperLink behind its proxy, and nodes in networks of their own."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.workspace import open_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = ("north", "south", "west")


@pytest.fixture
def online(federation: Any) -> Iterator[Callable[..., None]]:
    """Starts nodes, until the end of the test."""
    with ExitStack() as stack:

        def start(*names: str) -> None:
            for name in names:
                stack.enter_context(federation.node(name))

        yield start


def test_a_private_run_over_sites_ends_at_the_version_that_it_has_inline(
    federation: Any, online: Callable[..., None], tmp_path: Path
) -> None:
    online(*NAMES)
    three = {"names": list(NAMES)}
    federation.weft("run", federation.config(clients=three))
    over_sites = federation.version("notes")
    here = tmp_path / "inline"
    for name in NAMES:
        federation.weft(
            *("clients", "add", name, "--data", f"jsonl:{federation.data(name)}"),
            *("--examples", "24", "--public"),
            *("--label", f"region={name}"),
            home=here,
        )
    alone = federation.config(name="inline", backend="inline", clients=three)
    federation.weft("run", alone, home=here)
    assert over_sites["id"] == federation.version("inline", here)["id"]


@pytest.fixture
def scored(federation: Any, online: Callable[..., None]) -> Callable[..., Mapping[str, Any]]:
    """Asks clients for the scores of a version; two new sites hold a quarter of their data out."""
    federation.join("east", holdout=0.25)
    federation.join("centre", holdout=0.25, private=True)
    federation.step()
    online("east", "centre")
    here = {"simulate": {"data": f"jsonl:{federation.data('here')}", "parts": 2, "public": True}}
    alone = {"name": "scored", "backend": "inline", "clients": here, "privacy": None}
    federation.weft("run", federation.config(**alone, rounds=1, quorum=2))
    federation.until_online("east", "centre")

    def ask(*words: str) -> Mapping[str, Any]:
        found = json.loads(federation.weft("eval", "scored", "--json", "--clients", *words))
        return {**found, "rows": {row["client"]: row for row in found["rows"]}}

    return ask


def test_sites_tell_the_scores_of_what_they_hold_out_exactly_or_in_noise_that_is_charged(
    federation: Any, scored: Callable[..., Mapping[str, Any]]
) -> None:
    federation.weft(
        *("clients", "add", "like-east", "--data", f"jsonl:{federation.folder / 'east.jsonl'}"),
        *("--public", "--holdout", "0.25"),
    )
    exact = scored("east,like-east")["rows"]
    assert exact["east"]["reason"] == ""
    assert 0 < exact["east"]["num_examples"] < 24
    assert exact["east"]["scores"] == exact["like-east"]["scores"] != {}
    assert exact["east"]["num_examples"] == exact["like-east"]["num_examples"]

    noised = scored("centre", "--epsilon", "5", "--delta", "1e-3")
    assert noised["private"]
    assert noised["rows"]["centre"]["reason"] == ""
    assert noised["num_examples"] % 1  # a count is a whole number, and its noise is none

    [here] = spends(federation.home)
    state = federation.folder / "centre" / "state"
    with closing(sqlite3.connect(state / "ledger.db")) as ledger:
        [there] = ledger.execute("SELECT event, run, parameters, at FROM spends").fetchall()
        [answer] = ledger.execute("SELECT run, outcome, ended FROM answers").fetchall()
    assert there[:2] == (here.event, here.run)
    assert json.loads(there[2]) == here.parameters
    assert here.parameters["steps"] == 1
    assert answer[:2] == (here.run, "evaluation")
    assert there[3] < answer[2]  # it is charged before it is told
    for keys in (state / "site", federation.home / "sites"):
        assert not list(keys.glob("*/key"))


def spends(home: Path) -> list[Any]:
    workspace = open_workspace(home)
    try:
        return list(workspace.ledger.spends("centre"))
    finally:
        workspace.close()
