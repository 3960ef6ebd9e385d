"""The lineage that the documentation shows is what such runs have."""

import re
from collections import Counter
from pathlib import Path

from clients.assignment import PluginChoice
from orchestrator import service
from orchestrator.drawing import mermaid
from storage.ledger import ClientRecord

PAGE = Path(__file__).resolve().parents[2] / "docs" / "store.md"


def shape(picture: str) -> Counter:
    """Count nodes and arrows by what they say, but for ids, digests and the base model's name."""
    nodes = {}
    for key, text in re.findall(r'^  (\w+)[\[(]+"(.*)"[\])]+$', picture, re.MULTILINE):
        nodes[key] = "base" if key.startswith("b") else re.sub("[0-9a-f]{12}", "ID", text)
    arrows = re.findall(r'^  (\w+) -- "(.*)" --> (\w+)$', picture, re.MULTILINE)
    assert len(nodes) + len(arrows) + 1 == len(picture.strip().splitlines())
    said = [(nodes[a], re.sub("[0-9a-f]{12}", "ID", kind), nodes[b]) for a, kind, b in arrows]
    return Counter(nodes.values()) + Counter(said)


def test_the_picture_of_a_lineage_has_the_shape_of_a_real_one(workspace, tiny, notes):
    for number, name in enumerate(("north", "south")):
        data = notes(name, shift=number)
        workspace.ledger.add_client(ClientRecord(name, data, name, num_examples=12))
    task = {"strategy": "fedsvd", "rounds": 2, "steps": 1}
    service.launch(workspace, tiny(**task))
    more = {"name": "task-2", "start": "stack", "start_from": "task-1"}
    service.launch(workspace, tiny(**task, **more))
    service.merge(workspace, ["task-1", "task-2"], PluginChoice("cat"), "support-bot")
    service.promote(workspace, "support-bot", "production", "support-bot")

    drawn = mermaid(service.lineage(workspace, "support-bot"))
    [shown] = re.findall(r"```mermaid\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert shape(shown) == shape(drawn)
