"""What every experiment logger keeps to: a new file is tested by being there."""

import builtins
import re
import tomllib
from pathlib import Path

import pytest

from orchestrator.config import BadConfig, parse_config
from orchestrator.loggers import LOGGERS, LoggedRun, LoggerUnavailable

ROOT = Path(__file__).resolve().parents[3]
SECRET = re.compile(r"key|token|password|secret|user", re.IGNORECASE)


@pytest.fixture
def run(tmp_path):
    return LoggedRun("run-1", "task-1", 0, tmp_path / "home")


@pytest.mark.parametrize("name", LOGGERS.names())
def test_a_missing_package_is_a_sentence_that_names_an_extra(name, run, monkeypatch):
    real = builtins.__import__

    def without(wanted, *rest, **named):
        if wanted.partition(".")[0] == name or wanted.endswith(f".{name}"):
            raise ModuleNotFoundError(wanted)
        return real(wanted, *rest, **named)

    plugin = LOGGERS.get(name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LoggerUnavailable, match=f"logger '{name}' needs the package") as caught:
        plugin.build(run)

    extra = re.search(r"pip install 'weft\[([a-z]+)\]'", str(caught.value))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert extra
    assert extra[1] in project["optional-dependencies"]


@pytest.mark.parametrize("name", LOGGERS.names())
def test_no_option_is_a_secret(name):
    assert [option for option in LOGGERS.get(name).options if SECRET.search(option)] == []


@pytest.mark.parametrize("name", LOGGERS.names())
def test_an_option_that_is_not_there_is_refused_with_the_config(name, document):
    with pytest.raises(BadConfig, match=f"logger '{name}' has no option 'colour'"):
        parse_config(document(loggers=[{"name": name, "colour": "red"}]))


def test_a_logger_that_is_not_there_is_refused_with_the_nearest(document):
    with pytest.raises(BadConfig, match="no logger is called 'tensorbord'; did you mean"):
        parse_config(document(loggers=["tensorbord"]))


def test_a_logger_given_twice_is_refused(document):
    with pytest.raises(BadConfig, match="loggers: one is given twice"):
        parse_config(document(loggers=["mlflow", {"name": "mlflow", "experiment": "x"}]))
