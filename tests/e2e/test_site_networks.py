"""The networks that sites of the end-to-end tests live in: one cable, and it can be pulled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DIAL = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1).close()
except OSError:
    sys.exit(1)
"""


def reaches(where: list[str], host: str, port: int) -> bool:
    command = [*where, sys.executable, "-Ic", DIAL, host, str(port)]
    return subprocess.run(command, timeout=60).returncode == 0


@pytest.mark.slow
def test_a_site_reaches_the_proxy_and_nothing_else_until_its_cable_is_pulled(
    servers: Any, networks: Any, tmp_path: Path
) -> None:
    if not networks.separate:
        pytest.skip("no network namespace can be made here")
    north, south = networks.add("north"), networks.add("south")
    with (
        servers.superlink(tmp_path) as superlink,
        servers.proxy(superlink, tmp_path, f"localhost {networks.address}") as proxy,
    ):
        for site in (north, south):
            assert reaches(site, networks.address, proxy)
            assert not reaches(site, networks.address, superlink)
            assert not reaches(site, "127.0.0.1", superlink)
        networks.cut("north")
        assert not reaches(north, networks.address, proxy)
        assert reaches(south, networks.address, proxy)
        networks.restore("north")
        servers.until(lambda: reaches(north, networks.address, proxy))
        site = tmp_path / "site"
        site.mkdir()
        key(site)
        admin = servers.admin(superlink, tmp_path)
        admin("register", site / "key.pub", "test", "--name", "north")
        with servers.supernode(f"{networks.address}:{proxy}", site / "key", site, north):
            servers.until(lambda: '"online"' in admin("list", "test", "--format", "json"))


def key(folder: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", "key"]
    subprocess.run(command, cwd=folder, check=True)
