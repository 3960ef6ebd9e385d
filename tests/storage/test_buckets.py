"""Blobs elsewhere: in memory, over fsspec's own files, and on a real server that speaks S3."""

import hashlib
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest
import torch

from storage.blobs import BlobCorrupt, BlobMissing, BlobStore, name_of
from storage.buckets import Bucket, open_place
from storage.fsck import fsck
from storage.garbage import collect
from storage.places import BadBlobsUrl, BlobsUnavailable, Folder
from storage.store import AdapterStore


def adapter(value: float = 1.0, size: int = 6) -> dict[str, torch.Tensor]:
    return {"q.lora_A.weight": torch.full((size,), value)}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """Port of a server that speaks S3, with the bucket ``weft``."""
    pytest.importorskip("s3fs", reason="no s3fs to speak S3 with")
    pytest.importorskip("moto", reason="no moto to speak S3 to")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", "0"], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr
    try:
        found = None
        while found is None:
            line = server.stderr.readline()
            assert line, "moto's server ended"
            found = re.search(r"Running on http://127\.0\.0\.1:(\d+)", line)
        reader = threading.Thread(target=server.stderr.read)
        reader.start()
        yield int(found[1])
    finally:
        server.terminate()
        server.wait(30)
        reader.join(30)
        server.stderr.close()


@dataclass
class Line:
    """A line to the server, which breaks when it is told to.

    Attributes:
        port: of this end.
        server: port of the other.
        sends: bytes that a connection carries to the server before it breaks; None for all.
        answers: whether an answer comes back.
        breaks: how many connections break still.
        used: how many connections there were.
    """

    server: int
    sends: int | None = None
    answers: bool = True
    breaks: int = 0
    used: int = 0
    _socket: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._socket.accept()
                self.used += 1
                is_broken, self.breaks = self.breaks > 0, max(0, self.breaks - 1)
                far = socket.create_connection(("127.0.0.1", self.server))
                threading.Thread(target=self._carry, args=(near, far, is_broken, True)).start()
                threading.Thread(target=self._carry, args=(far, near, is_broken, False)).start()

    def _carry(self, here: socket.socket, there: socket.socket, broken: bool, up: bool) -> None:
        carried = 0
        with suppress(OSError):
            while data := here.recv(65536):
                if broken and not up and not self.answers:
                    break
                carried += len(data)
                if broken and up and self.sends is not None and carried > self.sends:
                    there.sendall(data[: max(0, self.sends - carried)])
                    break
                there.sendall(data)
        for end in (here, there):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def line(s3_server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The line by which this test reaches the bucket ``weft``, emptied."""
    import s3fs

    made = Line(s3_server)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{made.port}",
        "AWS_ACCESS_KEY_ID": "weft",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "5",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(use_listings_cache=False)
    if files.exists("weft"):
        files.rm("weft", recursive=True)
    files.mkdir("weft")
    made.used = 0
    yield made
    s3fs.S3FileSystem.clear_instance_cache()
    made.close()


@pytest.fixture
def bucket(line: Line) -> Bucket:
    return Bucket("s3://weft/team/blobs")


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bucket]:
    if request.param == "s3":
        yield request.getfixturevalue("bucket")
    elif request.param == "file":  # of fsspec: for what is no object store, such as sftp
        yield Bucket(f"file://{tmp_path}/elsewhere")
    else:
        yield Bucket("memory://blobs")
        fsspec.filesystem("memory").store.clear()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_what_is_put_comes_back_from_anywhere(place):
    blobs = BlobStore(place)
    digest = blobs.put(adapter())
    assert blobs.put(adapter()) == digest
    assert same(blobs.get(digest), adapter())
    assert blobs.has(digest)
    [entry] = place.entries()
    assert (entry.name, entry.size_bytes) == (name_of(digest), len(blobs.fetch(digest)))
    assert entry.modified_at > 1.7e9


def test_what_is_not_there_is_missing_and_no_error_to_remove(place):
    blobs = BlobStore(place)
    blobs.put(adapter(2))
    digest = blobs.digest(adapter())
    assert not blobs.has(digest)
    blobs.remove(digest)
    with pytest.raises(BlobMissing, match=f"no blob {digest[:12]} in {place.where()}"):
        blobs.get(digest)


def test_an_empty_place_has_no_entries(place):
    assert list(place.entries()) == []


def test_reading_verifies_the_digest(place):
    blobs = BlobStore(place)
    digest = blobs.put(adapter())
    place.write(name_of(digest), blobs.fetch(digest)[:-1] + b"\7")
    with pytest.raises(BlobCorrupt, match=f"blob {digest[:12]} is corrupt"):
        blobs.get(digest)


def test_storing_again_heals_what_was_cut_short(place):
    blobs = BlobStore(place)
    digest = blobs.put(adapter())
    place.write(name_of(digest), blobs.fetch(digest)[:-1])
    with pytest.raises(BlobCorrupt):
        blobs.get(digest)
    blobs.put(adapter())
    assert same(blobs.get(digest), adapter())


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_store_over_a_bucket_is_checked_and_cleaned_like_one_over_a_folder(
    place, engine, tmp_path
):
    blobs = BlobStore(place, Folder(tmp_path / "cache"))
    store = AdapterStore(engine, blobs)
    version = store.commit(adapter(), parents={}, recipe={})
    orphan = blobs.put(adapter(2))
    assert fsck(engine, blobs).orphans == (orphan,)
    for _ in range(2):
        collect(engine, blobs, delete_them=True, grace_s=0)
    assert [entry.name for entry in place.entries()] == [name_of(store.version(version).tensors)]
    assert blobs.cache is not None
    assert blobs.cache.size(name_of(orphan)) is None
    place.remove(name_of(store.version(version).tensors))
    assert fsck(engine, blobs, repair=True).is_sound
    assert same(store.tensors(version), adapter())


@pytest.mark.s3
def test_what_was_read_once_is_read_from_the_cache_unless_that_was_altered(bucket, tmp_path):
    digest = BlobStore(bucket).put(adapter())
    blobs = BlobStore(bucket, Folder(tmp_path))
    assert same(blobs.get(digest), adapter())
    bucket.remove(name_of(digest))
    assert same(blobs.get(digest), adapter())
    (tmp_path / name_of(digest)).write_bytes(b"altered")
    with pytest.raises(BlobMissing):
        blobs.get(digest)


@pytest.mark.s3
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_an_upload_that_is_cut_short_stores_nothing_and_can_be_done_again(
    line, engine, monkeypatch
):
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the line stays broken however often it is tried
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = Bucket("s3://weft/team/blobs")
    blobs = BlobStore(bucket)
    store = AdapterStore(engine, blobs)
    store.commit(adapter(0), parents={}, recipe={})
    line.sends, line.breaks = 100_000, 1000
    with pytest.raises(BlobsUnavailable, match=r"cannot (look for|write) s3://weft/team/blobs/"):
        store.commit(adapter(size=250_000), parents={}, recipe={})
    line.breaks = 0
    assert len(list(bucket.entries())) == 1
    assert len(store.versions()) == 1
    assert fsck(engine, blobs).is_sound
    version = store.commit(adapter(size=250_000), parents={}, recipe={})
    assert same(store.tensors(version), adapter(size=250_000))


DIES_BETWEEN_PARTS = """
import os, signal, sys
import s3fs
from storage.buckets import Bucket

send, upload = s3fs.S3FileSystem._call_s3, s3fs.S3FileSystem._pipe_file
upload.__defaults__ = (5 * 2**20, *upload.__defaults__[1:])  # bytes of a part, not 50 MiB

async def then_die(self, method, *args, **kwargs):
    answer = await send(self, method, *args, **kwargs)
    if method == "upload_part":
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

s3fs.S3FileSystem._call_s3 = then_die
Bucket("s3://weft/team/blobs").write(sys.argv[1], bytes(int(sys.argv[2])))
"""


@pytest.mark.s3
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_process_killed_between_the_parts_of_an_upload_leaves_nothing_to_see(bucket, engine):
    data = bytes(11 * 2**20)
    name = name_of(hashlib.sha256(data).hexdigest())
    command = [sys.executable, "-c", DIES_BETWEEN_PARTS, name, str(len(data))]
    died = subprocess.run(command, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    begun = bucket._files.call_s3("list_multipart_uploads", Bucket="weft")["Uploads"]
    assert [one["Key"] for one in begun] == [f"team/blobs/{name}"]

    blobs = BlobStore(bucket)
    assert (bucket.size(name), bucket.read(name), list(bucket.entries())) == (None, None, [])
    found = fsck(engine, blobs)
    assert (found.problems, found.orphans, found.drafts, found.num_blobs) == ((), (), (), 0)
    assert collect(engine, blobs).waiting == ()

    assert blobs.get_bytes(blobs.put_bytes(data)) == data
    assert [entry.name for entry in bucket.entries()] == [name]
    for _ in range(2):
        collect(engine, blobs, delete_them=True, grace_s=0)
    assert list(bucket.entries()) == []


@pytest.mark.s3
def test_an_upload_whose_answer_is_lost_is_sent_twice_and_stored_once(line, bucket):
    blobs = BlobStore(bucket)
    line.answers, line.breaks = False, 1
    digest = blobs.put(adapter())
    assert line.used > 1
    assert [entry.name for entry in bucket.entries()] == [name_of(digest)]
    assert same(blobs.get(digest), adapter())


@pytest.mark.s3
def test_many_who_store_the_same_at_once_store_it_once(bucket):
    blobs = BlobStore(bucket)
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: blobs.put(adapter(size=50_000)), range(16)))
    assert [entry.name for entry in bucket.entries()] == [name_of(digests.pop())]
    assert not digests


@pytest.mark.s3
def test_a_bucket_that_does_not_exist_is_named(line):
    with pytest.raises(BlobsUnavailable, match=r"cannot write s3://nobodys/.*bucket"):
        BlobStore(Bucket("s3://nobodys")).put(adapter())


@pytest.mark.parametrize(
    "url",
    [
        "s3://me:hush@bucket/x",
        "az://container/x?sv=1&sig=hush",
        "s3://bucket/x#hush",
        "simplecache::s3://me:hush@bucket",
    ],
)
def test_a_url_with_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(BadBlobsUrl, match="may hold no password") as caught:
        open_place(url)
    assert "hush" not in str(caught.value)


def test_a_url_of_no_known_kind_is_refused_with_what_is_allowed():
    with pytest.raises(BadBlobsUrl, match=r"no kind of place is called 'ftps3'; .* s3://"):
        open_place("ftps3://x")


def test_paths_and_file_urls_are_folders(tmp_path):
    for url in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        assert isinstance(open_place(url), Folder)
        assert open_place(url).where() == str(tmp_path)
