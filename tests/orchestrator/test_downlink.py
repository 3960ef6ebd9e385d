"""Runs whose clients are not sent again what they hold: the same versions, fewer bytes."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from clients.downlink import NotHeld
from clients.keys import run_folder
from clients.worker import perform
from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from storage.ledger import ClientRecord

PRIVACY = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "insecure_seed": 3}
CORED = {
    "name": "lora-sb",
    "r": 2,
    "layers": [0],
    "target_modules": ["query"],
    "init": "orthogonal",
}
METHODS = {
    "fedsvd": {"strategy": "fedsvd"},
    "fedsvd-2": {"strategy": {"name": "fedsvd", "every": 2}, "rounds": 4},
    "ffa-lora": {"strategy": "ffa-lora"},
    "fed-sb": {"strategy": "fed-sb", "adapter": CORED},
    "private": {"strategy": "fedsvd", "privacy": PRIVACY},
    "asynchronous": {
        "strategy": "ffa-lora",
        "asynchronous": {"buffer": 2, "concurrency": 2},
        "cohort": None,
    },
}
ROTATION_BYTES = 8 * 2 * 2
DIGEST_BYTES = 32


@pytest.fixture
def three(home, notes):
    """Return a workspace with three clients."""
    home.ledger.add_client(ClientRecord("c", notes("c", shift=2), "c", num_examples=12))
    return home


@pytest.fixture
def ran(three, tiny):
    """Return a function that runs a config and returns its version and its events."""

    def run(backend=None, **changes):
        version = service.launch(three, tiny(**changes), backend=backend or InlineBackend())
        record = max(three.ledger.runs(), key=lambda one: one.created_at)
        return version, three.ledger.events(record.id)

    return run


class Meddling(InlineBackend):
    """Runs assignments here, after something was done about each that trains."""

    def __init__(self, meddle):
        super().__init__()
        object.__setattr__(self, "meddle", meddle)

    def run(self, assignments, started, stepped=None):
        def seen(assignment):
            if assignment.action == "train":
                self.meddle(assignment)
            started(assignment)

        yield from super().run(assignments, seen)


def sent(events):
    """Return what each client was sent in each round: bytes of each time."""
    found = {}
    for event in events:
        if event.kind == "assigned":
            for client, size in event.data["bytes_by_client"].items():
                found.setdefault((client, event.data["round"]), []).append(size)
    return found


def kept_by(assignment):
    """Return the file in which an assignment's client keeps what it was sent."""
    folder = run_folder(Path(assignment.site), assignment.run, assignment.client)
    return folder / "broadcast.safetensors"


@pytest.mark.parametrize("method", METHODS)
def test_the_version_is_the_same_and_the_bytes_are_fewer(ran, method):
    config = {"rounds": 3, "cohort": 2, "seed": 1, **METHODS[method]}
    whole, before = ran(**config)
    held, after = ran(**config, downlink="held")
    assert held == whole
    down = [sum(e.data["bytes"] for e in log if e.kind == "assigned") for log in (before, after)]
    assert down[1] < down[0]
    assert not [e for e in after if e.kind in ("refused", "retried")]
    assert all(len(sizes) == 1 for sizes in sent(after).values())


def test_what_is_sent_is_b_the_head_a_rotation_for_each_round_and_digests(ran, three):
    version, events = ran(strategy="fedsvd", rounds=5, cohort=2, seed=1, downlink="held")
    tensors = three.store.tensors(version)
    whole = sum(t.nbytes for t in tensors.values())
    turned = [t for n, t in tensors.items() if n.endswith("lora_A.weight")]
    assert turned
    last, ages = {}, set()
    for (client, round_), [size] in sorted(sent(events).items(), key=lambda one: one[0][1]):
        age = round_ - last.get(client, 0)
        rotations = DIGEST_BYTES + age * ROTATION_BYTES  # beyond A's own size, A goes itself
        saved = sum(max(0, t.nbytes - rotations) for t in turned)
        assert size == whole - (saved if client in last else 0)
        ages.add(age if client in last else None)
        last[client] = round_
    assert {None, 1, 2} <= ages


def test_a_client_that_lost_what_it_held_is_sent_the_whole_at_once_and_is_not_at_fault(ran):
    def meddle(assignment):
        if not assignment.held:
            return
        if (assignment.client, assignment.round) == ("a", 2):
            kept_by(assignment).unlink()
        if (assignment.client, assignment.round) == ("b", 3):
            path = kept_by(assignment)
            save_file({n: t + 1 for n, t in load_file(path).items()}, path)

    config = {"rounds": 3, "strategy": "ffa-lora", "retries": 0}
    held, events = ran(Meddling(meddle), **config, downlink="held")
    assert not [e for e in events if e.kind in ("refused", "retried")]
    down = sent(events)
    whole, short = down["a", 1][0], down["a", 3][0]
    assert down["a", 2] == [short, whole]
    assert down["b", 3] == [short, whole]
    assert down["b", 2] == down["c", 3] == [short]
    assert held == ran(**config)[0]


def test_who_says_for_ever_that_it_holds_nothing_fails_like_any_other(ran):
    def refuse(assignment, stepped):
        if (assignment.client, assignment.round) == ("a", 2):
            raise NotHeld("the client holds nothing; send it whole")
        return perform(assignment, stepped)

    _, events = ran(
        InlineBackend(refuse), rounds=2, strategy="ffa-lora", retries=1, downlink="held"
    )
    asked = [e.data for e in events if e.kind in ("retried", "refused")]
    assert [(e["client"], e["round"], e.get("fault")) for e in asked] == [
        ("a", 2, None),
        ("a", 2, True),
    ]
    assert len(sent(events)["a", 2]) == 2


def test_a_resumed_run_sends_what_it_would_have_sent_and_ends_at_the_same_version(ran, three):
    config = {"strategy": "fedsvd", "rounds": 4, "cohort": 2, "seed": 1}

    def die(assignment):
        if assignment.round == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(Meddling(die), **config, downlink="held")
    [record] = three.ledger.runs()
    version = service.resume(three, record.id, backend=InlineBackend())
    down = sent(three.ledger.events(record.id))
    again = [sizes for (_, round_), sizes in down.items() if round_ == 4]
    assert [len(sizes) for sizes in again] == [2, 2]
    assert all(len(set(sizes)) == 1 for sizes in again)
    assert min(min(again)) < max(max(down.values()))
    assert version == ran(**config)[0]
