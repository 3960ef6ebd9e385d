"""What people type and hand over that weft cannot use: one sentence, nothing lost, fsck clean."""

import errno
import json
import os
import sqlite3

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import event
from sqlalchemy.engine import Engine

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HOSTILE = {  # more in tests/storage/test_bad_input.py, where a try costs less
    "climbs": "../../etc/passwd",
    "long": "x" * 10_240,
    "bytes": "bot\udcff",
    "bidi": "bot\u202e",
    "escape": "bot\x1b[2J",
    "markup": "[red]bot[/]",
}


@pytest.fixture
def adapter(tiny_decoder, tmp_path):
    """Return the folder of a small adapter, and a function that changes it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tiny_decoder),
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
    }
    (folder / CONFIG).write_text(json.dumps(config))
    sides = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    save_file({f"{LAYER}.{side}.weight": t for side, t in sides.items()}, folder / WEIGHTS)
    return folder


@pytest.fixture
def bot(ok, read, adapter):
    """Leave bot:v1, at bot@live, in the home; return what must still be true afterwards."""
    ok("import", adapter, "--name", "bot")
    ok("promote", "bot", "--to", "live")

    def unharmed():
        assert [row["name"] for row in read("names")] == ["bot"]
        assert len(read("versions")) == 1
        assert read("alias", "log", "bot@live")[0]["number"] == 1
        assert read("fsck")["problems"] == []

    return unharmed


def config(folder, **changes):
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**document, **changes}))


def weights(folder, side, change):
    tensors = load_file(folder / WEIGHTS)
    name = f"{LAYER}.{side}.weight"
    save_file({**tensors, name: change(tensors[name]).contiguous()}, folder / WEIGHTS)


def cut(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-9])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: weights(f, "lora_A", lambda t: t * torch.nan), "values that are not finite"),
        (lambda f: weights(f, "lora_A", lambda t: t.int()), "floating point, got torch.int32"),
        (lambda f: weights(f, "lora_A", lambda t: t[:, :9]), "fit the base model"),
        (lambda f: config(f, r=3), "the rank 3, and its tensors have 2"),
        (cut, "is truncated or altered"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "as a pickle"),
    ],
)
def test_an_adapter_that_is_damaged_is_refused(refused, ok, read, bot, adapter, change, said):
    change(adapter)
    assert said in refused("import", adapter, "--name", "other")
    bot()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_name_or_ref_is_refused_wherever_it_is_typed(refused, adapter, bot, text):
    for argv in (
        ("import", adapter, "--name", text),
        ("show", text),
        ("lineage", text),
        ("diff", "bot", text),
        ("export", text, "out"),
        ("promote", text, "--to", "live"),
        ("promote", "bot", "--to", text),
        ("promote", "bot", "--to", "live", "--name", text),
        ("rollback", f"bot@{text}"),
        ("rollback", "bot@live", "--to", text),
        ("yank", text, "--reason", "x"),
        ("alias", "log", f"{text}@live"),
        ("sign", text),
        ("keys", "new", text),
        ("merge", "bot", text, "--into", "both"),
    ):
        said = refused(*argv)
        assert len(said) < 2000
        assert "\x1b" not in said
    bot()


def test_a_blob_that_was_altered_or_cut_short_is_named(refused, weft, tmp_path, bot):
    [blob] = (path for path in (tmp_path / "home" / "blobs").rglob("*") if path.is_file())
    whole = blob.read_bytes()
    blob.chmod(0o600)
    for harmed in (whole[:-1], whole[:-1] + b"\xff", b""):
        blob.write_bytes(harmed)
        assert "corrupt" in refused("export", "bot", tmp_path / "out")
        code, said, _ = weft("fsck")
        assert (code, "corrupt" in said) == (1, True)
    assert not (tmp_path / "out").exists()
    blob.write_bytes(whole)
    bot()


def test_a_disk_that_is_full_in_the_middle_of_a_commit_loses_nothing(
    refused, bot, adapter, monkeypatch
):
    weights(adapter, "lora_A", lambda t: 2 * t)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left on device" in refused("import", adapter, "--name", "bot")
    bot()


def test_a_database_that_fails_in_the_middle_of_a_commit_loses_nothing(refused, read, bot, adapter):
    weights(adapter, "lora_A", lambda t: 2 * t)

    def fail(connection, cursor, statement, *rest):
        if statement.startswith("INSERT INTO versions"):
            raise sqlite3.OperationalError("disk I/O error")

    event.listen(Engine, "before_cursor_execute", fail)
    try:
        said = refused("import", adapter, "--name", "bot")
    finally:
        event.remove(Engine, "before_cursor_execute", fail)
    assert "disk I/O error" in said
    bot()
    assert len(read("fsck")["orphans"]) == 1  # the blob came first; gc is for it
