"""What stays at a client: private keys, the outbox of finished updates, personal tensors.

Everything lies under one folder that no Update, Version, log or recipe ever shows.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from clients.files import write_durably
from clients.keys import data_key, drawn_once, run_folder
from clients.noise import insecure_key
from strategies.base import Tensors

_BROADCAST = "broadcast.safetensors"


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
        for past in range(round_, 0, -1):
            path = folder / f"state-{past}.safetensors"
            if path.exists():
                return dict(load_file(path))
        return {}

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

    def note_error(self, client: str, text: str) -> None:
        """Keep the newest unexpected error of a client, which may hold data and so stays here."""
        (self._folder / f"error-{client}.txt").write_text(text, "utf-8")

    def _run_folder(self, run: str, client: str) -> Path:
        folder = run_folder(self._folder, run, client)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder
