"""The Flower app of every run of weft's: two modules that import the weft that is installed.

Nothing of it is run where nodes are started with ``weft node start``, which load no app.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

_PYPROJECT = """\
[project]
name = "weft"
version = "1.0.0"
description = "Runs of the weft that is installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "weft"

[tool.flwr.app.components]
serverapp = "weft_app.server:app"
clientapp = "weft_app.client:app"

[tool.flwr.app.config]
home = ""
run = ""
"""
_APP = {
    "pyproject.toml": _PYPROJECT.encode(),
    "weft_app/__init__.py": b'"""Weft as it is installed."""\n',
    # flwr run looks for an assignment
    "weft_app/server.py": b"from orchestrator.flower_app import server\n\napp = server\n",
    "weft_app/client.py": b"from orchestrator.flower_app import client\n\napp = client\n",
}


def thin_app() -> bytes:
    """Return the Flower app that every run of ours is of, as a bundle: the same bytes each time."""
    bundle, contents = io.BytesIO(), []
    with zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(_APP.items()):
            archive.writestr(zipfile.ZipInfo(name), data)  # dated 1980
            contents.append(f"{name},{hashlib.sha256(data).hexdigest()},{8 * len(data)}")
        archive.writestr(zipfile.ZipInfo(".info/CONTENT"), "\n".join(contents))
    return bundle.getvalue()
