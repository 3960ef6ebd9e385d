"""Virtual environments of the peers that cannot share ours, kept from one run to the next."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def folder_of(name: str) -> Path:
    """Return a peer's folder, whether it is there or not; ``WEFT_BENCH_CACHE`` moves them all."""
    cache = os.environ.get("WEFT_BENCH_CACHE", "~/.cache/weft-bench")
    return Path(cache).expanduser() / name


def is_complete(folder: Path) -> bool:
    """Return whether :func:`make` came to its end there."""
    return (folder / "complete").exists()


def make(folder: Path, *installs: Sequence[str]) -> None:
    """Make an environment anew.

    Args:
        folder: of the environment; what is there is deleted.
        installs: the arguments of one ``pip install`` after the other.
    """
    print(f"making {folder}; this takes minutes", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    for arguments in installs:
        subprocess.run([*pip, *arguments], check=True)
    (folder / "complete").touch()
