"""A file that people write holds a mapping, or is refused with a sentence that names it."""

import pytest

from clients.yaml_files import BadFile, mapping_in


def test_what_a_file_says_is_returned(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("name: notes\nrounds: 3\n")

    assert mapping_in(file, "", "") == {"name": "notes", "rounds": 3}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no file .*run.yaml; weft init writes one"),
        (b"a: [1", "run.yaml is not YAML"),
        (b"- a\n", "run.yaml must hold a mapping of options, such as 'name: notes'"),
        (b"", "run.yaml must hold a mapping"),
        (b"\xff\xfe\xff", "run.yaml cannot be read"),
        (b"!!python/object/apply:os.getcwd []", "run.yaml is not YAML"),
    ],
)
def test_what_holds_no_mapping_is_refused(tmp_path, content, why):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(BadFile, match=why):
        mapping_in(file, "weft init writes one", "name: notes")
