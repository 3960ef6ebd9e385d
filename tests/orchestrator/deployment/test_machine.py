"""What weft doctor says of this machine."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.deployment import machine


def verdicts(findings):
    return [(finding.verdict, finding.check) for finding in findings]


def test_what_is_installed_here_is_what_weft_asks_for():
    [finding] = machine.versions()
    assert finding.verdict == "ok"
    assert "flwr 1.41" in finding.says


def test_another_version_is_a_failure_that_says_which(monkeypatch):
    real = machine.version
    monkeypatch.setattr(machine, "version", lambda n: "1.39.0" if n == "flwr" else real(n))
    [finding] = machine.versions()
    assert finding.verdict == "fail"
    assert "flwr is 1.39.0, and not <1.42,>=1.41" in finding.says


def test_another_minor_of_flower_fails_and_another_weft_is_worth_a_word():
    told = {"flwr": "1.40.3", "weft": "7.0.0"}
    found = list(machine.same_versions("versions", "clinic-north", told))
    assert verdicts(found) == [("fail", "versions"), ("warn", "versions")]
    assert found[0].says.startswith("clinic-north has flwr 1.40.3, and here is 1.41")
    assert not list(machine.same_versions("versions", "x", {"flwr": "1.41.9", "weft": ""}))


@pytest.mark.parametrize(("free", "verdict"), [(100, "ok"), (5, "warn"), (0.5, "fail")])
def test_a_full_disk_is_found(monkeypatch, tmp_path, free, verdict):
    usage = SimpleNamespace(free=int(free * 2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    [finding] = machine.disks({"the state": tmp_path / "not" / "there"})
    assert finding.verdict == verdict
    assert f"{free:.1f} GiB are free for the state" in finding.says


def test_a_secret_that_others_may_read_is_found(tmp_path):
    kept, shown = tmp_path / "kept.key", tmp_path / "shown.key"
    for file, mode in ((kept, 0o600), (shown, 0o640)):
        file.touch()
        file.chmod(mode)
    [finding] = machine.secrets([kept, shown, tmp_path / "none"])
    assert finding.verdict == "fail"
    assert f"others may read {shown} (mode 0640)" in finding.says
    assert f"chmod 600 {shown}" in finding.do
    assert verdicts(machine.secrets([kept])) == [("ok", "secrets")]
    assert list(machine.secrets([])) == []


@pytest.mark.parametrize(
    ("devices", "cuda", "verdict"), [(0, None, "ok"), (2, None, "warn"), (2, "13.0", "ok")]
)
def test_a_gpu_without_cuda_is_found(monkeypatch, tmp_path, devices, cuda, verdict):
    (tmp_path / "torch").mkdir()
    facts = f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\n"
    (tmp_path / "torch" / "version.py").write_text(facts)
    spec = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: spec)
    found = [Path(f"/dev/nvidia{n}") for n in range(devices)]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(found))
    assert verdicts(machine.gpu()) == [(verdict, "gpu")]


def test_a_site_is_looked_at_without_a_database_or_torch(tmp_path):
    code = (
        "import sys; from orchestrator.deployment.doctor import at_site\n"
        f"from pathlib import Path; list(at_site(Path({str(tmp_path / 'none.yaml')!r})))\n"
        "print([n for n in ('torch', 'sqlalchemy', 'ray', 'flwr', 'storage') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
