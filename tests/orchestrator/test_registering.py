"""Registering client nodes: one, and all that a file lists."""

import json

import pytest

from orchestrator import service
from orchestrator.config import BadConfig
from orchestrator.registering import BadClientFile
from storage.ledger import BadBudget, ClientExists, ClientRecord


@pytest.mark.parametrize(("count", "declared"), [(7, 7), (99, 99), (101, 100), (12345, 12000)])
def test_a_counted_size_is_declared_to_two_digits(workspace, tmp_path, count, declared):
    path = tmp_path / "many.jsonl"
    path.write_text('{"text": "x"}\n' * count)

    made = service.register_client(workspace, ClientRecord("a", f"jsonl:{path}", "a"))

    assert made.num_examples == declared


def test_a_client_without_a_readable_record_is_refused(workspace, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("{oh\n[]\n")

    with pytest.raises(BadConfig, match=r"holds no readable record \(.*bad\.jsonl, line 1"):
        service.register_client(workspace, ClientRecord("a", f"jsonl:{path}", "a"))
    assert workspace.ledger.clients() == []


def test_a_client_elsewhere_is_registered_without_a_look(workspace):
    record = ClientRecord("a", "jsonl:/not/here.jsonl", "a", num_examples=5)

    assert service.register_client(workspace, record, check=False) == record
    with pytest.raises(ClientExists):
        service.register_client(workspace, record, check=False)


@pytest.mark.parametrize("examples", [None, 500])
def test_what_a_node_offers_is_no_client_without_the_node(workspace, examples):
    record = ClientRecord("a", "site:notes", "a", num_examples=examples)

    with pytest.raises(BadConfig, match=r"site:notes is .* would answer for a: .* --join FILE"):
        service.register_client(workspace, record, check=False)
    assert workspace.ledger.clients() == []


def test_builtin_data_are_public_by_themselves(workspace):
    record = ClientRecord("a", "builtin:parameter-types", "a", num_examples=5)

    assert service.register_client(workspace, record, check=False).public


# ---- many


@pytest.fixture
def listed(tmp_path):
    """Write a file of clients and return its path."""

    def write(name: str, *lines: str | dict):
        path = tmp_path / name
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
        return path

    return write


def test_csv_and_json_lines_register_the_same_clients(workspace, listed):
    notes = listed("notes.jsonl", *('{"note": "x", "dx": "y"}' for _ in range(3)))
    as_csv = listed(
        "nodes.csv",
        "name,data,population,num_examples,epsilon,delta,public,labels.site,labels.gpu,fields.text",
        f"a,jsonl:{notes},patients,,8,1e-5,,north,a100,note",
        f'b,jsonl:{notes},,250,,,true,"south, by the sea",,note',
    )
    as_json = listed(
        "nodes.jsonl",
        {
            "name": "a",
            "data": f"jsonl:{notes}",
            "population": "patients",
            "epsilon": 8,
            "delta": 1e-5,
            "labels": {"site": "north", "gpu": "a100"},
            "fields": {"text": "note"},
        },
        "",
        {
            "name": "b",
            "data": f"jsonl:{notes}",
            "num_examples": 250,
            "public": True,
            "labels": {"site": "south, by the sea"},
            "fields": {"text": "note"},
        },
    )
    made = service.register_clients(workspace, as_csv)
    assert made == workspace.ledger.clients()
    first, second = made
    assert (first.population, first.num_examples, first.epsilon) == ("patients", 3, 8.0)
    assert (second.population, second.num_examples, second.public) == ("b", 250, True)

    for record in made:
        workspace.ledger.remove_client(record.name)
    assert service.register_clients(workspace, as_json) == made


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("c.jsonl", "{", r"c\.jsonl line 2: it is no JSON"),
        ("c.jsonl", "[]", r"c\.jsonl line 2: .*valid dictionary"),
        ("c.jsonl", {"name": "x"}, "line 2: data is required"),
        ("c.jsonl", {"name": "x", "data": "gone"}, "line 2: .*has no scheme"),
        ("c.jsonl", {"name": "x", "data": "jsonl:/gone.jsonl"}, "line 2: .*/gone.jsonl"),
        (
            "c.jsonl",
            {"name": "x", "data": "jsonl:/x", "colour": "red"},
            "line 2: 'colour' is nothing that a client has; it has name, data",
        ),
        (
            "c.jsonl",
            {"name": "x", "data": "jsonl:/x", "num_examples": 0},
            "line 2: num_examples: .*got 0",
        ),
        ("c.csv", "x", "line 2: it has more or fewer cells than the header"),
        ("c.csv", '"x', "after line 1: it is no CSV"),
        ("c.txt", "x", r"must be a \.csv or \.jsonl file, got '\.txt'"),
    ],
)
def test_a_line_that_is_no_client_is_named(workspace, listed, name, line, message):
    head = "name,data" if name == "c.csv" else {"name": "a", "data": "builtin:parameter-types"}
    with pytest.raises(BadClientFile, match=message):
        service.register_clients(workspace, listed(name, head, line))
    assert workspace.ledger.clients() == []


def test_a_line_that_the_ledger_refuses_is_named_and_none_is_registered(workspace, listed):
    one = {"name": "a", "data": "jsonl:/x", "num_examples": 5}
    again = listed("again.jsonl", one, one)
    with pytest.raises(ClientExists, match=r"again\.jsonl line 2: two clients are called 'a'"):
        service.register_clients(workspace, again, check=False)
    budgets = listed("budgets.jsonl", one, {**one, "name": "b", "population": "a", "epsilon": 8})
    with pytest.raises(BadBudget, match=r"budgets\.jsonl line 2: a budget is epsilon and delta"):
        service.register_clients(workspace, budgets, check=False)
    assert workspace.ledger.clients() == []


@pytest.mark.parametrize("content", [b"", b"name,data\n", b"\xff\xfe"])
def test_a_file_without_clients_is_refused(workspace, tmp_path, content):
    path = tmp_path / "nodes.csv"
    path.write_bytes(content)
    with pytest.raises(BadClientFile, match=r"nodes\.csv (lists no client|is not UTF-8)"):
        service.register_clients(workspace, path)


def test_a_holdout_is_registered_as_it_was_declared(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "held"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name, "who": "p"}))
    file = tmp_path / "nodes.csv"
    file.write_text(
        "name,data,holdout\na,jsonl:mine.jsonl,0.1:who\nb,jsonl:mine.jsonl,jsonl:held.jsonl\n"
    )

    service.register_clients(workspace, file)

    held = {one.name: one.holdout for one in workspace.ledger.clients()}
    assert held == {"a": "0.1:who", "b": f"jsonl:{tmp_path / 'held.jsonl'}"}


@pytest.mark.parametrize(
    ("holdout", "says"),
    [
        ("1.5", "a holdout's share must be above 0"),
        ("0.1:ward", "has no readable record .*no field 'ward' to hold out by"),
        ("jsonl:gone.jsonl", "gone.jsonl"),
    ],
)
def test_a_holdout_that_cannot_be_had_is_refused(workspace, tmp_path, monkeypatch, holdout, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"text": "x"}\n')

    with pytest.raises((ValueError, LookupError, OSError), match=says):
        service.register_client(
            workspace, ClientRecord("a", "jsonl:mine.jsonl", "a", holdout=holdout)
        )
    assert workspace.ledger.clients() == []


def test_records_that_are_held_out_elsewhere_are_known_as_the_populations(workspace, tmp_path):
    for name, text in (("a", "one"), ("held", "shared"), ("b", "shared")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    place = f"jsonl:{tmp_path}"

    service.register_client(
        workspace, ClientRecord("a", f"{place}/a.jsonl", "a", holdout=f"{place}/held.jsonl")
    )
    service.register_client(workspace, ClientRecord("b", f"{place}/b.jsonl", "b"))

    assert workspace.ledger.relations.of("a") == {"b"}
