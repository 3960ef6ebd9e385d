"""One line an event, as text or JSON, and nothing of it is data."""

import json
import logging
import sys
from contextlib import contextmanager

import pytest

from orchestrator.observers.logs import EventLog


@pytest.fixture
def lines(tmp_path, events):
    """Return a function that logs the run's events, or others, and returns the file's lines."""

    def write(form, these=None):
        log = EventLog(form, tmp_path / "logs" / "weft.log")
        try:
            for kind, data in events if these is None else these:
                log(kind, data)
        finally:
            log.close()
        return (tmp_path / "logs" / "weft.log").read_text("utf-8").splitlines()

    return write


def test_json_lines_say_run_round_client_and_epsilon(lines, events):
    found = [json.loads(line) for line in lines("json")]

    assert [one["message"] for one in found] == [kind for kind, _ in events]
    assert {(one["run"], one["name"]) for one in found[:-1]} == {("run-1", "task-1")}
    refused = next(one for one in found if one["message"] == "refused")
    assert (refused["level"], refused["round"], refused["client"]) == ("warning", 1, "b")
    assert refused["reason"] == "out of memory"
    last = [one for one in found if one["message"] == "committed"][-1]
    assert (last["epsilon"], last["population"], last["unit"]) == (3.0, "south", "example")
    assert last["delta"] == 1e-5
    assert found[0]["time"].endswith("Z")


def test_text_lines_are_one_event_each_whatever_a_reason_holds(lines):
    [_, line] = lines(
        "text",
        [
            ("run", {"run": "r", "name": "n"}),
            ("refused", {"client": "a", "reason": 'two\nlines, "quoted"', "loss": float("nan")}),
        ],
    )

    assert " WARNING weft.run refused run=r name=n client=a " in line
    assert r'reason="two\nlines, \"quoted\"" loss=nan' in line


def test_only_numbers_short_texts_and_lengths_are_written(lines, make_plan):
    [line] = lines(
        "json",
        [
            (
                "run",
                {"run": "r", "plan": make_plan(), "cohort": ["a"] * 1000, "other": {"x": "s3cret"}},
            )
        ],
    )

    assert json.loads(line)["cohort"] == 1000
    assert "plan" not in line
    assert "s3cret" not in line


def test_what_libraries_log_is_there_in_the_same_form(tmp_path):
    log = EventLog("json", tmp_path / "log")
    try:
        logging.getLogger("some.library").warning("careful: %s", "hot")
        try:
            raise ValueError("oh")
        except ValueError:
            logging.getLogger("some.library").exception("failed")
    finally:
        log.close()

    first, second = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert (first["logger"], first["message"]) == ("some.library", "careful: hot")
    assert "ValueError: oh" in second["error"]


@contextmanager
def bare_root():
    """Take the root logger's handlers away, pytest's too, as in a new process."""
    root = logging.getLogger()
    kept, root.handlers = root.handlers, []
    try:
        yield root
    finally:
        root.handlers = kept


def opacus_is_imported():
    """Do what Opacus does when it is imported."""
    logging.basicConfig(format="%(asctime)s:%(levelname)s:%(message)s", stream=sys.stderr)


@pytest.mark.parametrize("when", ["before", "after"])
def test_opacus_does_not_double_the_lines_on_stderr(capsys, when):
    with bare_root() as root:
        if when == "before":
            opacus_is_imported()
        log = EventLog("json")
        if when == "after":
            opacus_is_imported()
        assert len(root.handlers) == 1
        log("round", {"round": 1})
        logging.getLogger("x").warning("hot")
        log.close()

    said = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
    assert said == ["round", "hot"]


def test_closing_puts_logging_back_as_it_was(capsys):
    with bare_root() as root:
        logging.basicConfig(format="plain %(message)s", stream=sys.stderr)
        before = list(root.handlers)
        log = EventLog("json")
        assert root.handlers != before
        log.close()
        log.close()

        assert root.handlers == before
        logging.getLogger("x").warning("hot")
    assert capsys.readouterr().err == "plain hot\n"


def test_with_a_file_stderr_keeps_its_plain_warnings(capsys, tmp_path):
    with bare_root():
        logging.basicConfig(format="plain %(message)s", stream=sys.stderr)
        log = EventLog("text", tmp_path / "log")
        log("round", {"round": 1})
        logging.getLogger("x").warning("hot")
        log.close()

    assert capsys.readouterr().err == "plain hot\n"
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        EventLog("text", tmp_path)
