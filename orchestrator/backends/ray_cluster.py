"""Ray itself: started on this machine, or joined elsewhere if it asks everybody for a token."""

from __future__ import annotations

import ipaddress
import os
import secrets
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

_MIB = 1 << 20
_KNOCK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
_WITH_TOKEN = (
    "start it with RAY_AUTH_MODE=token, and set here RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH "
    "(a file with its token) or RAY_AUTH_TOKEN"
)


class RayUnavailable(RuntimeError):
    """Ray could not be started or joined, or has no room for a worker."""


@dataclass(slots=True, eq=False)
class SharedRay:
    """The one Ray that a process can be in, and how many backends it has there.

    Attributes:
        address: of the cluster that was joined, or None for one of this machine.
        mine: whether it was started or joined here, and so ends here.
        users: how many use it.
    """

    address: str | None
    mine: bool
    users: int = 0

    def release(self) -> None:
        """Use it no more; the last one of those who do stops it, or leaves the cluster."""
        with _LOCK:
            self.users -= 1
            if self.mine and not self.users and _current == [self]:
                _current.clear()
                ray.shutdown()


_LOCK = threading.Lock()
_current: list[SharedRay] = []


def share_ray(address: str | None, cpus: int) -> SharedRay:
    """Return the process' Ray for one more user; the first of them starts or joins it.

    Args:
        address: of a cluster to join, or None for a Ray of this machine, or whichever the process
            was in before any of its users came.
        cpus: that one of this machine has at least.

    Raises:
        RayUnavailable: if that fails, or the process is in another one by now.
    """
    with _LOCK:
        if not ray.is_initialized():
            _current.clear()
            if address is None:
                start_ray(cpus)
            else:
                join_ray(address)
            _current.append(SharedRay(address, mine=True))
        if not _current:
            _current.append(SharedRay(None, mine=False))
        [shared] = _current
        if shared.mine and shared.address != address:
            place, wanted = (a and f"the Ray cluster at {a}" for a in (shared.address, address))
            raise RayUnavailable(
                f"this process works with {place or 'a Ray of its own'} until its runs there end, "
                f"and this run wants {wanted or 'one of its own'}; drive it from another process, "
                "such as one more weft coordinator"
            )
        shared.users += 1
        return shared


def start_ray(cpus: int) -> None:
    """Start a Ray on this machine.

    Raises:
        RayUnavailable: if that fails.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _close_to_others()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        ray.init(
            address="local",  # whatever RAY_ADDRESS says
            num_cpus=max(cpus, os.cpu_count() or 1),
            object_store_memory=max(78 * _MIB, min(2048 * _MIB, memory // 16)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise RayUnavailable(f"Ray cannot start ({error}); backend: inline needs no Ray") from error


def join_ray(address: str) -> None:
    """Join the Ray cluster at ``address``.

    Whoever can speak to a Ray without authentication can run any code on it, so beyond this
    machine's loopback it must ask for a token, and not only take one.

    Args:
        address: ``HOST:PORT`` of its head.

    Raises:
        RayUnavailable: if it does not ask for one, or cannot be joined.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        raise RayUnavailable(
            f"backend.address must be HOST:PORT of a Ray cluster's head, such as 10.0.0.1:6379, "
            f"got {address!r}"
        )
    if not _loopback(host.strip("[]")):
        if not _has_token():
            raise RayUnavailable(f"{_not_joined(address)}; {_WITH_TOKEN}")
        if _lets_in(address):
            raise RayUnavailable(
                f"{_not_joined(address)}, and this one lets everybody in; {_WITH_TOKEN}"
            )
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        text = str(error).strip().partition("\n")[0]
        raise RayUnavailable(
            f"the Ray cluster at {address} cannot be joined ({text}); check that it runs, that "
            "RAY_AUTH_MODE and the token are the same here and there, and that it has this Ray's "
            f"version, {ray.__version__}; backend: inline needs no Ray"
        ) from error


def room(threads: int, gpus: float) -> int:
    """Return how many workers of so many CPUs and GPUs fit into the Ray that was joined.

    Raises:
        RayUnavailable: if not even one does, which would otherwise wait in silence.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = 0
    for node in nodes:
        fits = int(node.get("CPU", 0.0) // threads)
        places += min(fits, int(node.get("GPU", 0.0) / gpus + 1e-9)) if gpus else fits
    if not places:
        has = ", ".join(f"{node.get('CPU', 0):g}/{node.get('GPU', 0):g}" for node in nodes)
        raise RayUnavailable(
            f"no machine of the Ray cluster has {threads} CPUs and {gpus:g} GPUs, which a worker "
            f"takes (CPUs/GPUs of its machines: {has or 'none'}); lower threads or "
            "backend.gpus_per_worker, or add a machine"
        )
    return places


def free_room(threads: int, gpus: float) -> int:
    """Return how many such workers the Ray that was joined has nothing else running in place of.

    It is Ray's last word, up to some seconds old, and does not say on which machine.
    """
    free = ray.available_resources()
    fits = int(free.get("CPU", 0.0) // threads)
    return min(fits, int(free.get("GPU", 0.0) / gpus + 1e-9)) if gpus else fits


def _close_to_others() -> None:
    """Have a Ray that is started here ask for a token: it listens on every network.

    Ray has read its environment when it was imported, and reads it again here. A mode that is set
    already, whichever, is left.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        AuthenticationTokenLoader.instance().reset_cache()
        Config.initialize("")


def _lets_in(address: str) -> bool:
    """Return whether the cluster answers one who has no token, in a process that has none."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", _KNOCK, address],
        env=env,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.returncode == 0


def _not_joined(address: str) -> str:
    return (
        f"the Ray cluster at {address} is not joined: it is not on this machine's loopback, and "
        "without token authentication anybody who reaches a cluster runs code on it"
    )


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _has_token() -> bool:
    """Return whether Ray's token authentication is on here, with a token to show."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return False
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return True
    place = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    path = Path(place)
    return path.is_file() and path.stat().st_size > 0
