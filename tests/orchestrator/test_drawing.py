"""Lineages in Mermaid and Graphviz: nothing in them is taken for the language's own signs."""

import re
import shutil
import subprocess

import pytest

from orchestrator import service
from orchestrator.drawing import graphviz, mermaid

HOSTILE = 'x"] --> y; click z "javascript:alert(1)" \\'


@pytest.fixture
def ancestry(workspace, grow):
    grow("start")
    grow("one", [("start", "init")], clients=["north", "south"])
    grow("two", [("start", "init")], clients=[HOSTILE])
    grow("bot", [("one", "merge"), ("two", "merge")], kind="merge", merge={"name": "cat"})
    return service.lineage(workspace, "bot")


def test_mermaid_shows_bases_clients_and_versions_in_the_direction_of_tensors(ancestry):
    text = mermaid(ancestry)
    node = dict(re.findall(r'^  (\w+)[\[(]+"(.*)"[\])]+$', text, re.MULTILINE))
    arrows = re.findall(r'^  (\w+) -- "(.*)" --> (\w+)$', text, re.MULTILINE)
    assert len(node) + len(arrows) + 1 == len(text.splitlines())
    shown = {(node[a].split("<br>")[0].split(" ")[-1], kind, node[b]) for a, kind, b in arrows}
    kinds = [(who, kind) for who, kind, _ in shown]
    assert ("one:v1", "merge") in kinds
    assert ("start:v1", "init") in kinds
    assert ("some-model", "base") in kinds
    assert [who for who, _ in kinds].count("north") == 1
    assert "hash abababababab" in next(t for t in node.values() if "some-model" in t)
    assert "revision main" in text


def test_nothing_in_a_name_is_taken_for_a_sign(ancestry):
    assert HOSTILE not in mermaid(ancestry)
    assert '"javascript' not in mermaid(ancestry)
    assert 'x\\"] --> y' in graphviz(ancestry)


def test_graphviz_has_a_line_for_each_node_and_edge(ancestry):
    lines = graphviz(ancestry).splitlines()
    quoted = r'"(?:[^"\\]|\\.)*"'
    assert [lines[0], lines[-1]] == ["digraph lineage {", "}"]
    nodes = [line for line in lines if re.fullmatch(rf"  \w+ \[label={quoted}, shape=\w+\];", line)]
    edges = [line for line in lines if re.fullmatch(rf"  \w+ -> \w+ \[label={quoted}\];", line)]
    assert (len(nodes), len(edges)) == (4 + 3 + 1, 4 + 3 + 1)
    assert len(lines) == len(nodes) + len(edges) + 4


def test_graphviz_itself_reads_it(ancestry):
    dot = shutil.which("dot")
    if dot is None:
        pytest.skip("Graphviz is not installed")
    done = subprocess.run([dot, "-Tsvg"], input=graphviz(ancestry), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
