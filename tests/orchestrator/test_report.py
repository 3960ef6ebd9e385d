"""What people read: trees, tables, progress."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.progress_bar import ProgressBar

from orchestrator import service
from orchestrator.drawing import lineage_tree
from orchestrator.progress import RunProgress
from orchestrator.report import version_table
from orchestrator.sections import PrivacyConfig


def _text(renderable) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def _history(workspace, rounds):
    """Commit a start and ``rounds`` rounds with one client each, and return the last id."""
    common = {
        "model": {"id": None, "hash": "ab" * 32, "labels": ["x", "y"]},
        "adapter": {"name": "lora", "options": {}},
        "strategy": {"name": "fedsvd", "options": {}},
        "privacy": {"delta": 1e-5, "insecure_seed": None},
        "start": "fresh",
        "stack": [],
        "seen_labels": ["x", "y"],
        "reproducible": "bitwise",
        "private": True,
    }
    spend = {
        "mechanism": "gaussian",
        "unit": "example",
        "adjacency": "add-remove",
        "parameters": {"noise_multiplier": 2.0, "sample_rate": 0.01, "steps": 5.0},
    }
    last, parents = "", {}
    for number in range(rounds + 1):
        leaf = {
            "client": "clinic-7",
            "population": "people",
            "public": False,
            "digest": f"{number:064x}",
            "num_examples": 100,
            "fingerprint": "fe" * 32,
            "spends": [spend],
        }
        recipe = {
            **common,
            "kind": "round" if number else "start",
            "round": number,
            "updates": [leaf] if number else [],
        }
        last = workspace.store.commit(
            {"w": torch.full((2,), float(number))}, parents=parents, recipe=recipe
        )
        parents = {last: "round" if number else "init"}
    return last


def test_a_lineage_tree_goes_down_to_client_updates_with_their_epsilon(workspace):
    text = _text(lineage_tree(service.lineage(workspace, _history(workspace, 2))))
    assert text.count("clinic-7 update") == 2
    assert "base local folder abababababab" in text
    assert "people: ε = " in text
    assert "δ = 1e-05, unit example, add-remove" in text


def test_a_long_line_of_rounds_is_shortened_unless_all_are_asked_for(workspace):
    ancestry = service.lineage(workspace, _history(workspace, 9))
    short, whole = _text(lineage_tree(ancestry)), _text(lineage_tree(ancestry, whole=True))
    assert "rounds, shown with --all" in short
    assert short.count("clinic-7 update") < whole.count("clinic-7 update") == 9
    assert "start of lora" in short


def test_a_version_table_says_what_the_version_is(workspace):
    last = _history(workspace, 1)
    text = _text(version_table(workspace.store.version(last), []))
    assert last in text
    assert "clinic-7" in text
    assert "bitwise" in text


def test_progress_hides_the_loss_under_dp_and_shows_it_otherwise(make_plan):
    for privacy, wanted in ((True, "hidden by DP"), (False, "0.500")):
        console = Console(file=io.StringIO(), width=200)
        plan = _private(make_plan()) if privacy else make_plan()
        with RunProgress(console) as progress:
            progress("run", {"plan": plan})
            progress("round", {"round": 1, "cohort": ["a", "b"]})
            progress("training", {"client": "a"})
            progress("accepted", {"client": "a", "loss": 0.5})
            progress("committed", {"round": 1, "updates": 1, "version": "ab" * 32})
        assert f"loss {wanted}" in console.file.getvalue()


def _private(plan):
    config = plan.config.model_copy(update={"privacy": PrivacyConfig(epsilon=3)})
    return replace(plan, config=config)


def test_live_progress_shows_client_states_and_the_time_left(make_plan):
    console = Console(file=io.StringIO(), width=200)
    progress = RunProgress(console)
    progress("run", {"plan": make_plan()})
    progress("round", {"round": 1, "cohort": ["a", "b"]})
    progress("committed", {"round": 1, "updates": 2, "version": "ab" * 32})
    progress("round", {"round": 2, "cohort": ["a", "b"]})
    progress("training", {"client": "b"})
    progress("step", {"client": "b", "step": 3, "steps": 40})
    text = _text(progress.__rich__())
    assert "round 2/2" in text
    assert "a waiting" in text
    assert "b training 3/40" in text
    assert "s left" in text


def test_what_is_waited_for_is_said_at_the_start(make_plan):
    for backend, wanted in (
        ("inline", "deadline: 60 s a round\n"),
        (
            {"name": "ray", "heartbeat_s": 5},
            "deadline: 60 s a round; a worker without progress for 5 s is replaced\n",
        ),
    ):
        console = Console(file=io.StringIO(), width=200)
        RunProgress(console)("run", {"plan": make_plan(backend=backend, deadline_s=60)})
        assert console.file.getvalue() == wanted


def test_progress_is_right_at_once_after_a_resume(make_plan):
    now = [1000.0]
    console = Console(file=io.StringIO(), width=200)
    progress = RunProgress(console, clock=lambda: now[0])
    progress("run", {"plan": make_plan(rounds=10), "done": 6})

    assert "going on after round 6/10" in console.file.getvalue()
    text = _text(progress.__rich__())
    assert "round 6/10" in text
    assert "time left: …" in text  # earlier processes say nothing of this one's speed

    progress("round", {"round": 7, "cohort": ["a"]})
    now[0] += 20
    progress("committed", {"round": 7, "updates": 1, "version": "ab" * 32})
    assert "about 60 s left" in _text(progress.__rich__())
    progress("round", {"round": 8, "cohort": ["a"]})
    now[0] += 15
    assert "about 45 s left" in _text(progress.__rich__())
    progress("committed", {"round": 8, "updates": 1, "version": "ab" * 32})
    assert "about 35 s left" in _text(progress.__rich__())  # (20 + 15) / 2 a round, two to go


@pytest.mark.parametrize("done", [0, 3])
def test_the_bar_shows_the_rounds_done_and_not_the_one_begun(make_plan, done):
    progress = RunProgress(Console(file=io.StringIO(), width=200))

    def bar():
        cells = [c for column in progress.__rich__().renderables[0].columns for c in column.cells]
        return next(c for c in cells if isinstance(c, ProgressBar))

    progress("run", {"plan": make_plan(rounds=5), "done": done})
    progress("round", {"round": done + 1, "cohort": ["a"]})
    assert (bar().completed, bar().total) == (done, 5)
    progress("committed", {"round": done + 1, "updates": 1, "version": "ab" * 32})
    assert bar().completed == done + 1
