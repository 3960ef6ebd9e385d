"""What a store is given, or does to it, that it cannot use: a named error, and nothing lost."""

import sqlite3
from collections.abc import Callable

import pytest
import torch
from sqlalchemy import event

from storage.blobs import BlobStore
from storage.canonical import NotJson
from storage.database import BadText, DatabaseUnavailable, connect, open_database
from storage.encoding import BadTensor
from storage.fsck import fsck
from storage.ledger import UnknownClient, UnknownRun
from storage.store import AdapterStore, BadMetric, BadName, UnknownVersion

HOSTILE = {
    "climbs": "../../etc/passwd",
    "long": "x" * 10_240,
    "nul": "a\0b",
    "surrogate": "a\ud800",
    "bidi": "bot\u202e",
    "wide": "\uff42\uff4f\uff54",
    "newline": "bot\n",
    "upper": "BOT",
    "empty": "",
    "percent": "%",
    "sql": "'; DROP TABLE versions; --",
    "huge number": "bot:v99999999999999999999",
    "two signs": "bot@production@production",
    "id": "0123456789abcdef",
}
NAMED = (BadName, BadText, BadTensor, BadMetric, NotJson, UnknownVersion, UnknownRun, UnknownClient)


def adapter(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"q.lora_A.weight": torch.full((2, 3), value)}


@pytest.fixture
def version(store) -> str:
    made = store.commit(adapter(), parents={}, recipe={"round": 0})
    store.name("bot", made)
    return made


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_name_is_refused_or_unknown_wherever_it_is_given(
    engine, blobs, store, ledger, version, text
):
    asks: list[Callable[[], object]] = [
        lambda: store.name(text, version),
        lambda: store.promote("bot", text, version, who="me", why=""),
        lambda: store.promote(text, "production", version, who="me", why=""),
        lambda: store.resolve(text),
        lambda: store.tensors(text),
        lambda: store.lineage(text),
        lambda: store.commit(adapter(), parents={text: "round"}, recipe={}),
        lambda: ledger.run(text),
        lambda: ledger.client(text),
    ]
    for ask in asks:
        with pytest.raises(NAMED):
            ask()
    assert [row.name for row in store.names()] == ["bot"]
    assert len(store.versions()) == 1
    assert fsck(engine, blobs).problems == ()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_free_text_is_kept_as_it_is_or_refused(engine, blobs, store, version, text):
    try:
        store.promote("bot", "production", version, who=text, why=text)
    except NAMED:
        assert store.promotions("bot", "production") == []
    else:
        [kept] = store.promotions("bot", "production")
        assert (kept.who, kept.why) == (text, text)
    try:
        made = store.commit({text: torch.ones(2)}, parents={}, recipe={text: text}, metrics={})
    except NAMED:
        assert len(store.versions()) == 1
    else:
        assert list(store.tensors(made)) == [text]
        assert store.version(made).recipe == {text: text}
    assert fsck(engine, blobs).problems == ()


@pytest.mark.parametrize(
    "tensors",
    [
        {"x": torch.tensor([1.0, float("nan")])},
        {"x": torch.tensor([float("-inf")])},
        {"x": torch.ones(2, dtype=torch.complex64)},
        {"x": torch.ones(2).to_sparse()},
        {"__metadata__": torch.ones(2)},
        {"x\ud800": torch.ones(2)},
    ],
)
def test_tensors_that_no_version_may_hold_leave_nothing(engine, blobs, store, version, tensors):
    with pytest.raises(BadTensor):
        store.commit(tensors, parents={version: "round"}, recipe={})
    with pytest.raises(BadTensor):
        store.commit(adapter(2), auxiliary=tensors, parents={version: "round"}, recipe={})
    assert len(store.versions()) == 1
    assert fsck(engine, blobs).problems == ()


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_database_without_room_undoes_the_commit_and_says_so(url, blobs):
    """SQLite's own answer to a full disk, from a limit on the file's pages."""
    roomy = open_database(url)
    kept = AdapterStore(roomy, blobs).commit(adapter(), parents={}, recipe={})
    roomy.dispose()
    tight = connect(url)

    def limit(connection: sqlite3.Connection, record: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")

    event.listen(tight, "connect", limit)
    store = AdapterStore(tight, blobs)
    with pytest.raises(DatabaseUnavailable, match="full"):
        store.commit(adapter(2), parents={kept: "round"}, recipe={"text": "x" * 100_000})
    assert [found.id for found in store.versions()] == [kept]
    tight.dispose()
    again = open_database(url)
    found = fsck(again, blobs)
    assert found.problems == ()
    assert len(found.orphans) == 1  # the blob came first; `gc` is for it
    again.dispose()


@pytest.mark.parametrize("statement", ["INSERT INTO versions", "INSERT INTO version_parents"])
@pytest.mark.parametrize(
    "url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
def test_a_server_that_hangs_up_in_the_middle_of_a_commit_undoes_it(
    engine, blobs, store, version, statement
):
    other = connect(engine.url.render_as_string(hide_password=False))

    def hang_up(connection, cursor, text, *rest):
        if text.startswith(statement):
            pid = connection.connection.dbapi_connection.info.backend_pid
            with other.connect() as admin:
                admin.exec_driver_sql(f"SELECT pg_terminate_backend({pid})")

    event.listen(engine, "before_cursor_execute", hang_up)
    with pytest.raises(DatabaseUnavailable, match=r"failed: .*; see to its disk or its server"):
        store.commit(adapter(2), parents={version: "round"}, recipe={})
    event.remove(engine, "before_cursor_execute", hang_up)
    other.dispose()
    assert [found.id for found in store.versions()] == [version]
    assert fsck(engine, blobs).problems == ()
    again = store.commit(adapter(2), parents={version: "round"}, recipe={})
    assert BlobStore(blobs.place).get(store.version(again).tensors)
