"""The README's table of methods is what the plug-ins say of themselves."""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from orchestrator.catalogue import plugin_table

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- plugins -->\n", "<!-- end of plugins -->"


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the Markdown table of the rows that ``weft plugins --json`` prints."""
    lines = ["| | method | what it does | source |", "|---|---|---|---|"]
    for kind, members in groupby(rows, key=lambda row: row["kind"]):
        for number, row in enumerate(members):
            first = f"**{kind}**" if number == 0 else ""
            source = row["source"]
            if re.fullmatch(r"\d{4}\.\d{4,5}", source):
                source = f"[{source}](https://arxiv.org/abs/{source})"
            lines.append(f"| {first} | `{row['name']}` | {row['summary']} | {source} |")
    return "\n".join(lines) + "\n"


def test_the_readme_lists_every_plug_in_as_it_describes_itself() -> None:
    written = README.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written == table(plugin_table(None)), "put what is expected between the two marks"


def test_a_table_names_a_kind_once_and_links_to_the_source() -> None:
    rows = [
        {"kind": "merge", "name": "cat", "summary": "Sum.", "source": "2409.05976"},
        {"kind": "merge", "name": "mine", "summary": "Other.", "source": ""},
    ]
    assert table(rows).splitlines()[2:] == [
        "| **merge** | `cat` | Sum. | [2409.05976](https://arxiv.org/abs/2409.05976) |",
        "|  | `mine` | Other. |  |",
    ]
