"""A document's text is text, in Markdown and in HTML."""

from orchestrator.documents import Section, html_page, markdown

HOSTILE = "<script>alert(1)</script> | [x](http://x) *bold*\n# title"


def test_no_text_becomes_markup():
    sections = [Section(HOSTILE, (HOSTILE,), (HOSTILE,), ((HOSTILE, "b"), ("c", HOSTILE)))]

    page, text = html_page(HOSTILE, sections), markdown(HOSTILE, sections)

    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7
    assert "<script" not in text
    assert r"\[x\]\(http://x\) \*bold\*" in text
    assert text.count("\n# ") == 0  # its own title is the first line


def test_a_table_has_as_many_cells_as_its_header():
    made = markdown("t", [Section("s", table=(("a", "b"), ("1 | 2", "3")))])

    assert made.splitlines()[-3:] == ["| a | b |", "|---|---|", r"| 1 \| 2 | 3 |"]


def test_a_page_loads_nothing_and_runs_nothing():
    page = html_page("t", [Section("s", ("p",), ("i",))])

    assert "default-src 'none'" in page
    assert "<h2>s</h2>\n<p>p</p>\n<ul><li>i</li></ul>" in page
