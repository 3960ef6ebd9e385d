"""One distribution, exact pins, and commands that work on a machine with nothing but Python."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, distributions, entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"orchestrator", "clients", "strategies", "storage"}
TOP_LEVEL = PACKAGES | {
    ".ci",
    ".gitignore",
    "Makefile",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "docker-compose.yml",
    "docs",
    "pyproject.toml",
    "tests",
}
BUILD = {"pip", "setuptools", "wheel"}
PIN = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]*)==(?P<version>[0-9][0-9a-z.]*)")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def requirements(project: dict[str, Any]) -> list[Requirement]:
    """Everything that pyproject.toml asks for, in any extra."""
    extras = project["optional-dependencies"].values()
    return [Requirement(r) for group in (project["dependencies"], *extras) for r in group]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    text = (ROOT / "constraints.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def pins(lines: list[str]) -> dict[str, Version]:
    found = {m["name"]: Version(m["version"]) for m in map(PIN.fullmatch, lines) if m}
    assert len(found) == len(lines)
    return found


def closure(requirements: list[Requirement]) -> dict[str, Version]:
    """Return all that is installed here to satisfy ``requirements``, with versions."""
    found: dict[str, Version] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(r, "") for r in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed here
        found[name] = Version(Version(installed.version).public)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(r), wanted) for r in installed.requires or ()]
    return found


def run(command: list[str | Path], folder: Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "MAKEFLAGS": "", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_the_top_level_is_fixed() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a Git checkout: what is ignored cannot be told from what is not")
    listing = [git, "ls-files", "--cached", "--others", "--exclude-standard"]
    status, output = run(listing, ROOT)
    assert status == 0
    files = [line for line in output.splitlines() if (ROOT / line).exists()]
    assert {line.partition("/")[0] for line in files} - TOP_LEVEL == set()


def test_the_parts_of_the_top_level_exist() -> None:
    assert {name for name in TOP_LEVEL if not (ROOT / name).exists()} == set()


def test_constraints_are_exact_pins_in_order(lines: list[str]) -> None:
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names), key=lambda name: f"{name}=")


def test_every_requirement_admits_its_pin(
    requirements: list[Requirement], pins: dict[str, Version]
) -> None:
    refused = [str(r) for r in requirements if pins[canonicalize_name(r.name)] not in r.specifier]
    assert refused == []


def test_everything_that_weft_needs_is_pinned(
    requirements: list[Requirement], pins: dict[str, Version]
) -> None:
    assert set(closure(requirements)) - set(pins) == set()


def test_what_is_installed_is_what_is_pinned(
    requirements: list[Requirement], pins: dict[str, Version]
) -> None:
    installed = closure(requirements)
    other = {n: (str(v), str(pins[n])) for n, v in installed.items() if n in pins and v != pins[n]}
    assert other == {}


def test_no_pin_is_of_something_that_nothing_needs(
    requirements: list[Requirement], pins: dict[str, Version]
) -> None:
    # what is not installed (CUDA's parts, an unused extra) cannot be told from what is not needed
    present = {canonicalize_name(d.metadata["Name"]) for d in distributions()}
    assert (set(pins) & present) - set(closure(requirements)) - BUILD == set()


def test_the_package_of_the_demo_model_is_the_one_the_makefile_installs(
    project: dict[str, Any],
) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    model = re.search(r"^DEMO_MODEL := (\S+)$", makefile, re.MULTILINE)
    assert model
    assert project["optional-dependencies"]["demo"] == [model[1]]
    assert re.search(r"^DEMO_MODEL_HASH := sha256:[0-9a-f]{64}$", makefile, re.MULTILINE)
    assert "--no-deps --require-hashes" in makefile


def test_the_command_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="weft")
    assert script.value == "orchestrator.cli:main"
    assert callable(script.load())


def test_the_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / "weft" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "weft")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(tmp_path / "weft")]
    status, output = run([*command], tmp_path)
    assert status == 0, output
    (wheel,) = tmp_path.glob("weft-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = {
        path.relative_to(tmp_path / "weft").as_posix()
        for package in PACKAGES
        for path in (tmp_path / "weft" / package).rglob("*")
        if path.is_file()
    }
    assert files - packed == set()
    assert {name.partition("/")[0] for name in packed if ".dist-info" not in name} == PACKAGES


@pytest.fixture
def empty_tree(tmp_path: Path) -> Path:
    """The Makefile in a folder of its own, where making ``.venv`` would be noticed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    return tmp_path


def fake_python(folder: Path, body: str) -> Path:
    """Write a program that answers as a Python does."""
    program = folder / "fake-python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return program


def test_an_old_python_is_refused_with_a_sentence(empty_tree: Path) -> None:
    old = fake_python(empty_tree, '[ "$1" = -V ] && echo "Python 3.9.2" && exit 0; exit 1')
    status, output = run(["make", "demo", f"PYTHON={old}"], empty_tree)
    assert status != 0
    assert f"weft needs Python 3.11 or newer, and {old} is Python 3.9.2;" in output
    assert not (empty_tree / ".venv").exists()


def test_a_missing_python_is_refused_with_a_sentence(empty_tree: Path) -> None:
    status, output = run(["make", "test", "PYTHON=/no/python"], empty_tree)
    assert status != 0
    assert "weft needs Python 3.11 or newer, and /no/python is missing; install one" in output


def test_the_oldest_python_of_the_makefile_is_that_of_the_project(project: dict[str, Any]) -> None:
    checked = re.search(r"version_info < \((\d+), (\d+)\)", (ROOT / "Makefile").read_text("utf-8"))
    assert checked
    assert project["requires-python"] == f">={checked[1]}.{checked[2]}"


def recording_tree(tree: Path) -> Path:
    """Give ``tree`` an environment whose programs write what they were asked to do to a log."""
    programs = tree / ".venv" / "bin"
    programs.mkdir(parents=True)
    log = tree / "log"
    for name in ("python", "pip", "weft"):
        (programs / name).write_text(f'#!/bin/sh\n# {programs}/python\necho "{name} $*" >>{log}\n')
        (programs / name).chmod(0o755)
    return log


def test_a_second_call_installs_nothing(empty_tree: Path) -> None:
    log = recording_tree(empty_tree)
    assert run(["make", "demo"], empty_tree)[0] == 0
    first = log.read_text().splitlines()
    installs = [line for line in first if "install" in line]
    assert [line.split()[-1] for line in installs] == ["wheel", "torch", ".[ray]", "/dev/stdin"]
    assert first[-1] == "weft demo"
    log.unlink()
    assert run(["make", "demo", "DEMO_ARGS=--no-dp"], empty_tree)[0] == 0
    assert log.read_text() == "weft demo --no-dp\n"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_dependency_is_installed(empty_tree: Path, name: str) -> None:
    log = recording_tree(empty_tree)
    run(["make", "demo"], empty_tree)
    log.unlink()
    later = (empty_tree / name).stat().st_mtime + 3600
    os.utime(empty_tree / name, (later, later))
    assert run(["make", "demo"], empty_tree)[0] == 0
    assert "install" in log.read_text()


def test_an_environment_that_was_made_elsewhere_is_replaced(empty_tree: Path) -> None:
    recording_tree(empty_tree)
    elsewhere = empty_tree / "copy"
    shutil.copytree(empty_tree, elsewhere, ignore=shutil.ignore_patterns("copy"))
    new = fake_python(elsewhere, f'[ "$2" = venv ] && echo "$*" >>{elsewhere}/made; exit 0')
    run(["make", "demo", f"PYTHON={new}"], elsewhere)
    assert (elsewhere / "made").read_text() == "-m venv --clear .venv\n"


def test_the_checks_script_is_executable_and_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert run(["bash", "-n", script], ROOT) == (0, "")


def test_the_limits_of_the_checks_add_up_to_less_than_45_minutes() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    limits = [
        int(n) for n in re.findall(r"^(?:stage|tests|marked) \w+ (\d+)", script, re.MULTILINE)
    ]
    assert len(limits) >= 7
    assert sum(limits) < 45 * 60
