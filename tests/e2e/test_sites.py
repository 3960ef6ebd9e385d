"""A federation of real sites: a SuperLink behind its proxy, and nodes in networks of their own."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.ray import RayBackend
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


@pytest.fixture
def inline(federation: Any, tmp_path: Path) -> Callable[..., str]:
    """Runs what was run over sites in one process that has all data, and returns the version."""

    def run(names: tuple[str, ...], **changes: Any) -> str:
        here = tmp_path / "inline"
        for name in names:
            federation.weft(
                *("clients", "add", name, "--data", f"jsonl:{federation.data(name)}"),
                *("--examples", "24", "--public", "--label", f"region={name}"),
                home=here,
            )
        config = federation.config(**changes | {"name": "inline", "backend": "inline"})
        federation.weft("run", config, home=here)
        return str(federation.version("inline", here)["id"])

    return run


def test_a_private_run_over_sites_ends_at_the_version_that_it_has_inline(
    federation: Any, online: Callable[..., None], inline: Callable[..., str]
) -> None:
    online(*NAMES)
    changes = {"clients": {"names": list(NAMES)}}
    federation.weft("run", federation.config(**changes))
    assert federation.version("notes")["id"] == inline(NAMES, **changes)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_run_of_sites_and_of_ray_workers_ends_at_the_version_that_it_has_inline(
    federation: Any,
    online: Callable[..., None],
    inline: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    online("north", "south")
    for name in ("ward-1", "ward-2"):
        federation.weft(
            *("clients", "add", name, "--data", f"jsonl:{federation.data(name)}"),
            *("--examples", "24", "--public"),
        )
    names = ("north", "south", "ward-1", "ward-2")
    changes = {"clients": {"names": list(names)}, "rounds": 1, "quorum": 4}
    trained = set()
    ran = RayBackend.run

    def noted(self: RayBackend, assignments: Any, *told: Any) -> Any:
        for result in ran(self, assignments, *told):
            if result is not None:
                trained.add(result.client)
            yield result

    monkeypatch.setattr(RayBackend, "run", noted)
    backend = {"name": "superlink", "local": "ray", "workers": 1}
    federation.weft("run", federation.config(name="mixed", backend=backend, **changes))
    assert {"ward-1", "ward-2"} <= trained
    assert not trained & {"north", "south"}
    assert federation.version("mixed")["id"] == inline(names, **changes)


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
    count = noised["num_examples"]  # a whole number, as its noise is none; below 0 it counts as 0
    assert count == 0 or count % 1

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
