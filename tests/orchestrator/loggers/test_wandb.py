"""W&B, offline: what was logged is in its files, and nothing else is."""

import pytest

pytest.importorskip("wandb", reason="extra 'wandb' is not installed")

import wandb

from orchestrator.loggers import LOGGERS, LoggedRun, LoggerUnavailable


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return LoggedRun("run-1", "task-1", 0, tmp_path)


def test_an_offline_run_writes_what_was_logged(run, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = LOGGERS.get("wandb").build(run)
    assert list(tmp_path.iterdir()) == []  # making it writes nothing
    logger.log_params({"adapter": {"name": "lora-of-mine"}})
    logger.log_metrics({"eval/accuracy": 0.25}, 1)
    logger.close(completed=True)
    wandb.teardown()  # as at the end of the process: only then its service has written all

    [file] = tmp_path.glob("wandb/offline-run-*/run-run-1.wandb")
    written = file.read_bytes()
    assert b"lora-of-mine" in written
    assert b"eval/accuracy" in written


def test_without_a_key_it_is_refused_before_it_could_ask(run):
    with pytest.raises(LoggerUnavailable, match="WANDB_API_KEY is not set; set it, or WANDB_MODE"):
        LOGGERS.get("wandb").build(run)
