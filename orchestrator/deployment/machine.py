"""Looks at this machine: versions, room on disks, GPU, and who may read secrets."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from orchestrator.deployment.findings import Finding, fail, ok, warn

_GIB = 1 << 30
LOW, FULL = 10 * _GIB, _GIB
"""Bytes: below the first a disk is worth a word, below the second a run ends soon."""


def versions() -> Iterator[Finding]:
    """Compare what is installed with what this weft asks for."""
    here, wrong = [], []
    for text in requires("weft") or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "missing"
        if requirement.name in ("flwr", "torch"):
            here.append(f"{requirement.name} {found}")
        if found == "missing" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, and not {requirement.specifier}")
    if wrong:
        do = "install weft again with -c constraints.txt, in an environment of its own"
        yield fail("versions", f"weft {version('weft')}: {'; '.join(wrong)}", do)
    else:
        yield ok("versions", f"weft {version('weft')}, {', '.join(here)}")


def same_versions(check: str, whose: str, theirs: Mapping[str, str]) -> Iterator[Finding]:
    """Compare versions that somebody told with those here.

    Args:
        check: the finding's name.
        whose: who told them, for the sentence.
        theirs: versions by name, ``weft`` or ``flwr``; an empty one was not told.
    """
    for name, found in theirs.items():
        here = version(name)
        if not found or _minor(found) == _minor(here):
            continue
        says = f"{whose} has {name} {found}, and here is {here}"
        do = f"install the same weft on both sides; {name} must agree in major and minor version"
        yield (fail if name == "flwr" else warn)(check, says, do)


def _minor(text: str) -> tuple[str, ...]:
    return tuple(text.split(".")[:2])


def disks(folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Look at the room where folders are, or will be.

    Args:
        folders: by what is kept there.
    """
    for what, folder in folders.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        says = f"{free / _GIB:.1f} GiB are free for {what}, in {folder}"
        if free < FULL:
            yield fail("disk", says, "make room: a run stops at a full disk, and can be resumed")
        elif free < LOW:
            yield warn("disk", says, "make room before long runs; weft gc deletes what none needs")
        else:
            yield ok("disk", says)


def gpu() -> Iterator[Finding]:
    """Look for a GPU that torch, as it is installed, can or cannot use; imports no torch."""
    found = sorted(Path("/dev").glob("nvidia[0-9]*"))
    built = _torch_cuda()
    if not found:
        yield ok("gpu", "there is no NVIDIA GPU here; training is on the CPU")
    elif built is None:
        yield warn(
            "gpu",
            f"there are {len(found)} NVIDIA GPUs, and torch is a build without CUDA",
            "install torch from https://download.pytorch.org/whl/cu130, or leave it: CPU it is",
        )
    else:
        yield ok("gpu", f"{len(found)} NVIDIA GPUs, and torch for CUDA {built}")


def _torch_cuda() -> str | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    facts = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    built = re.search(r"^cuda: [^=]*= '([^']+)'", facts, re.MULTILINE)
    return built[1] if built else None


def secrets(files: Iterable[Path]) -> Iterator[Finding]:
    """Look who may read files that only their owner should.

    Args:
        files: those that exist are looked at; what a container is given in ``/run/secrets`` is
            nobody else's, whatever its mode.
    """
    there = [f for f in files if f.is_file() and f.parent != Path("/run/secrets")]
    shown = [file for file in there if file.stat().st_mode & 0o077]
    for file in shown:
        mode = file.stat().st_mode & 0o777
        yield fail(
            "secrets",
            f"others may read {file} (mode {mode:04o})",
            f"run: chmod 600 {file}; and make another secret, if somebody else has been here",
        )
    if there and not shown:
        yield ok("secrets", f"{len(there)} secret files are their owner's alone")
