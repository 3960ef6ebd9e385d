"""Where base models are: recipes name them by hash, a home remembers where it saw them."""

from __future__ import annotations

import json
from pathlib import Path

from clients.assignment import ModelSpec
from clients.files import write_durably
from clients.weights import ModelNotFound
from orchestrator.workspace import Workspace
from storage.lineage import Version


def remember_base(workspace: Workspace, model: ModelSpec) -> None:
    """Note where a base model was seen: recipes name it by hash, not by place."""
    folder = workspace.home / "bases"
    folder.mkdir(exist_ok=True)
    place = str(Path(model.id).absolute()) if Path(model.id).exists() else model.id
    note = json.dumps({"id": place, "revision": model.revision})
    write_durably(folder / f"{model.hash}.json", note.encode())


def base_of(workspace: Workspace, version: Version, model: str | None = None) -> ModelSpec:
    """Return the base model of a version, with the place where it is loaded from.

    Raises:
        ModelNotFound: if nobody says where it is.
    """
    recipe = dict(version.recipe["model"])
    recipe["labels"] = tuple(recipe["labels"])
    note = workspace.home / "bases" / f"{recipe['hash']}.json"
    if model is not None:
        recipe["id"] = model
    elif recipe["id"] is None:
        if not note.exists():
            raise ModelNotFound(
                f"the base model {recipe['hash'][:12]} of this version was a local folder that "
                "this home has not seen; say where it is with --model DIR"
            )
        recipe["id"] = json.loads(note.read_text("utf-8"))["id"]
    return ModelSpec(**recipe)
