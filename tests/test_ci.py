"""What `.ci/run` says when it does not come to its end."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_checks_that_were_terminated_have_not_passed(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    for name in ("started", "go-on"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "Makefile").write_text("lint:\n\techo > started\n\tcat go-on\n")

    # a make of its own, although `make test` may run this
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    process = subprocess.Popen(
        [tmp_path / ".ci" / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    (tmp_path / "started").read_text()
    process.send_signal(signal.SIGTERM)
    status = process.wait(timeout=60)
    (tmp_path / "go-on").write_text("")  # the stage it had begun
    said, _ = process.communicate(timeout=60)

    assert status not in (0, None)
    assert "all stages passed" not in said
    assert said.endswith("== FAILED (exit 143)\n")
