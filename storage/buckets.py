"""Blobs in a bucket elsewhere: S3, Google, Azure, or whatever else ``fsspec`` reaches."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from storage.places import BadBlobsUrl, BlobsUnavailable, Entry, Folder, Place

_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
"""Where a file appears at once, with all its bytes, or not at all."""

_AT_ONCE = 8
"""Files that are uploaded at once; each is held in memory."""

_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")


def open_place(url: str | Path) -> Place:
    """Return the place at a folder's path, or at a url such as ``s3://bucket/prefix``.

    Raises:
        BadBlobsUrl: if the url is of no kind that ``fsspec`` knows, or holds a password.
        BlobsUnavailable: if the kind needs a package that is not installed.
    """
    if "://" not in str(url):
        return Folder(url)
    parts = urlsplit(str(url))
    if parts.scheme == "file" and not parts.netloc:
        return Folder(unquote(parts.path))
    return Bucket(str(url))


class Bucket:
    """A prefix of a bucket; safe with any number of writers.

    Credentials and endpoints come from where the cloud's own tools find them, such as
    ``AWS_ACCESS_KEY_ID`` and ``AWS_ENDPOINT_URL``; a url that holds them is refused.

    Args:
        url: such as ``s3://bucket/prefix``.

    Raises:
        BadBlobsUrl, BlobsUnavailable: as :func:`open_place`.
    """

    def __init__(self, url: str) -> None:
        self._url = _checked(url)
        self._scheme = urlsplit(url).scheme
        from fsspec.core import url_to_fs  # most homes keep their blobs in a folder

        try:
            self._files, root = url_to_fs(self._url, use_listings_cache=False)
        except ImportError as error:
            raise BlobsUnavailable(
                f"blobs at {self._scheme}:// need a package that is not installed ({error}); for "
                "s3:// install it with: pip install 'weft[s3]'"
            ) from error
        except ValueError as error:
            raise BadBlobsUrl(
                f"no kind of place is called {self._scheme!r}; blobs lie in a folder, or at s3://, "
                "gs://, az:// or another protocol of fsspec"
            ) from error
        self._root = root.rstrip("/")

    def where(self, name: str = "") -> str:
        """Return the url."""
        return f"{self._url}/{name}".rstrip("/")

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None if it is not there."""
        with self._speaking("look for", name):
            try:
                found: int = self._files.info(self._path(name))["size"]
            except FileNotFoundError:
                return None
            return found

    def read(self, name: str) -> bytes | None:
        """Return a file's bytes, or None if it is not there."""
        with self._speaking("read", name):
            try:
                data: bytes = self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return data

    def write(self, name: str, data: bytes) -> None:
        """Make a file hold ``data``; an upload that is cut short leaves it as it was.

        Raises:
            BlobsUnavailable: if the place cannot be reached or refuses.
        """
        path = self._path(name)
        with self._speaking("write", name):
            if self._scheme in _WHOLE:
                self._files.pipe_file(path, data)
                return
            folder, _, last = path.rpartition("/")
            draft = f"{folder}/.{last}.{uuid.uuid4().hex}"
            self._files.makedirs(folder, exist_ok=True)
            self._files.pipe_file(draft, data)
            self._files.mv(draft, path)

    def take(self, files: Mapping[str, Path]) -> None:
        """Upload files of this machine, a few at once; each as :meth:`write`."""

        def upload(name: str) -> None:
            data = files[name].read_bytes()
            if self.size(name) != len(data):
                self.write(name, data)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(upload, files):
                pass  # raises what went wrong

    def remove(self, name: str) -> None:
        """Remove a file; what is not there is no error."""
        with self._speaking("remove", name):
            try:
                self._files.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def entries(self) -> Iterator[Entry]:
        """Yield every file below the prefix, in the order of names; holds what is said of all."""
        with self._speaking("list", ""):
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                found = {}
        below = f"{self._root}/"
        for path, facts in sorted(found.items()):
            yield Entry(path.removeprefix(below), facts["size"] or 0, _modified(facts))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _speaking(self, verb: str, name: str) -> Iterator[None]:
        """Say in a sentence what went wrong, whatever a protocol's library raises."""
        try:
            yield
        except Exception as error:  # each library has its own
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise BlobsUnavailable(
                f"cannot {verb} {self.where(name)}: {reason}; see to the connection, the "
                "credentials and the bucket, then do it again"
            ) from error


def _checked(url: str) -> str:
    """Return a url that may be shown: without ``/`` at its end, and no secret in it."""
    parts = urlsplit(url)
    if "::" in url or parts.query or parts.fragment or parts.password is not None:
        raise BadBlobsUrl(
            "the blobs' url (not shown) may hold no password, query or chain: write "
            "s3://BUCKET/PREFIX, and give credentials where the cloud's own tools look for them, "
            "such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return url.rstrip("/")


def _modified(facts: Mapping[str, Any]) -> float:
    """Return when a file was written, in seconds since 1970; infinity where nobody says."""
    for key in _TIMES:
        value = facts.get(key)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return math.inf
