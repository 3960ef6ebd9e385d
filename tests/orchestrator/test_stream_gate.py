"""What a gate asks of a stream's newest version, and the picture of it: nothing is trained here."""

import sys

import pytest

from orchestrator.config import BadConfig
from orchestrator.plotting import CannotDraw, MissingMatplotlib, plot
from orchestrator.stream import parse_stream
from orchestrator.stream_gate import Gate, check
from orchestrator.stream_report import report
from orchestrator.suite import prefix
from storage.ledger import Queueing

TASKS = ("mail", "chat", "calls")


@pytest.fixture
def learned(workspace, grow, notes, document):
    """Return a function that makes a stream of versions whose scores are given, row by row."""

    def make(*rows, size=1000, metric="accuracy", tested=TASKS, **base):
        tasks = []
        for number, name in enumerate(TASKS[: len(rows)]):
            version = grow(f"v-{name}", clients=(f"site-{number}",))
            task = {"name": name, "version": version}
            if name in tested:
                task["evaluate"] = notes(f"{name}-test")
            tasks.append(task)
        given = {
            "name": "desk",
            "base": document(name="desk", **base),
            "tasks": tasks,
            "metric": metric,
        }
        stream = parse_stream(given)
        labels = {"stream": "desk", "task": "mail"}
        queueing = Queueing(labels=labels, facts={"stream": dict(stream.document)})
        config = stream.config(0, ()).model_dump(mode="json")
        workspace.ledger.create_run("r1", "desk.mail", config, {}, queueing=queueing)
        for task, row in zip(stream.tasks, rows, strict=True):
            for other, value in zip(stream.tasks, row, strict=True):
                if other.test is not None:
                    scores = {"accuracy": value, "task_accuracy": 0.95, "num_examples": size}
                    named = {prefix(other) + key: number for key, number in scores.items()}
                    workspace.store.record_metrics(task.version, named)
        return stream

    return make


def verdicts(found):
    return {one.task: one.verdict for one in found.falls}


def test_a_share_of_words_is_no_share_of_a_test_set_s_examples(workspace, learned):
    learned((0.9, 0), (0.95, 0.9), task="token-classification")
    with pytest.raises(BadConfig, match=r"by accuracy of words, .* exact_match of whole examples"):
        check(workspace, "desk", Gate(0.02))


def test_past_tasks_are_held_against_the_versions_that_learned_them(workspace, learned):
    stream = learned((0.9, 0, 0), (0.95, 0.9, 0), (0.9, 0.5, 0.8), size=5000)
    found = check(workspace, "desk", Gate(0.02))

    assert found.version == stream.tasks[2].version
    assert verdicts(found) == {"mail": "holds", "chat": "falls"}
    assert found.verdict == "falls"
    assert [one.fall for one in found.falls] == pytest.approx([0.0, 0.4])


def test_a_version_may_be_held_against_another_on_all_tasks(workspace, learned):
    stream = learned((0.9, 0, 0), (0.95, 0.9, 0), (0.9, 0.5, 0.8), size=5000)
    gate = Gate(0.02, against=stream.tasks[1].version)
    assert verdicts(check(workspace, "desk", gate)) == {
        "mail": "falls",
        "chat": "falls",
        "calls": "holds",
    }


def test_small_test_sets_say_nothing_of_small_falls(workspace, learned):
    learned((0.9, 0), (0.88, 0.9), size=100)
    assert check(workspace, "desk", Gate(0.02)).verdict == "unclear"
    assert check(workspace, "desk", Gate(0.2)).verdict == "holds"


def test_who_is_told_the_task_is_judged_by_that(workspace, learned):
    learned((0.9, 0), (0.1, 0.9), size=5000)
    assert check(workspace, "desk", Gate(0.02, told_task=True)).verdict == "holds"


def test_a_first_task_has_nothing_to_fall(workspace, learned):
    learned((0.9,))
    with pytest.raises(BadConfig, match="no past task with a test set"):
        check(workspace, "desk", Gate(0.02))


def test_a_metric_that_is_no_share_has_no_interval(workspace, learned):
    learned((0.9, 0), (0.9, 0.9), metric="loss")
    with pytest.raises(BadConfig, match="measured by loss"):
        check(workspace, "desk", Gate(0.02))


def test_the_exit_code_is_the_verdict(weft, workspace, learned):
    learned((0.9, 0), (0.88, 0.9), size=100)
    code, told, _ = weft("stream", "check", "desk", "--tau", "0.02")
    assert (code, "too small to say" in told) == (1, True)
    code, told, _ = weft("stream", "check", "desk", "--tau", "0.2")
    assert (code, "no past task fell by more" in told) == (0, True)


def test_a_stream_is_drawn_with_the_same_bytes_each_time(workspace, learned, tmp_path):
    pytest.importorskip("matplotlib")
    learned((0.9, 0, 0), (0.8, 0.9, 0), (0.7, 0.8, 0.95))
    found = report(workspace, "desk")
    for name in ("a.svg", "b.svg", "c.png"):
        plot(found, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert all(text in drawn for text in (*TASKS, "0.95", "task-aware", "mean of those learned"))
    assert drawn == (tmp_path / "b.svg").read_text()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_told(workspace, learned, tmp_path, monkeypatch):
    learned((0.9, 0), (0.9, 0.9))
    found = report(workspace, "desk")
    with pytest.raises(CannotDraw, match=r"svg or png, got 'a\.gif'"):
        plot(found, tmp_path / "a.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingMatplotlib, match="pip install 'weft"):
        plot(found, tmp_path / "a.svg")


def test_a_stream_without_test_sets_has_nothing_to_draw(workspace, learned, tmp_path):
    learned((0.9, 0), (0.9, 0.9), tested=())
    with pytest.raises(CannotDraw, match="nothing of stream 'desk' was measured"):
        plot(report(workspace, "desk"), tmp_path / "a.svg")
