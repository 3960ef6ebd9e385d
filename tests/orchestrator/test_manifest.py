"""A manifest finds every change of a folder, and is signed."""

import json

import pytest

from orchestrator.manifest import (
    MANIFEST,
    SIGNATURES,
    BadManifest,
    NoManifest,
    check_manifest,
    write_manifest,
    write_signature,
)
from storage.keys import KeyRing

FACTS = {
    "version": "73" * 32,
    "base": {"id": "m", "revision": None, "hash": "ab", "quantization": "none"},
    "tokenizer": "cd",
}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "out"
    (made / "deep").mkdir(parents=True)
    (made / "a.json").write_text("{}")
    (made / "deep" / "b.txt").write_text("b")
    return made


def test_a_folder_as_it_was_written_has_no_problems(folder):
    write_manifest(folder, FACTS)
    checked = check_manifest(folder)

    assert (checked.version, checked.problems, checked.signer) == (FACTS["version"], (), None)
    assert sorted(checked.facts["files"]) == ["a.json", "deep/b.txt"]
    assert checked.facts["base"] == {"id": "m", "revision": None, "hash": "ab"}
    assert checked.facts["tokenizer"] == "cd"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: (f / "a.json").write_text("{ }"), "a.json was altered: it has sha256 "),
        (lambda f: (f / "deep" / "b.txt").unlink(), "deep/b.txt is missing"),
        (lambda f: (f / "adapter_model.bin").write_text("x"), "adapter_model.bin is not in the"),
        (lambda f: (f / "link").symlink_to("a.json"), "link is not in the manifest"),
    ],
)
def test_every_change_is_found(folder, change, problem):
    write_manifest(folder, FACTS)
    change(folder)
    [found] = check_manifest(folder).problems
    assert found.startswith(problem)


def test_hidden_files_are_no_part_of_it(folder):
    write_manifest(folder, FACTS)
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    (folder / ".gitattributes").write_text("x")
    assert check_manifest(folder).problems == ()


def test_a_signature_covers_the_whole_manifest(folder, tmp_path):
    ring = KeyRing(tmp_path / "keys")
    alice = ring.new("alice")
    write_signature(folder, ring.sign("manifest", write_manifest(folder, FACTS)))
    assert check_manifest(folder, ring.keys()).signer == alice
    assert check_manifest(folder, []).signer is None
    assert check_manifest(folder, []).signatures == 1

    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "version": "00" * 32}))
    assert check_manifest(folder, ring.keys()).signer is None


def test_several_keys_sign_and_each_counts_once(folder, tmp_path):
    ring = KeyRing(tmp_path / "keys")
    ring.new("alice"), ring.new("bob")
    digest = write_manifest(folder, FACTS)
    for name in ("bob", "alice", "bob"):
        write_signature(folder, ring.sign("manifest", digest, name))
    assert check_manifest(folder, [ring.key("bob")]).signer == ring.key("bob")
    assert check_manifest(folder, ring.keys()).signatures == 2


def test_a_folder_without_manifest_is_refused(folder):
    with pytest.raises(NoManifest, match="weft export writes one"):
        check_manifest(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format": "other"}',
        '{"format": "weft-manifest-1"}',
        '{"format": "weft-manifest-1", "version": "x", "files": {"a": 1}}',
    ],
)
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BadManifest, match="is not a manifest"):
        check_manifest(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"signatures": [1]}', '{"signatures": 1}'])
def test_signatures_that_are_none_are_refused(folder, text):
    write_manifest(folder, FACTS)
    (folder / SIGNATURES).write_text(text)
    with pytest.raises(BadManifest, match="holds no signatures"):
        check_manifest(folder)
