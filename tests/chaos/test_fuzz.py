"""Hostile bytes: updates, configs and store files that were changed are refused with a sentence.

``WEFT_FUZZ_EXAMPLES`` says how many of each; ``make chaos`` tries 10,000, the others 100 by rote.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.assignment import Assignment, DataSpec, ModelSpec, PluginChoice, Privacy
from clients.charges import spend_of
from clients.wire import BadUpdate, pack, unpack
from orchestrator import cli
from orchestrator.acceptance import refusal
from orchestrator.config import BadConfig, RunConfig, load_config, parse_config
from orchestrator.service import open_workspace
from orchestrator.workspace import Workspace
from storage.blobs import BlobCorrupt, BlobMissing, BlobStore
from strategies.base import Broadcast, Update

EXAMPLES = int(os.environ.get("WEFT_FUZZ_EXAMPLES", "100"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.timeout(3600)

SENT = {
    "q.lora_A.weight": torch.ones(2, 3),
    "q.lora_B.weight": torch.zeros(4, 2),
    "q.scaling": torch.tensor(2.0),
    "head.bias": torch.zeros(3, dtype=torch.bfloat16),
}
PLAIN = Assignment(
    action="train",
    run="run",
    client="c-1",
    round=3,
    base="f" * 64,
    model=ModelSpec("tiny", "classification", labels=("a", "b", "c")),
    adapter=PluginChoice("lora"),
    broadcast=Broadcast(SENT, trainable=r".*lora_B.*|head\..*"),
    data=DataSpec("jsonl:/a.jsonl"),
    optimizer=PluginChoice("adamw"),
    site="/site",
    num_examples=20,
    steps=2,
)
PRIVATE = Assignment(
    **{f: getattr(PLAIN, f) for f in PLAIN.__slots__ if f != "privacy"},
    privacy=Privacy(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5),
)


def answer(assignment: Assignment) -> Update:
    private = assignment.privacy is not None
    return Update(
        client=assignment.client,
        round=assignment.round,
        base=assignment.base,
        tensors={n: SENT[n] + 1 for n in ("q.lora_B.weight", "head.bias")},
        num_examples=20,
        metrics={} if private else {"loss": 0.5},
        spends=(spend_of(assignment),) if private else (),
        fingerprint="ab",
    )


# --- what is done to bytes and documents -------------------------------------------------------

extremes = st.sampled_from(
    [
        0,
        -1,
        -0.0,
        1e308,
        math.inf,
        -math.inf,
        math.nan,
        2**63,
        10**30,
        10**400,
        True,
        None,
        "",
        "nan",
        "c-1",
        "../../etc/passwd",
        "\x00",
        "lora",
        "ray",
        "0" * 64,
        [],
        {},
        [[]],
    ]
)
"""Where programs stumble; half of what is put in."""
words = st.text(max_size=12)
values = st.one_of(
    extremes,
    st.recursive(
        st.one_of(st.integers(), st.floats(), words),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Return ``data`` with some bytes flipped, cut out, doubled or put in."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(made) - 1)))
        end = min(len(made), start + draw(st.integers(1, 40)))
        how = draw(st.sampled_from(["flip", "cut", "double", "insert", "truncate"]))
        if how == "flip" and made:
            made[start] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del made[start:end]
        elif how == "double":
            made[end:end] = made[start:end]
        elif how == "insert":
            made[start:start] = draw(st.binary(min_size=1, max_size=16))
        else:
            del made[start:]
    return bytes(made)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of everything in a document."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(document, dict):
        inner = list(document.items())
    elif isinstance(document, list):
        inner = list(enumerate(document))
    return [p for key, value in inner for p in [(*path, key), *places(value, (*path, key))]]


@st.composite
def changed_document(draw: st.DrawFn, document: dict[str, Any]) -> dict[str, Any]:
    """Return ``document`` with values replaced, removed or added, at any depth."""
    made = deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        found = places(made)
        if not found:
            return made
        path = draw(st.sampled_from(found))
        owner: Any = made
        for key in path[:-1]:
            owner = owner[key]
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "remove":
            del owner[path[-1]]
        elif how == "add" and isinstance(owner, dict):
            owner[draw(words)] = deepcopy(draw(values))
        else:
            owner[path[-1]] = deepcopy(draw(values))  # what is drawn is changed later
    return made


# --- updates -----------------------------------------------------------------------------------


def check_contract(update: Update, assignment: Assignment) -> None:
    """What an accepted update is, said independently of the code that accepts it."""
    assert (update.round, update.base) == (3, "f" * 64)
    assert set(update.tensors) == {"q.lora_B.weight", "head.bias"}
    for name, tensor in update.tensors.items():
        assert (tensor.shape, tensor.dtype) == (SENT[name].shape, SENT[name].dtype)
        assert torch.isfinite(tensor).all()
    assert 1 <= update.num_examples <= 2**53
    assert all(math.isfinite(value) for value in update.metrics.values())
    if assignment.privacy is not None:
        assert update.spends == (spend_of(assignment),)
        assert (update.metrics, update.num_examples) == ({}, 20)
    else:
        assert update.spends == ()
    assert unpack(pack(update)).tensors.keys() == update.tensors.keys()  # it can be spilled


def refused_or_right(data: bytes, assignment: Assignment) -> None:
    try:
        update = unpack(data)
    except BadUpdate:
        return
    reason = refusal(update, assignment)
    if reason is None:
        check_contract(update, assignment)
    else:
        assert reason


@fuzz
@given(data=st.data(), assignment=st.sampled_from([PLAIN, PRIVATE]))
def test_no_changed_update_is_accepted_that_breaks_the_contract(data, assignment) -> None:
    refused_or_right(data.draw(changed_bytes(pack(answer(assignment)))), assignment)


@fuzz
@given(data=st.data(), assignment=st.sampled_from([PLAIN, PRIVATE]))
def test_no_update_with_a_changed_header_is_accepted_that_breaks_the_contract(
    data, assignment
) -> None:
    packed = pack(answer(assignment))
    length = int.from_bytes(packed[:8], "little")
    head = json.loads(packed[8 : 8 + length])
    inner = json.loads(head["__metadata__"]["update"])
    if data.draw(st.booleans()):
        inner = data.draw(changed_document(inner))
    else:
        tensors = {k: v for k, v in head.items() if k != "__metadata__"}
        head = {"__metadata__": head["__metadata__"], **data.draw(changed_document(tensors))}
    # 1e999 is JSON, and infinite to who reads it
    text = json.dumps(inner).replace("Infinity", "1e999")
    head["__metadata__"]["update"] = text
    new = json.dumps(head).encode()
    refused_or_right(len(new).to_bytes(8, "little") + new + packed[8 + length :], assignment)


# --- configs -----------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "name": "task-1",
    "model": {"id": "some-model", "max_length": 16},
    "labels": ["cat", "dog"],
    "task_labels": ["cat"],
    "adapter": {"name": "lora", "r": 2, "target_modules": ["query"]},
    "strategy": {"name": "fedsvd"},
    "regularizers": [{"name": "proximal", "mu": 0.1}],
    "optimizer": {"name": "adamw", "lr": 0.01},
    "privacy": {"epsilon": 8, "delta": 1e-5, "max_grad_norm": 1.0},
    "clients": {"simulate": {"data": "jsonl:/a.jsonl", "by": "iid", "parts": 3}},
    "rounds": 3,
    "cohort": 2,
    "steps": 2,
    "evaluate": {"data": "jsonl:/b.jsonl", "every": 2},
    "backend": {"name": "ray", "workers": 2},
    "deadline_s": 60,
    "faults": {"clients": 0.1, "kinds": ["nan"], "at": [{"kind": "full-disk", "round": 1}]},
}


def parsed_or_explained(read: Any) -> None:
    try:
        config = read()
    except BadConfig:
        return
    assert isinstance(config, RunConfig)
    # what goes on the record is JSON, and is the same config when it is read back
    record = json.loads(json.dumps(config.model_dump(mode="json"), allow_nan=False))
    assert RunConfig.model_validate(record) == config


@fuzz
@given(document=changed_document(CONFIG))
def test_a_changed_config_is_whole_or_refused_with_a_sentence(document) -> None:
    parsed_or_explained(lambda: parse_config(document))


@fuzz
@given(data=st.data())
def test_a_changed_config_file_is_whole_or_refused_with_a_sentence(
    data, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(data.draw(changed_bytes(yaml.safe_dump(CONFIG).encode())))
    parsed_or_explained(lambda: load_config(file))


@fuzz
@given(
    path=st.one_of(
        st.text(max_size=20), st.sampled_from([".".join(map(str, p)) for p in places(CONFIG)])
    ),
    value=st.one_of(st.text(max_size=20), values.map(lambda v: json.dumps(v))),
)
def test_an_override_is_applied_or_refused_with_a_sentence(path, value) -> None:
    parsed_or_explained(lambda: parse_config(CONFIG, [f"{path}={value}"]))


# --- store files -------------------------------------------------------------------------------


@fuzz
@given(data=st.data())
def test_a_changed_blob_is_never_read_as_tensors(data, tmp_path_factory) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-blobs"
    shutil.rmtree(folder, ignore_errors=True)
    blobs = BlobStore(folder)
    digest = blobs.put(SENT)
    [file] = (p for p in folder.rglob("*") if p.is_file())
    whole = file.read_bytes()
    file.write_bytes(data.draw(changed_bytes(whole)))
    if file.read_bytes() == whole:
        return
    with pytest.raises((BlobCorrupt, BlobMissing)):
        blobs.get(digest)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with three versions, a run and its events, without a write-ahead log beside it."""
    folder = tmp_path_factory.mktemp("store") / "home"
    workspace = open_workspace(folder)
    parents: dict[str, str] = {}
    for round_ in range(3):
        tensors = {n: t + round_ for n, t in SENT.items()}
        recipe = {"kind": "round", "round": round_, "updates": [], "text": "x" * 300}
        version = workspace.store.commit(tensors, parents=parents, recipe=recipe, metrics={"a": 1})
        parents = {version: "round"}
        workspace.store.name("task-1", version)
    workspace.ledger.create_run("run-1", "task-1", config=CONFIG, plan={"a": [1, 2]}, rounds=3)
    for seq in range(20):
        workspace.ledger.record("run-1", "accepted", {"client": f"c-{seq}", "loss": 0.5})
    workspace.close()
    assert not (folder / "weft.db-wal").exists()
    return folder


def reads(workspace: Workspace) -> None:
    """Read all that people read; a version that is returned was checked against its id."""
    for version in workspace.store.versions():
        workspace.store.lineage(version.id)
        workspace.store.tensors(version.id)
    workspace.store.names()
    for record in workspace.ledger.runs():
        workspace.ledger.events(record.id)
        workspace.ledger.spends_of_run(record.id)
    workspace.ledger.clients({})


@fuzz
@given(data=st.data())
def test_a_changed_database_is_read_right_or_refused_with_a_sentence(data, home: Path) -> None:
    whole = (home / "weft.db").read_bytes()
    copy = home.parent / "fuzzed"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    (copy / "blobs").symlink_to(home / "blobs")
    (copy / "weft.db").write_bytes(data.draw(changed_bytes(whole)))
    with sentences(), closing(open_workspace(copy)) as workspace:
        reads(workspace)


@contextmanager
def sentences() -> Iterator[None]:
    """Fail at an error that the command line would show as a traceback."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, cli._EXPECTED) and cli._is_expected(error)):
            raise
