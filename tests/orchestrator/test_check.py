"""What a check says of a run before it starts is what becomes of it."""

import pytest

from orchestrator import service
from orchestrator.backends.inline import InlineBackend
from orchestrator.check import check

SCALINGS = 64  # bytes: what a client is sent, and never sends


@pytest.mark.parametrize(
    "method",
    [
        {"strategy": "sd-lora", "adapter": {"name": "sd-lora", "r": 2, "layers": [0]}},
        {"strategy": "fedavg", "regularizers": ["lwf"]},
        {"strategy": "scaffold", "optimizer": {"name": "sgd", "lr": 0.1}, "steps": 2},
    ],
    ids=["directions of earlier tasks", "a teacher", "control variates"],
)
def test_what_a_client_is_sent_of_a_second_task_is_counted_whole(home, tiny, method):
    first = service.launch(home, tiny(name="one", **method), backend=InlineBackend())
    second = tiny(name="two", seed=1, start="continue", start_from=first, **method)
    told = check(second, home.store, home.ledger)

    service.launch(home, second, backend=InlineBackend())

    [run] = [one for one in home.ledger.runs() if one.name == "two"]
    sent = next(e.data["bytes"] for e in home.ledger.events(run.id) if e.kind == "assigned")
    back = told.sizes["adapter_bytes"] * len(told.plan.participants)
    assert told.round_bytes - back == pytest.approx(sent, abs=SCALINGS)
    assert sent > 1.4 * back
