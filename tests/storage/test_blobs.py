import errno
import hashlib
import os
from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.blobs import BlobCorrupt, BlobMissing, BlobStore
from storage.encoding import BadTensor


def lora() -> dict[str, torch.Tensor]:
    return {
        "q.lora_A.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "q.lora_B.weight": torch.ones(4, 2, dtype=torch.bfloat16),
        "q.scaling": torch.tensor(2.0),
        "round": torch.tensor(3),
    }


def file_of(root: Path, digest: str) -> Path:
    return root / digest[:2] / digest[2:]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


def test_what_is_put_comes_back(tmp_path):
    blobs = BlobStore(tmp_path)
    assert same(blobs.get(blobs.put(lora())), lora())


def test_digest_is_the_hash_of_the_file_and_names_it(tmp_path):
    digest = BlobStore(tmp_path).put(lora())
    assert hashlib.sha256(file_of(tmp_path, digest).read_bytes()).hexdigest() == digest


def test_digest_is_that_of_put_and_writes_nothing(tmp_path):
    digest = BlobStore(tmp_path / "a").digest(lora())
    assert not (tmp_path / "a").exists()
    assert BlobStore(tmp_path / "b").put(lora()) == digest


def test_digest_of_known_tensors_never_changes(tmp_path):
    # ids of versions are made of it: another safetensors release must not change them
    expected = "5d3a108ad449"
    assert BlobStore(tmp_path).digest(lora()).startswith(expected)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ],
)
def test_every_dtype_comes_back(tmp_path, dtype):
    blobs = BlobStore(tmp_path)
    tensors = {"x": torch.tensor([[0, 1], [1, 0]]).to(dtype), "empty": torch.empty(0, 3).to(dtype)}
    assert same(blobs.get(blobs.put(tensors)), dict(sorted(tensors.items())))


def column_major(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, laid out the other way round in memory."""
    backwards = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(backwards).contiguous().permute(backwards)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda t: t.isprintable() and t != "__metadata__"),
        arrays.arrays(
            st.sampled_from([np.dtype("float32"), np.dtype("int64"), np.dtype("bool")]),
            arrays.array_shapes(min_dims=0, max_dims=3, max_side=3),
        ).filter(lambda a: bool(np.isfinite(a).all())),
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_order_and_strides_do_not_change_the_digest(tmp_path, values, random):
    blobs = BlobStore(tmp_path)
    tensors = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
    order = list(tensors)
    random.shuffle(order)
    turned = {name: column_major(tensors[name]) for name in order}
    digest = blobs.put(tensors)
    assert blobs.digest(turned) == digest
    assert same(blobs.get(digest), dict(sorted(tensors.items())))


def test_values_names_shapes_and_dtypes_each_change_the_digest(tmp_path):
    blobs = BlobStore(tmp_path)
    variants = [
        {"x": torch.zeros(2, 2)},
        {"x": torch.ones(2, 2)},
        {"y": torch.zeros(2, 2)},
        {"x": torch.zeros(4)},
        {"x": torch.zeros(2, 2, dtype=torch.int32)},
    ]
    assert len({blobs.digest(v) for v in variants}) == len(variants)


def test_tensors_that_share_memory_are_stored_like_copies(tmp_path):
    blobs = BlobStore(tmp_path)
    whole = torch.arange(8.0)
    shared = {"a": whole, "b": whole, "c": whole[2:5]}
    digest = blobs.put(shared)
    assert digest == blobs.digest({name: t.clone() for name, t in shared.items()})
    assert same(blobs.get(digest), shared)


def test_parameters_are_stored_as_values(tmp_path):
    blobs = BlobStore(tmp_path)
    assert blobs.digest({"x": torch.nn.Parameter(torch.ones(2))}) == blobs.digest(
        {"x": torch.ones(2)}
    )


def test_a_stored_blob_is_not_written_again(tmp_path):
    blobs = BlobStore(tmp_path)
    path = file_of(tmp_path, blobs.put(lora()))
    before = path.stat()
    blobs.put(lora())
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_nothing_but_blobs_is_left_in_the_folder(tmp_path):
    digest = BlobStore(tmp_path).put(lora())
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [file_of(tmp_path, digest)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, value):
    tensors = {"a": torch.zeros(2), "q.lora_B.weight": torch.tensor([1.0, value])}
    with pytest.raises(ValueError, match=r"'q.lora_B.weight' has 1 of 2 values .* not finite"):
        BlobStore(tmp_path).put(tensors)
    assert list(tmp_path.iterdir()) == []


def test_dtypes_that_a_version_cannot_hold_are_refused(tmp_path):
    with pytest.raises(BadTensor, match=r"'x' is torch.strided torch.complex64; .* float32"):
        BlobStore(tmp_path).put({"x": torch.zeros(2, dtype=torch.complex64)})


def test_a_changed_byte_is_found(tmp_path):
    blobs = BlobStore(tmp_path)
    digest = blobs.put(lora())
    path = file_of(tmp_path, digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BlobCorrupt, match=f"blob {digest[:12]} is corrupt"):
        blobs.get(digest)


def test_a_truncated_blob_is_found_and_healed_by_storing_it_again(tmp_path):
    blobs = BlobStore(tmp_path)
    digest = blobs.put(lora())
    path = file_of(tmp_path, digest)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BlobCorrupt):
        blobs.get(digest)
    blobs.put(lora())
    assert same(blobs.get(digest), lora())


def test_a_blob_that_is_not_there_is_missing(tmp_path):
    with pytest.raises(BlobMissing, match="no blob 000000000000"):
        BlobStore(tmp_path).get("0" * 64)


@pytest.mark.parametrize("digest", ["", "abc", "../../etc/passwd", "A" * 64])
def test_what_is_no_digest_reads_no_file(tmp_path, digest):
    with pytest.raises(BlobMissing, match="64 hex digits"):
        BlobStore(tmp_path).get(digest)


def test_a_full_disk_is_named_by_the_blob_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store, tensors = BlobStore(tmp_path / "blobs"), {"x": torch.ones(2)}
    digest = store.digest(tensors)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '.*{digest[2:]}'"):
        store.put(tensors)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
