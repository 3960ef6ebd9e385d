"""Many processes that write to one name at once, on both databases."""

import multiprocessing

import pytest
import torch

from storage.blobs import BlobStore
from storage.database import open_database
from storage.store import AdapterStore

WRITERS, EACH = 16, 3


def write(url, folder, writer, ready):
    """Commit and name ``EACH`` versions, each on top of the one before."""
    store = AdapterStore(open_database(url), BlobStore(folder))
    ready.wait(60)
    parents = {}
    for number in range(EACH):
        tensors = {"q.lora_A.weight": torch.full((2,), float(writer * EACH + number))}
        recipe = {"updates": [{"client": f"writer-{writer}"}], "n": number}
        version = store.commit(tensors, parents=parents, recipe=recipe)
        store.name("busy", version)
        parents = {version: "round"}
    store._engine.dispose()


@pytest.fixture
def processes():
    """A server that has imported the store and torch once, which takes seconds, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["storage.store", "storage.encoding"])
    return context


@pytest.mark.timeout(120)
def test_sixteen_processes_lose_nothing_and_leave_no_gap(url, tmp_path, processes):
    ready = processes.Barrier(WRITERS)
    jobs = [(url, tmp_path / "blobs", writer, ready) for writer in range(WRITERS)]
    writers = [processes.Process(target=write, args=job) for job in jobs]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * WRITERS

    store = AdapterStore(open_database(url), BlobStore(tmp_path / "blobs"))
    [row] = store.names()
    assert row.num_versions == WRITERS * EACH
    numbered = [store.version(f"busy:v{n}") for n in range(1, WRITERS * EACH + 1)]
    assert len({v.id for v in numbered}) == WRITERS * EACH
    made = sorted(float(store.tensors(v.id)["q.lora_A.weight"][0]) for v in numbered)
    assert made == [float(n) for n in range(WRITERS * EACH)]
    for writer in range(WRITERS):
        own = store.versions(client=f"writer-{writer}")
        assert [v.recipe["n"] for v in own] == [2, 1, 0]
        assert len(store.edges(own[0].id)) == EACH - 1
    store._engine.dispose()
