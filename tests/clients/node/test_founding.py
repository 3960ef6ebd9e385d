"""Making a node: nothing is written over, nothing told that should stay, nothing fetched."""

import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from datetime import UTC, datetime, timedelta

import pytest
import yaml

from clients.node import founding
from clients.node.founding import BadWheelhouse, NodeExists, NoNextKey
from clients.node.identity import NodeKeyExists, read_key
from clients.node.joining import BadJoin, read_join, write_join
from clients.node.settings import BadSettings, DataSet, Policy, Settings, load_settings
from clients.node.template import Plans, written

HASH = "ab" * 32


@pytest.fixture
def records(tmp_path):
    """Return a function that writes records and returns their URI."""

    def write(count=123, name="notes"):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"note": f"n{i}", "dx": "x", "patient": i} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"jsonl:{path}"

    return write


@pytest.fixture
def plans(records, tmp_path):
    """Return a function that makes whole plans of a node."""

    def make(**changes):
        whole = {
            "name": "clinic-north",
            "superlink": "weft.example.org:443",
            "data": {"notes": records()},
            "fields": {"text": "note", "label": "dx"},
            "models": {HASH: tmp_path / "model"},
            "labels": {"region": "north: 'a' \"b\""},
            "epsilon": 8.0,
        }
        return Plans(**(whole | changes))

    return make


def test_a_new_node_has_settings_that_can_be_read_and_a_key(plans, tmp_path):
    folder = tmp_path / "node"
    foreseen = founding.planned(folder, plans())

    made = founding.found(folder, plans())

    settings = load_settings(folder / "node.yaml")
    assert settings == foreseen
    assert read_key(settings.key).public == made.public
    assert settings.labels == plans().labels
    assert settings.data["notes"].population == "clinic-north"
    assert settings.policy == Policy()


def test_its_file_says_a_word_on_every_setting(plans):
    for text in (written(plans()), written(Plans("north", "weft:443"))):
        for part in (Settings, DataSet, Policy):
            missing = [name for name in part.model_fields if f"{name}:" not in text]
            assert [n for n in missing if n not in ("unit", "holdout") or "data: {}" in text] == []


def test_what_is_commented_out_is_how_it_stands(plans):
    lines = written(plans()).split("policy:\n")[1].splitlines()
    told = yaml.safe_load("\n".join(line.removeprefix("#").strip() for line in lines))
    assert Policy.model_validate(told) == Policy()


def test_nothing_is_written_over(plans, tmp_path):
    folder = tmp_path / "node"
    made = founding.found(folder, plans())
    with pytest.raises(NodeExists, match=r"node\.yaml is there already"):
        founding.planned(folder, plans())
    with pytest.raises(NodeKeyExists):
        founding.found(folder, plans(name="another"))
    assert load_settings(folder / "node.yaml").name == "clinic-north"
    assert read_key(folder / "node.key").public == made.public


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"name": "Clinic North"}, "lower-case letters"),
        ({"superlink": "https://weft"}, "HOST:PORT"),
        ({"data": {"notes": "notes.txt"}}, "has no scheme"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"insecure": True}, "insecure: weft.example.org:443 is another machine"),
    ],
)
def test_what_makes_no_node_is_refused_before_anything_is_written(plans, tmp_path, changes, why):
    with pytest.raises(BadSettings, match=why):
        founding.planned(tmp_path / "node", plans(**changes))
    assert not (tmp_path / "node").exists()


def test_data_and_models_may_come_later(tmp_path):
    plans = Plans("north", "weft.example.org:443")
    founding.planned(tmp_path / "node", plans)
    founding.found(tmp_path / "node", plans)
    assert not plans.are_whole
    with pytest.raises(BadSettings, match="data"):
        load_settings(tmp_path / "node" / "node.yaml")


def joined(settings, **changes):
    key = read_key(settings.key)
    said = founding.statement(
        settings, founding.offers(settings), [key.public], timedelta(days=365)
    )
    return write_join(said, key)


def test_a_join_file_tells_neither_a_place_nor_a_column_nor_an_exact_count(plans, tmp_path):
    founding.found(tmp_path / "node", plans())
    settings = load_settings(tmp_path / "node" / "node.yaml")

    text = joined(settings)

    found = read_join(text.encode(), datetime.now(UTC)).statement
    offer = found.data["notes"]
    assert (offer.examples, offer.fields) == (120, ("text", "label"))
    assert (offer.population, offer.epsilon, offer.delta) == ("clinic-north", 8.0, 1e-5)
    assert found.models == (HASH,)
    assert found.labels == settings.labels
    for secret in ("note.", "dx", "patient", "jsonl", str(tmp_path), "123", "weft.example.org"):
        assert secret not in text


def test_what_is_held_out_is_not_offered(plans, tmp_path):
    settings = founding.planned(tmp_path, plans())
    data = settings.data["notes"].model_copy(update={"holdout": 0.5})
    [offer] = founding.offers(settings.model_copy(update={"data": {"notes": data}})).values()
    assert (offer.examples, offer.holdout) == (62, 0.5)


def test_people_are_counted_where_a_column_names_them(plans, tmp_path):
    rows = [{"note": f"n{i}", "dx": "x", "patient": f"p{i % 31}"} for i in range(123)]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = founding.planned(tmp_path, plans(data={"notes": f"jsonl:{tmp_path}/people.jsonl"}))
    data = settings.data["notes"].model_copy(update={"unit": "patient", "holdout": 0.5})
    [offer] = founding.offers(settings.model_copy(update={"data": {"notes": data}})).values()
    assert (offer.unit, offer.units, offer.examples) == ("patient", 16, 62)


def test_data_without_a_readable_record_are_not_offered(plans, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{oh\n")
    settings = founding.planned(tmp_path, plans(data={"notes": f"jsonl:{tmp_path}/bad.jsonl"}))
    with pytest.raises(BadJoin, match=r"data\.notes: .* holds no readable record \(.*line 1"):
        founding.offers(settings)


@pytest.mark.parametrize("days", [0, -1, 3661])
def test_a_key_is_good_for_some_days(plans, tmp_path, days):
    settings = founding.planned(tmp_path / "node", plans())
    key = founding.found(tmp_path / "node", plans()).public
    with pytest.raises(BadJoin, match="a key is good for 1 to 3660 days"):
        founding.statement(settings, {}, [key], timedelta(days=days))


def test_a_new_key_waits_until_it_is_taken_and_the_old_one_is_kept(plans, tmp_path):
    first = founding.found(tmp_path / "node", plans())
    settings = load_settings(tmp_path / "node" / "node.yaml")
    with pytest.raises(NoNextKey, match="weft node rotate"):
        founding.take_next(settings)

    current, coming = founding.next_key(settings)
    again = founding.next_key(settings)

    assert (current.public, coming.public) == (first.public, again[1].public)
    assert current.public != coming.public
    assert read_key(settings.key).public == first.public  # until the coordinator knows the new one
    public, kept = founding.take_next(settings)
    assert public == coming.public == read_key(settings.key).public
    assert read_key(kept).public == first.public


# ---- wheelhouses


def wheel(folder, name, entry="", needs=""):
    """Write a wheel of a package of one module."""
    module = f"def main():\n    print('{name} speaks')\n"
    info = f"{name}-9.9.dist-info"
    needed = f"Requires-Dist: {needs}\n" if needs else ""
    files = {
        f"{name}.py": module,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n{needed}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    if entry:
        files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{entry} = {name}:main\n"
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        lines.append(f"{path},sha256={digest.rstrip('=')},{len(text)}")
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""])
    with zipfile.ZipFile(folder / f"{name}-9.9-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def wheelhouse(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    return folder


def test_no_network_is_asked_for_what_the_wheelhouse_has(tmp_path):
    command = founding.install_command(tmp_path / "node", tmp_path / "wheels")
    assert command == [
        str(tmp_path / "node" / "venv" / "bin" / "python"),
        *["-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--no-index"],
        "--find-links",
        str(tmp_path / "wheels"),
        "weft",
    ]


def test_a_wheelhouse_without_weft_is_refused(wheelhouse, tmp_path):
    wheel(wheelhouse, "other")
    with pytest.raises(BadWheelhouse, match="has no wheel of weft; where there is a network"):
        founding.install(tmp_path, wheelhouse)
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
def test_weft_is_installed_from_a_wheelhouse_alone(wheelhouse, tmp_path):
    wheel(wheelhouse, "weft", entry="weft", needs="other")
    with pytest.raises(BadWheelhouse, match=r"cannot install weft with .*other"):
        founding.install(tmp_path, wheelhouse)

    wheel(wheelhouse, "other")
    command = founding.install(tmp_path, wheelhouse)

    done = subprocess.run([command], capture_output=True, text=True, check=True)
    assert done.stdout == "weft speaks\n"
    assert command != sys.executable
