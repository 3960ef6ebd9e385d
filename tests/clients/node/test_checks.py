"""What is looked at before a node dials."""

import pytest

from clients.node.checks import NotReady, checks, refuse_unready
from clients.node.identity import new_key


@pytest.fixture
def wrong(node):
    """Return a function that returns what is wrong with a node, by key."""

    def find(settings):
        return {one.key: one.text for one in checks(settings) if not one.good}

    return find


@pytest.fixture
def ready(node, tmp_path):
    """Return the settings of a node that can start."""
    new_key(tmp_path / "node.key")
    return node()


def test_a_node_that_can_start_is_let(ready):
    refuse_unready(ready)

    texts = {one.key: one.text for one in checks(ready)}
    assert texts["data.notes"] == "10 records"
    assert "(float32)" in next(text for key, text in texts.items() if key.startswith("models."))


def test_each_thing_that_is_missing_is_named_with_what_to_do(wrong, node, tmp_path):
    settings = node(uri="jsonl:nowhere.jsonl")
    found = wrong(settings)

    assert "weft node init makes one" in found["key"]
    assert "there is no file" in found["data.notes"]
    with pytest.raises(NotReady) as caught:
        refuse_unready(settings)
    assert len(str(caught.value).splitlines()) == 2
    assert str(caught.value).startswith(f"{tmp_path}/node.yaml: key: ")


def test_a_folder_with_another_base_model_is_found_out(wrong, ready):
    folder = next(iter(ready.models.values()))
    other = ready.model_copy(update={"models": {"ab" * 32: folder, "cd" * 32: folder / "none"}})

    found = wrong(other)

    assert (
        "holds another base model; write the line that weft node models"
        in found["models.abababababab…"]
    )
    assert "there is no folder" in found["models.cdcdcdcdcdcd…"]


@pytest.mark.parametrize(
    ("line", "change", "said"),
    [
        ("not json", {}, "line 1: not JSON"),
        ('{"note": "a"}', {"fields": {"text": "text"}}, "no column 'text' (it has note)"),
        ('{"text": "a"}', {"unit": "patient"}, "no column 'patient' (it has text)"),
        ("", {}, "holds no record"),
    ],
)
def test_data_that_cannot_be_read_are_found_out(wrong, node, tmp_path, line, change, said):
    (tmp_path / "own.jsonl").write_text(line)

    assert said in wrong(node(uri="jsonl:own.jsonl", **change))["data.notes"]


def test_certificates_must_be_some_that_are_valid(wrong, ready, tmp_path):
    missing = ready.model_copy(update={"root_certificates": tmp_path / "ca.crt"})
    assert "cannot be read" in wrong(missing)["root_certificates"]

    (tmp_path / "ca.crt").write_text("no certificate")
    assert "holds no certificate" in wrong(missing)["root_certificates"]
