"""node.yaml: what it takes, and how it refuses the rest."""

import os

import pytest
import yaml

from clients.node.settings import BadSettings, load_settings

HASH = "ab" * 32


def document(**changes):
    return {
        "name": "clinic-north",
        "superlink": "weft.example.org:443",
        "root_certificates": "ca.crt",
        "key": "node.key",
        "models": {HASH: "models/minilm"},
        "data": {"notes": {"uri": "jsonl:data/notes.jsonl", "epsilon": 8.0}},
    } | changes


@pytest.fixture
def load(tmp_path):
    """Return a function that writes a node.yaml and loads it from somewhere else."""

    def read(**changes):
        (tmp_path / "node.yaml").write_text(yaml.safe_dump(document(**changes)))
        return load_settings(tmp_path / "node.yaml")

    return read


@pytest.fixture
def refused(load):
    """Return a function that loads what must be refused, and returns the message."""

    def read(**changes):
        with pytest.raises(BadSettings) as caught:
            load(**changes)
        return str(caught.value)

    return read


def data(**changes):
    return {"notes": {"uri": "jsonl:data/notes.jsonl", "epsilon": 8.0} | changes}


def test_relative_paths_are_relative_to_the_file(load, tmp_path):
    found = load(data=data(uri="several:jsonl:a.jsonl;csv:/b.csv"))

    assert found.key == tmp_path / "node.key"
    assert found.root_certificates == tmp_path / "ca.crt"
    assert found.models == {HASH: tmp_path / "models" / "minilm"}
    assert found.state == tmp_path / "state"
    assert found.data["notes"].uri == f"several:jsonl:{tmp_path}/a.jsonl;csv:/b.csv"
    assert found.file == tmp_path / "node.yaml"


def test_a_node_with_one_data_set_is_one_client_of_its_own_name(load):
    one = load()
    two = load(data=data() | {"scans": {"uri": "csv:scans.csv", "epsilon": 1, "population": "p"}})

    assert (one.client("notes"), one.population("notes")) == ("clinic-north", "clinic-north")
    assert (two.client("notes"), two.population("notes")) == ("clinic-north.notes",) * 2
    assert (two.client("scans"), two.population("scans")) == ("clinic-north.scans", "p")


def test_nothing_is_allowed_that_is_not_written(load):
    found = load()

    assert not found.policy.without_privacy
    assert not found.policy.insecure_seed
    assert not found.policy.trust_coordinator_noise
    assert not found.data["notes"].public


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"superlnk": 1}, "superlnk: there is no such option; did you mean 'superlink'?"),
        ({"policy": {"insecure": True}}, "policy.insecure: there is no such option; did you mean"),
        ({"data": data(epsilom=8)}, "data.notes.epsilom: there is no such option; did you mean"),
        ({"data": data(epsilon=-1)}, "data.notes.epsilon: input should be greater than 0, got -1"),
        ({"data": data(epsilon=float("inf"))}, "data.notes.epsilon: "),
        ({"data": data(epsilon=None)}, "data.notes: epsilon is required"),
        ({"data": data(uri="notes.jsonl")}, "data.notes.uri: data URI 'notes.jsonl' has no scheme"),
        ({"data": data(unit="client")}, "data.notes: unit 'client' means something else"),
        ({"data": {"../x": {"uri": "csv:x"}}}, "data.../x: must be 1 to 63 lower-case letters"),
        ({"data": {}}, "data: "),
        ({"name": "Clinic North"}, "name: must be 1 to 63 lower-case letters"),
        ({"superlink": "https://weft"}, "superlink: must be HOST:PORT"),
        ({"models": {"minilm": "models"}}, "must be the 64 hex digits that weft node models"),
        ({"insecure": True, "root_certificates": None}, "insecure: weft.example.org:443 is"),
        ({"insecure": True, "superlink": "127.0.0.1:9092"}, "there are root_certificates"),
        ({"key": None}, "key: "),
    ],
)
def test_a_mistake_is_a_sentence_with_file_and_key(refused, tmp_path, change, said):
    message = refused(**change)

    assert message.startswith(f"{tmp_path}/node.yaml: ")
    assert said in message


def test_every_mistake_has_a_line(refused):
    assert len(refused(name="", superlink="", models={}).splitlines()) == 3


def test_data_sets_of_one_population_have_one_budget(refused):
    other = {"scans": {"uri": "csv:s.csv", "epsilon": 9.0, "population": "p"}}

    assert "data.scans: epsilon and delta must be those of data.notes" in refused(
        data=data(population="p") | other
    )


def test_without_tls_a_node_dials_this_machine_alone(load):
    found = load(insecure=True, root_certificates=None, superlink="127.0.0.1:9092")

    assert found.insecure


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_that_others_may_read_is_refused(refused, tmp_path, mode):
    (tmp_path / "node.key").write_text("secret")
    (tmp_path / "node.key").chmod(mode)

    message = refused()

    assert f"key: others may read {tmp_path}/node.key" in message
    assert f"chmod 600 {tmp_path}/node.key" in message


def test_a_key_of_ones_own_is_taken(load, tmp_path):
    (tmp_path / "node.key").touch(mode=0o600)

    assert load().key.is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "weft node init writes one"),
        ("- a", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / "node.yaml").write_text(text)
    with pytest.raises(BadSettings, match=said):
        load_settings(tmp_path / "node.yaml")
