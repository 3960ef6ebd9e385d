import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from clients.builtin import docstrings, parameter_types

NUMPYDOC = '''
def f(tol, axis, order, *args):
    """Do something.

    Parameters
    ----------
    tol : float, optional
        Relative `tolerance` at which the solver stops.
        Default is 1e-3.
    axis : int or tuple of ints
        Axis or axes along which it is done.
    order : {'C', 'F'}, optional
        Memory layout of what is returned.
    *args : list of ndarray
        List of arrays whose axes are joined.

    Returns
    -------
    out : ndarray
        What comes out of it in the end.
    """
'''
GOOGLEDOC = '''
class C:
    def f(self):
        """Do something.

        Args:
            dtype (`torch.dtype`, *optional*): The type in which the weights are kept.
            names (`list[str]`, *optional*, defaults to `[]`): The modules that stay as
                they are, by name.
            verbose (`bool`, *optional*, defaults to `False`):
                Whether to report progress while it runs.

        Returns:
            `int`: nothing of interest here.
        """
'''
ATTACHED = '''
add_newdoc("module", "thing", """
    Parameters
    ----------
    count : int
        How many items are to be read.
    """)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write files into an installed-looking package; importing it would fail."""

    def write(**files):
        root = tmp_path / "documented"
        root.mkdir()
        (root / "__init__.py").write_text("raise RuntimeError('imported')\n")
        for name, text in files.items():
            (root / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return parameter_types._parse_package("documented")

    return write


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of its own, small to fill: as if one small package were the only client."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def parse(client):
        calls.append(client)
        row = {"text": f"x: what {client} says", "label": "int", "client": client, "file": "a.py"}
        return [row]

    monkeypatch.setattr(parameter_types, "_parse_package", parse)
    parameter_types._load.cache_clear()
    yield calls
    parameter_types._load.cache_clear()


def as_pairs(rows):
    return {row["text"]: row["label"] for row in rows}


def test_numpy_docstrings_give_rows(package):
    assert as_pairs(package(a=NUMPYDOC)) == {
        "tol: Relative tolerance at which the solver stops.": "float",
        "order: Memory layout of what is returned.": "str",
        "args: arrays whose axes are joined.": "sequence",
    }


def test_google_docstrings_give_rows(package):
    assert as_pairs(package(a=GOOGLEDOC)) == {
        "names: The modules that stay as they are, by name.": "sequence",
        "verbose: Whether to report progress while it runs.": "bool",
    }


def test_documentation_attached_by_a_call_gives_rows(package):
    assert as_pairs(package(a=ATTACHED)) == {"count: How many items are to be read.": "int"}


def test_a_package_is_read_without_being_imported(package):
    package(a=NUMPYDOC)
    assert "documented" not in sys.modules


def test_files_that_are_not_python_are_passed_over(package):
    rows = package(a="def Parameters(:\n", b=ATTACHED, c="# Args:\n\0")
    assert len(rows) == 1


def test_a_text_that_a_package_repeats_is_one_row(package):
    assert len(package(a=ATTACHED, b=ATTACHED)) == 1


def test_a_package_that_is_not_installed_has_no_rows():
    assert parameter_types._parse_package("no_such_package_anywhere") == []


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("int", "int"),
        ("non-negative integer", "int"),
        ("Optional[float]", "float"),
        ("Union[str, os.PathLike]", "str"),
        ("bool or None", "bool"),
        ("(N, M) array_like of ints", "array"),
        (":class:`~torch.FloatTensor` of shape `(batch, length)`", "array"),
        ("Callable[[int], str]", "callable"),
        ("tuple of (int, float)", "sequence"),
        ("dict[str, list[int]]", "mapping"),
        ('Literal["mean", "sum"]', "str"),
        ("{True, False}", None),
        ("float or callable", None),
        ("torch.nn.Module", None),
        ("", None),
    ],
)
def test_a_documented_type_has_one_label_or_none(kind, label):
    assert parameter_types.label_of(kind) == label


@pytest.mark.parametrize(
    "description",
    [
        "The rank of the update, defaults to 8",
        "The rank of the update (default: 8)",
        "The rank of the update. Default is 8.",
        "int. The rank of the update.",
        "The rank of the update, 8 by default.",
    ],
)
def test_the_text_does_not_spell_the_answer(description):
    text = parameter_types.clean("r", description)
    assert text is not None
    assert "8" not in text
    assert "efault" not in text


def test_no_description_of_a_test_row_is_trained_on():
    rows = [
        {"text": f"{name}: {about}", "label": "int", "client": "numpy", "file": file}
        for file in ("a.py", "b.py", "c.py", "d.py", "e.py", "f.py", "g.py", "h.py", "i.py")
        for name, about in (("x", "what all files say"), (file, f"what only {file} says"))
    ]
    split = parameter_types._split(rows)
    known = {row["text"].partition(": ")[2] for row in split["train"]}
    tested = [row["text"].partition(": ")[2] for row in split["test"]]
    assert tested
    assert known.isdisjoint(tested)
    assert not {row["file"] for row in split["train"]} & {row["file"] for row in split["test"]}


def test_rows_are_parsed_once_and_then_read_from_the_cache(cached):
    first = parameter_types.rows("train") + parameter_types.rows("test")
    parameter_types._load.cache_clear()
    again = parameter_types.rows("train") + parameter_types.rows("test")
    assert cached == list(parameter_types.CLIENTS)
    assert again == first


@pytest.mark.parametrize("damage", [b"", b"{}", b"0" * 64 + b"\n{}"])
def test_a_damaged_cache_is_built_again(cached, damage):
    first = parameter_types.rows("train")
    file = parameter_types._cache_file()
    file.write_bytes(damage)
    parameter_types._load.cache_clear()
    assert parameter_types.rows("train") == first
    assert len(cached) == 2 * len(parameter_types.CLIENTS)
    assert json.loads(file.read_bytes().partition(b"\n")[2])["train"] == first


def test_a_cache_that_cannot_be_written_is_gone_without(cached, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert parameter_types.rows("train")


def test_the_cache_leaves_no_partial_file(cached):
    parameter_types.rows("train")
    file = parameter_types._cache_file()
    assert os.listdir(file.parent) == [file.name]  # noqa: PTH208  (a plain list of names)


def test_another_version_of_a_package_has_its_own_cache(cached, monkeypatch):
    before = parameter_types._cache_file()
    monkeypatch.setattr(docstrings, "version", lambda name: "999")
    assert parameter_types._cache_file() != before


@pytest.mark.parametrize(("split", "client"), [("dev", None), ("train", "tensorflow")])
def test_an_unknown_split_or_client_is_refused(cached, split, client):
    with pytest.raises(ValueError, match="must be one of"):
        parameter_types.rows(split, client)


def test_two_processes_parse_the_same_rows():
    code = (
        "import hashlib, json; from clients.builtin.parameter_types import _parse_package\n"
        "rows = _parse_package('peft')\n"
        "print(len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest())\n"
        "import sys; assert 'peft' not in sys.modules and 'torch' not in sys.modules"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).resolve().parents[2],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert int(outputs.pop().split()[0]) > 300


def test_the_installed_packages_give_every_label_and_no_leak():
    rows = parameter_types._parse_package("networkx")
    counts = Counter(row["label"] for row in rows)
    assert len(rows) > 500
    assert min(counts[label] for label in set(parameter_types.LABELS) - {"array"}) >= 10
    spelled = [row for row in rows if "defaults to" in row["text"] or ": list of" in row["text"]]
    assert len(spelled) < 0.01 * len(rows)
