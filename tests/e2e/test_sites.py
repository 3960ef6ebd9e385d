"""A federation of real sites: a SuperLink behind its proxy, and nodes in networks of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

NAMES = ("north", "south", "west")


@pytest.fixture
def online(federation: Any) -> Iterator[Callable[..., None]]:
    """Starts nodes, until the end of the test."""
    with ExitStack() as stack:

        def start(*names: str) -> None:
            for name in names:
                stack.enter_context(federation.node(name))

        yield start


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_private_run_over_sites_ends_at_the_version_that_it_has_inline(
    federation: Any, online: Callable[..., None], tmp_path: Path
) -> None:
    online(*NAMES)
    federation.weft("run", federation.config())
    over_sites = federation.version("notes")
    here = tmp_path / "inline"
    for name in NAMES:
        federation.weft(
            *("clients", "add", name, "--data", f"jsonl:{federation.data(name)}"),
            *("--examples", "24", "--public"),
            *("--label", f"region={name}"),
            home=here,
        )
    federation.weft("run", federation.config(name="inline", backend="inline"), home=here)
    assert over_sites["id"] == federation.version("inline", here)["id"]
