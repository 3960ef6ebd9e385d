"""What goes together, told by the planner's own refusals."""

from pathlib import Path

import pytest

from orchestrator.matrix import markdown, matrix

PAGE = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"
MARK = "<!-- matrix -->\n"


@pytest.fixture(scope="module")
def cells():
    return matrix(["fedavg", "fedsvd", "lora-a2", "median"], ["lora", "dora", "kasa"])


def test_the_matrix_has_every_combination_once(cells):
    places = [(c.strategy, c.adapter, c.regularizer, c.private) for c in cells]
    assert len(set(places)) == len(places) == 4 * 3 * 2 * (len({c.regularizer for c in cells}))


def test_a_cell_has_the_planners_reason(cells):
    by_place = {(c.strategy, c.adapter, c.regularizer, c.private): c.reason for c in cells}

    assert by_place["fedavg", "lora", "", True] == ""
    assert by_place["fedavg", "dora", "", True] == ""
    assert by_place["lora-a2", "lora", "", False] == ""
    assert "'lora-a2' (as set) lets clients send" in by_place["lora-a2", "lora", "", True]
    assert "acts on tensors that strategy 'fedsvd'" in by_place["fedsvd", "lora", "o-lora", False]
    assert by_place["fedavg", "kasa", "kasa", False] == ""


def test_a_wrapper_wraps_what_it_accepts(cells):
    chosen = ("median", "lora", "")
    plain = [c.reason for c in cells if (c.strategy, c.adapter, c.regularizer) == chosen]
    assert plain == ["", ""]


def test_a_reason_is_written_once_and_without_the_names_of_its_place(cells):
    text = markdown(cells)

    assert text.count("which example-level privacy does not cover") == 1
    assert "| fedavg | yes | yes | yes |" in text
    assert "| lora-a2 | no DP [" in text
    assert "'fedsvd'" not in text


@pytest.mark.slow
def test_the_page_of_the_matrix_is_what_planning_says():
    written = PAGE.read_text("utf-8").partition(MARK)[2]
    assert written == markdown(matrix()), "put there: weft plugins --matrix"
