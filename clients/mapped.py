"""Base weights that all processes of a machine share: mapped from a file, never copied.

safetensors maps a file's pages privately and transformers keeps the views, so a model whose file
has the wanted dtype costs each further process nothing: the pages are the system's one copy. A
model that must be converted would be private to each process: it is converted once a machine, and
all processes, the first one too, map the converted file. A write to such a page would make a copy
of the process's own; the file never changes. Weights that transformers fuses on loading, as it does
for some mixtures of experts, are not shared in their own dtype.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from safetensors import safe_open

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def mappable(folder: Path, dtype: torch.dtype, key: str, load: Callable[[], Any]) -> Path:
    """Return a folder whose weights are of ``dtype``: ``folder`` itself, or a converted copy.

    The copy is made by the first process that needs it, while others wait, and kept in the cache:
    ``$WEFT_CACHE``, or ``weft`` in Hugging Face's. Where that cannot be written, each process
    converts for itself, and a warning says so.

    Args:
        folder: the base model's.
        dtype: what the weights are held in.
        key: names the base model's bytes, the dtype and the part of it that is loaded.
        load: returns the model in ``dtype``, in this process's own memory.
    """
    if _file_dtypes(folder) <= {_NAMES[dtype]}:
        return folder
    cache = Path(os.environ.get("WEFT_CACHE") or Path(HF_HOME) / "weft") / "weights"
    place = cache / f"{key}-transformers-{transformers.__version__}"
    try:
        with _alone(cache, place.name):
            if not place.is_dir():
                _convert(load(), place)
    except OSError as error:
        logging.getLogger(__name__).warning(
            "the base model's weights cannot be shared between workers, and each holds its own: "
            "%s cannot be written (%s); set WEFT_CACHE to a folder that can",
            cache,
            error.strerror or error,
        )
        return folder
    return place


def _file_dtypes(folder: Path) -> set[str]:
    """Return the floating dtypes of the weights in ``folder``, by safetensors' names."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return {name for name in found if name.startswith(("F", "BF"))}


@contextmanager
def _alone(cache: Path, name: str) -> Iterator[None]:
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(model: Any, place: Path) -> None:
    """Write ``model`` so that after a crash ``place`` is whole or not there."""
    draft = Path(tempfile.mkdtemp(dir=place.parent))
    try:
        # By the names it has now: under the original ones some would be fused anew, privately.
        model.save_pretrained(draft, save_original_format=False)
        for path in draft.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        draft.rename(place)
    except BaseException:
        shutil.rmtree(draft)
        raise
