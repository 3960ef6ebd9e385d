"""Weft as a Flower app that Flower starts: a run of a home over a Grid, by public interfaces."""

from __future__ import annotations

import io
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.thin_app import thin_app
from orchestrator.workspace import open_workspace


@pytest.fixture(scope="module")
def isolation() -> str:
    """How the SuperLink of the federation runs apps: as Flower does by default."""
    return "subprocess"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_flower_drives_over_weft_s_nodes_ends_at_the_version_that_it_has_inline(
    federation: Any, tmp_path: Path
) -> None:
    changes = {"clients": {"names": ["north", "south"]}, "rounds": 1, "quorum": 2}
    config = federation.config(**changes)
    federation.weft("run", config, "--detach")
    here = tmp_path / "inline"
    for name in ("north", "south"):
        federation.weft(
            *("clients", "add", name, "--data", f"jsonl:{federation.data(name)}"),
            *("--examples", "24", "--public", "--label", f"region={name}"),
            home=here,
        )
    alone = federation.config(name="inline", backend="inline", **changes)
    federation.weft("run", alone, home=here)
    app = tmp_path / "app"
    zipfile.ZipFile(io.BytesIO(thin_app())).extractall(app)
    flwr = federation.servers.flwr(federation.port, federation.folder)

    with ExitStack() as running:
        for name in ("north", "south"):
            running.enter_context(federation.node(name))
        federation.until_online("north", "south")
        run = last_run(federation.home)
        settings = f'home="{federation.home}" run="{run.id}"'
        said = flwr("run", app, "test", "--run-config", settings, "--stream")

    assert last_run(federation.home).status == "completed", said
    assert federation.version("notes")["id"] == federation.version("inline", here)["id"]


def last_run(home: Path) -> Any:
    workspace = open_workspace(home)
    try:
        return workspace.ledger.runs()[0]
    finally:
        workspace.close()
