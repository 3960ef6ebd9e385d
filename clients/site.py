"""What stays at a client: private keys, the outbox of finished updates, personal tensors, examples.

Everything lies under one folder that no Update, Version, log or recipe ever shows.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from clients.files import write_durably
from clients.keys import data_key, drawn_once, run_folder
from clients.noise import insecure_key
from strategies.base import Tensors

_BROADCAST = "broadcast.safetensors"
_EXAMPLES = "examples"
_STATE = re.compile(r"state-([1-9][0-9]*)\.safetensors")


class UpdateGone(RuntimeError):
    """An update that was sent is no longer kept, and may not be made a second time."""


class Site:
    """The private folder of one client's side.

    Args:
        folder: created with mode 0700 where it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def run_key(self, run: str, client: str, insecure_seed: int | None = None) -> bytes:
        """Return the 256-bit key of (run, client), drawn once and never shown.

        ``insecure_seed`` replaces it for tests.
        """
        if insecure_seed is not None:
            return insecure_key(insecure_seed, client)
        return drawn_once(self._run_folder(run, client) / "key")

    def data_key(self, insecure_seed: int | None = None) -> bytes:
        """Return the key of data fingerprints, the same for all runs of this site."""
        if insecure_seed is not None:
            return insecure_key(insecure_seed, "data fingerprints")
        return data_key(self._folder)

    def share_data_key(self, other: Site) -> None:
        """Fingerprint data as ``other`` does; for training again what was trained there."""
        write_durably(self._folder / "data.key", other.data_key())

    def stored_update(self, run: str, client: str, assignment: str) -> bytes | None:
        """Return the bytes of the update already made for this assignment digest, or None.

        Raises:
            UpdateGone: if it was made, and dropped for a later one: it must not be made again.
        """
        path = self._run_folder(run, client) / f"update-{assignment}"
        if not path.exists():
            return None
        data = path.read_bytes()
        if not data:
            raise UpdateGone(
                f"{client} has already sent an update for assignment {assignment[:12]} and one for "
                "a later round; a second one with the same noise would not be private"
            )
        return data

    def store_update(
        self, run: str, client: str, assignment: str, data: bytes, private: bool
    ) -> None:
        """Keep an update before it is sent; earlier ones are dropped.

        Of a ``private`` one the fact is kept: made again from other data, with the same noise, it
        would tell what changed.
        """
        folder = self._run_folder(run, client)
        path = folder / f"update-{assignment}"
        write_durably(path, data)
        for checkpoint in folder.glob("checkpoint-*"):  # of this assignment, or of one given up
            checkpoint.unlink(missing_ok=True)
        for other in folder.glob("update-*"):
            if other == path:
                continue
            if not private:
                other.unlink(missing_ok=True)
            elif other.stat().st_size:
                write_durably(other, b"")

    def answered(self, run: str, client: str, assignment: str) -> bool:
        """Return whether an assignment digest was answered: what was sent is known or gone."""
        folder = run_folder(self._folder, run, client)
        return any((folder / f"{kind}-{assignment}").exists() for kind in ("update", "sums"))

    def stored_sums(self, run: str, client: str, assignment: str) -> dict[str, float] | None:
        """Return the noised sums already released for this assignment digest, or None."""
        path = self._run_folder(run, client) / f"sums-{assignment}"
        if not path.exists():
            return None
        sums: dict[str, float] = json.loads(path.read_text("utf-8"))
        return sums

    def store_sums(self, run: str, client: str, assignment: str, sums: Mapping[str, float]) -> None:
        """Keep noised sums before they are sent: of other data, with the same noise, they tell."""
        path = self._run_folder(run, client) / f"sums-{assignment}"
        write_durably(path, json.dumps(dict(sums)).encode())

    def checkpoint(self, run: str, client: str, assignment: str) -> bytes | None:
        """Return what :meth:`store_checkpoint` kept for this assignment digest last, or None."""
        path = self._run_folder(run, client) / f"checkpoint-{assignment}"
        return path.read_bytes() if path.exists() else None

    def store_checkpoint(self, run: str, client: str, assignment: str, data: bytes) -> None:
        """Keep how far an assignment is, until its update is stored; earlier ones are dropped."""
        folder = self._run_folder(run, client)
        path = folder / f"checkpoint-{assignment}"
        write_durably(path, data)
        for other in folder.glob("checkpoint-*"):
            if other != path:
                other.unlink(missing_ok=True)

    def state(self, run: str, client: str, round_: int) -> dict[str, Tensor]:
        """Return the client's own tensors as round ``round_`` wrote them; empty for none.

        A client that sat out some rounds reads its newest state at or before ``round_``.
        """
        folder = self._run_folder(run, client)
        named = {int(m[1]): path for path in folder.iterdir() if (m := _STATE.fullmatch(path.name))}
        newest = max((past for past in named if past <= round_), default=0)
        return dict(load_file(named[newest])) if newest else {}

    def store_state(self, run: str, client: str, round_: int, tensors: Tensors) -> None:
        """Keep the client's own tensors of round ``round_``; retries write the same file."""
        path = self._run_folder(run, client) / f"state-{round_}.safetensors"
        write_durably(path, save({k: v.contiguous() for k, v in tensors.items()}))

    def broadcast(self, run: str, client: str) -> dict[str, Tensor]:
        """Return what :meth:`store_broadcast` kept; empty for nothing, or nothing readable."""
        path = self._run_folder(run, client) / _BROADCAST
        try:
            return dict(load_file(path))
        except (OSError, SafetensorError):
            return {}

    def store_broadcast(self, run: str, client: str, tensors: Tensors) -> None:
        """Keep what the client was sent last; what it was sent before is dropped."""
        path = self._run_folder(run, client) / _BROADCAST
        own = {k: v.detach().cpu().clone() for k, v in tensors.items()}  # none shares its memory
        write_durably(path, save(own))

    def kept_examples(self, client: str, update: str) -> dict[str, bytes]:
        """Return what :meth:`keep_examples` kept with an update of a client's, or nothing."""
        folder = self._examples_of(client)
        try:
            parts = json.loads((folder / f"update-{update}").read_text("utf-8"))
        except FileNotFoundError:
            return {}
        return {name: (folder / sha256).read_bytes() for name, sha256 in parts.items()}

    def keep_examples(self, client: str, update: str, parts: Mapping[str, bytes]) -> None:
        """Keep a client's own examples, for the tasks that go on from one of its updates.

        They are found by that update's digest, which is in the recipe of the version it became part
        of: so a run that goes on from any version, or again from an old one, finds what was kept
        then, and nobody else can. What several updates share is there once. Doing it again for the
        same update writes the same.

        Args:
            client: whose they are.
            update: digest of the update.
            parts: the bytes, by name.
        """
        folder = self._examples_of(client)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        named = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(parts.items())}
        for name, sha256 in named.items():
            if not (folder / sha256).exists():
                write_durably(folder / sha256, parts[name])
        write_durably(folder / f"update-{update}", json.dumps(named).encode())

    def forget_examples(self, client: str) -> int:
        """Delete all examples that a client kept, for good; return how many files those were."""
        folder = self._examples_of(client)
        found = [path for path in folder.glob("*") if not path.name.startswith("update-")]
        shutil.rmtree(folder, ignore_errors=True)
        return len(found)

    def share_examples(self, other: Site) -> None:
        """Know the examples that ``other`` keeps; for training again what was trained there."""
        kept = other._folder / _EXAMPLES
        if kept.is_dir():
            shutil.copytree(kept, self._folder / _EXAMPLES, dirs_exist_ok=True)

    def note_error(self, client: str, text: str) -> None:
        """Keep the newest unexpected error of a client, which may hold data and so stays here."""
        (self._folder / f"error-{client}.txt").write_text(text, "utf-8")

    def _examples_of(self, client: str) -> Path:
        return self._folder / _EXAMPLES / hashlib.sha256(client.encode()).hexdigest()[:32]

    def _run_folder(self, run: str, client: str) -> Path:
        folder = run_folder(self._folder, run, client)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder
