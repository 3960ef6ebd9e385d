"""A short document of sections, as Markdown and as HTML, in which no text is markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~-])")
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #999;padding:.3em .6em;text-align:left}"
)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a document.

    Attributes:
        title: of it.
        text: paragraphs.
        items: a list after them.
        table: rows after that, the first of which is the header; each as long as the others.
    """

    title: str
    text: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the document as Markdown."""
    parts = [f"# {_plain(title)}"]
    for section in sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_plain(text) for text in section.text]
        if section.items:
            parts.append("\n".join(f"- {_plain(item)}" for item in section.items))
        if section.table:
            rows = [f"| {' | '.join(map(_plain, row))} |" for row in section.table]
            rows.insert(1, "|---" * len(section.table[0]) + "|")
            parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def html_page(title: str, sections: Sequence[Section]) -> str:
    """Return the document as a page of HTML that loads nothing and runs nothing."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
        if section.items:
            items = "".join(f"<li>{html.escape(item)}</li>" for item in section.items)
            parts.append(f"<ul>{items}</ul>")
        if section.table:
            head, *rows = section.table
            lines = [_row(head, "th"), *(_row(row, "td") for row in rows)]
            parts.append(f"<table>{''.join(lines)}</table>")
    head_ = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"style-src 'unsafe-inline'\"><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>"
    )
    return "\n".join([head_, *parts, "</body></html>"]) + "\n"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _plain(text: str) -> str:
    """Return text in which nothing is Markdown's, nor HTML's, nor a line's end."""
    return _MARKUP.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))
