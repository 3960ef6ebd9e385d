"""Where a site keeps the private key of a client in a run."""

from __future__ import annotations

import hashlib
from pathlib import Path


def run_folder(site: Path, run: str, client: str) -> Path:
    """Return where the site in folder ``site`` keeps what belongs to a client in a run."""
    return site / hashlib.sha256(f"{run}\0{client}".encode()).hexdigest()[:32]


def has_key(site: Path, run: str, client: str) -> bool:
    """Return whether the site in folder ``site`` has drawn the key of (run, client)."""
    return (run_folder(site, run, client) / "key").is_file()
