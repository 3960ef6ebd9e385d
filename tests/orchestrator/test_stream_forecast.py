"""``weft stream plan``: what a whole stream would spend of whose privacy, before it trains."""

from __future__ import annotations

import pytest
import yaml

from clients.accounting import epsilon
from clients.builtin.parameter_types import LABELS
from orchestrator.config import parse_config
from orchestrator.launch import make_plan
from orchestrator.stream import parse_stream
from orchestrator.stream_forecast import forecast_stream
from orchestrator.stream_template import STREAM_TEMPLATE
from storage.ledger import ClientRecord
from strategies.spends import PrivacySpend

FIXED = {"noise_multiplier": 2.0, "delta": 1e-3}
STEPS = 2
"""Of a round; each task has one."""


@pytest.fixture
def file(workspace, notes, tiny_encoder, tmp_path):
    """Return a function that writes a stream: pets of clients a and b, then parts of a alone.

    Both are registered, and share no record.
    """
    for shift, name in enumerate(("a", "b")):
        data = notes(name, size=8, shift=shift)
        workspace.ledger.add_client(ClientRecord(name, data, name, num_examples=8))

    def write(privacy=FIXED, second=None):
        base = {
            "model": {"id": str(tiny_encoder), "max_length": 16},
            "labels": ["cat", "dog", "model", "rank"],
            "strategy": "ffa-lora",
            "adapter": {"name": "lora", "r": 2, "layers": [0]},
            "rounds": 1,
            "steps": STEPS,
            "batch_size": 8,  # all: what the accountant need not sum up over samples
            "backend": "inline",
            **({"privacy": privacy} if privacy else {}),
        }
        tasks = [
            {"name": "pets", "labels": ["cat", "dog"], "clients": {"names": ["a", "b"]}},
            {"name": "parts", "labels": ["model", "rank"], "clients": {"names": ["a"]}},
        ]
        tasks[1] |= second or {}
        path = tmp_path / "stream.yaml"
        path.write_text(yaml.safe_dump({"name": "notes", "base": base, "tasks": tasks}))
        return path

    return write


def of_tasks(count):
    numbers = {"noise_multiplier": 2.0, "sample_rate": 1.0, "steps": float(STEPS * count)}
    return epsilon([PrivacySpend("gaussian", "example", "add-remove", numbers)], FIXED["delta"])


def spent(found):
    """Return ε of the stream by population."""
    return {t["stream"]["population"]: t["stream"]["epsilon"] for t in found["totals"]}


def test_a_forecast_adds_up_tasks_by_population_and_is_what_is_spent_in_the_end(
    file, ok, read, workspace
):
    path = file()

    found = read("stream", "plan", path)

    pets, parts = found["tasks"]
    assert [task["status"] for task in found["tasks"]] == ["planned", "planned"]
    assert [share["task"]["population"] for share in pets["shares"]] == ["a", "b"]
    [share] = parts["shares"]
    assert share["task"]["epsilon"] == pytest.approx(of_tasks(1))
    assert share["stream"]["epsilon"] == pytest.approx(of_tasks(2))
    assert spent(found) == pytest.approx({"a": of_tasks(2), "b": of_tasks(1)})
    assert f"{of_tasks(2):.2f}" in ok("stream", "plan", path)
    assert read("runs", "list") == []  # nothing was started, and nothing spent
    assert not workspace.ledger.spent_populations()

    ok("stream", "run", path)

    after = read("stream", "plan", path)
    assert [task["status"] for task in after["tasks"]] == ["completed", "completed"]
    assert spent(after) == pytest.approx(spent(found))
    kept = {name: workspace.ledger.spends(name) for name in ("a", "b")}
    assert {n: sum(row.parameters["steps"] for row in rows) for n, rows in kept.items()} == {
        "a": 2 * STEPS,
        "b": STEPS,
    }


def test_a_forecast_counts_what_was_spent_before_the_stream(file, ok, read, run_yaml):
    only_b = {"clients": {"names": ["b"]}, "strategy": "ffa-lora"}
    ok("run", run_yaml(privacy=FIXED, rounds=1, batch_size=8, **only_b))
    ok("privacy", "budget", "b", "--epsilon", "9", "--delta", "0.001")

    [_, b] = read("stream", "plan", file())["totals"]

    assert b["stream"]["epsilon"] == pytest.approx(of_tasks(1))
    assert b["whole"]["epsilon"] == pytest.approx(of_tasks(2))
    assert b["budget"] == 9


def test_a_task_that_an_earlier_one_leaves_too_little_for_is_named(file, ok, read, refused):
    path = file()
    ok("privacy", "budget", "a", "--epsilon", f"{of_tasks(2) - 0.01}", "--delta", "0.001")

    assert refused("stream", "plan", path).startswith("task parts: a: its population 'a' has spent")
    assert read("runs", "list") == []


def test_a_later_task_gets_the_noise_that_earlier_ones_leave_it(file, ok, workspace):
    path = file(privacy={"epsilon": 3.0, "delta": 1e-3})
    ok("privacy", "budget", "a", "--epsilon", "4", "--delta", "0.001")
    stream = parse_stream(yaml.safe_load(path.read_text()))

    found = forecast_stream(workspace, stream)

    [first, second] = (
        next(s for s in task.shares if s.task.population == "a") for task in found.tasks
    )
    assert first.task.epsilon == pytest.approx(3, abs=0.05)
    assert second.task.epsilon < first.task.epsilon  # more noise than it asks for
    assert second.whole.epsilon == pytest.approx(4, abs=0.05)
    assert second.left == pytest.approx(0, abs=0.05)
    alone = make_plan(parse_config(stream.stages[1].document), workspace.store, workspace.ledger)
    assert alone.participants[0].privacy.noise_multiplier  # by itself it is planned as it asks


def test_tasks_without_privacy_are_told_and_a_stream_of_them_has_no_forecast(file, refused, ok):
    assert "has no privacy section: no ε bounds" in refused("stream", "plan", file(privacy=None))
    told = ok("stream", "plan", file(second={"set": {"privacy": None}}))
    assert "parts: planned, 1 rounds, without DP: no ε bounds what it tells" in told


def test_the_template_is_a_stream_whose_options_are_options(ok, refused, tmp_path):
    path = tmp_path / "stream.yaml"
    assert "next: weft stream plan" in ok("stream", "init", path)
    assert path.read_text() == STREAM_TEMPLATE
    assert "--force overwrites it" in refused("stream", "init", path)
    document = yaml.safe_load(STREAM_TEMPLATE)
    lines = [line.removeprefix("# ") for line in STREAM_TEMPLATE.splitlines() if line[:2] == "# "]
    for option in (line for line in lines if line.startswith(("method:", "metric:"))):
        parse_stream(document | yaml.safe_load(option))
    begins = next(i for i, line in enumerate(lines) if line.startswith("- name"))
    for task in yaml.safe_load("\n".join(lines[begins:])):
        wanted = parse_stream({**document, "tasks": [*document["tasks"], task]})
        assert wanted.tasks[2].labels == tuple(task["labels"])

    assert tuple(document["base"]["labels"]) == LABELS


@pytest.mark.slow
def test_the_template_can_be_planned(workspace):
    found = forecast_stream(workspace, parse_stream(yaml.safe_load(STREAM_TEMPLATE)))

    assert [task.rounds for task in found.tasks] == [2, 3]
    assert all(0 < share.task.epsilon <= 4.001 for task in found.tasks for share in task.shares)
    assert all(total.stream.epsilon > total.task.epsilon for total in found.totals)


@pytest.mark.parametrize("argv", [("run",), ("plan",)])
def test_a_stream_s_file_that_is_not_there_has_its_own_writer(refused, argv):
    wanted = "there is no file gone.yaml; weft stream init writes one"
    assert refused("stream", *argv, "gone.yaml") == wanted
