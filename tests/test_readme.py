"""What the documentation tells a reader to type works.

In README.md and docs/, by the info string of a fenced block:

- ``sh`` is run by bash, every block of a document in one shell and one empty folder;
- ``yaml`` whose first line is ``# file: NAME`` is written to NAME there, in its turn;
- ``console`` is for commands that only make sense elsewhere (``git clone``, ``make``), and is not
  run; the ``weft`` commands in it must exist all the same;
- anything else is left alone.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = Path(sysconfig.get_path("scripts"))
LIMIT_S = 600

FENCE = re.compile(r"^(?P<indent> *)(?P<mark>`{3,}|~{3,}) *(?P<info>[^`]*)$")
ELSEWHERE = re.compile(r"\b(make|git clone|pip install|docker|sudo)\b")
VERB = re.compile(
    r"(?:^|[|;&(`]\s*|\$\s+)(?:\w+=\S*\s+)*(?:\S+/)?weft\s+([a-z][a-z-]*)", re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced code block of a document."""

    line: int
    kind: str
    text: str

    @property
    def file(self) -> str | None:
        """The name under which a reader is told to save it, if any."""
        named = re.match(r"# file: (\S+)\n", self.text) if self.kind == "yaml" else None
        return named[1] if named else None


def blocks(document: str) -> Iterator[Block]:
    """Yield the fenced code blocks of a Markdown document, without their indentation."""
    opening: re.Match[str] | None = None
    start, inside = 0, []
    for number, line in enumerate(document.splitlines(), 1):
        fence = FENCE.match(line)
        if opening is None:
            if fence:
                opening, start, inside = fence, number, []
        elif fence and not fence["info"].strip() and fence["mark"].startswith(opening["mark"]):
            kind = opening["info"].split()
            yield Block(start, kind[0] if kind else "", "".join(inside))
            opening = None
        else:
            inside.append(line.removeprefix(opening["indent"]) + "\n")
    if opening is not None:
        raise ValueError(f"the code block that line {start} opens is never closed")


def script(document: str) -> str:
    """Return one bash script that does all that a document tells its reader to do."""
    # what a document leaves running would hold its output open
    parts = ["set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n"]
    for block in blocks(document):
        if block.file is not None:
            name = shlex.quote(block.file)
            parts.append(f'mkdir -p "$(dirname {name})"\n')
            parts.append(f"cat > {name} <<'END-OF-BLOCK'\n{block.text}END-OF-BLOCK\n")
        elif block.kind == "sh":
            parts.append(f"echo '== line {block.line}' >&2\n{block.text}")
    return "".join(parts)


def environment(*first: Path) -> dict[str, str]:
    """Return a reader's environment, offline, with the scripts of these folders before others."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("WEFT_")}
    path = os.pathsep.join([*map(str, first), str(SCRIPTS), os.environ["PATH"]])
    return inherited | {"PATH": path, "HF_HUB_OFFLINE": "1", "TERM": "dumb", "COLUMNS": "120"}


@pytest.fixture(scope="module")
def forked_weft() -> Iterator[Path]:
    """Folder of a ``weft`` that is quick to start: it asks a process that has imported all."""
    # not tmp_path: a socket's path may have 107 characters only
    with (
        tempfile.TemporaryDirectory(prefix="weft-docs-") as folder,
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "forked_weft.py"), folder],
            env=environment() | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        yield Path(folder)


def run(document: str, folder: Path, *first: Path) -> subprocess.CompletedProcess[str]:
    """Follow a document in ``folder``; the ``weft`` is the installed one, or one of ``first``."""
    return subprocess.run(
        ["bash", "-c", script(document)],
        cwd=folder,
        env=environment(*first),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def verbs(document: str) -> set[str]:
    """Return every VERB of a ``weft VERB`` in a document's shell blocks and inline code."""
    shown = [block.text for block in blocks(document) if block.kind in ("sh", "console")]
    prose = re.sub(r"^ *(`{3,}).*?^ *\1", "", document, flags=re.MULTILINE | re.DOTALL)
    shown += [f"`{code}" for code in re.findall(r"`([^`\n]+)`", prose)]
    return {verb for text in shown for verb in VERB.findall(text)}


def commands(listing: str) -> set[str]:
    """Return the commands that ``weft --help`` lists."""
    return set(re.findall(r"^[│|\s]{1,6}([a-z][a-z-]*)\s{2,}", listing, re.MULTILINE))


def misplaced(shell: Iterable[Block]) -> list[str]:
    """Return the lines of ``sh`` blocks that only make sense elsewhere."""
    lines = [line for block in shell if block.kind == "sh" for line in block.text.splitlines()]
    return [line for line in lines if ELSEWHERE.search(line.partition("#")[0])]


def names(paths: Iterable[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.fixture(scope="module")
def weft_help() -> str:
    done = subprocess.run(
        [SCRIPTS / "weft", "--help"],
        env={**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def timed(paths: list[Path]) -> list[Any]:
    """Return the documents as parameters; those whose commands take a minute are slow tests."""
    long = {
        "running.md",
        "observability.md",
        "store.md",
        "exchange.md",
        "sweeps.md",
        "continual.md",
        "serving.md",
        "deploying.md",
        "deploy.md",
    }
    return [pytest.param(p, marks=[pytest.mark.slow] * (p.name in long)) for p in paths]


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("path", timed(DOCUMENTS), ids=names(DOCUMENTS))
def test_the_commands_of_a_document_run(path: Path, tmp_path: Path, forked_weft: Path) -> None:
    document = path.read_text("utf-8")
    if not any(block.kind == "sh" for block in blocks(document)):
        pytest.skip(f"{path.name} has no sh blocks")
    done = run(document, tmp_path, forked_weft)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_commands_that_cannot_run_here_are_console_blocks(path: Path) -> None:
    assert misplaced(blocks(path.read_text("utf-8"))) == []


def test_the_readme_shows_commands_that_run() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert any(b.kind == "sh" and VERB.search(b.text) for b in blocks(readme))


def test_every_weft_command_that_is_shown_exists(weft_help: str) -> None:
    shown = {verb for path in DOCUMENTS for verb in verbs(path.read_text("utf-8"))}
    assert shown - commands(weft_help) == set()


def test_every_weft_command_of_the_compose_file_exists(weft_help: str) -> None:
    compose = (ROOT / "docker-compose.yml").read_text("utf-8")
    shown = set(re.findall(r"(?:\[|coordinator )weft,? ([a-z-]+)", compose))
    assert shown
    assert shown - commands(weft_help) == set()


EXAMPLE = """
Get it with `weft frobnicate` or `weft show REF`:

```console
$ git clone … && cd weft && make demo
$ WEFT_HOME=/tmp/x .venv/bin/weft launch run.yaml | tee log
```

```yaml
# file: conf/run.yaml
name: it's "quoted" $HOME
```

```yaml
not: a file
```

1. Then

   ```sh
   greeting=hello
   cat conf/run.yaml  # make sure
   ```

````text
```sh
false
```
````

```sh
echo "$greeting again"
```
"""


def test_blocks_are_read_with_their_kind_and_line() -> None:
    found = [(b.line, b.kind, b.file) for b in blocks(EXAMPLE)]
    assert found == [
        (4, "console", None),
        (9, "yaml", "conf/run.yaml"),
        (14, "yaml", None),
        (20, "sh", None),
        (25, "text", None),
        (31, "sh", None),
    ]


def test_a_document_is_followed_in_one_shell_and_in_order(tmp_path: Path) -> None:
    done = run(EXAMPLE, tmp_path)
    assert done.stdout == '# file: conf/run.yaml\nname: it\'s "quoted" $HOME\nhello again\n'
    assert done.returncode == 0


def test_a_command_that_fails_fails_the_document(tmp_path: Path) -> None:
    done = run(EXAMPLE.replace("greeting=hello", "false | cat"), tmp_path)
    assert done.returncode != 0
    assert "== line 20" in done.stderr
    assert "again" not in done.stdout


def test_a_forked_command_has_its_own_folder_environment_and_exit_code(
    tmp_path: Path, forked_weft: Path
) -> None:
    document = """```sh
mkdir inner && cd inner
WEFT_HOME=there weft runs --json | cat
test -d there
weft show nothing && exit 1 || test $? -eq 2
weft show nothing
```"""
    done = run(document, tmp_path, forked_weft)
    assert json.loads(done.stdout) == []
    assert done.stderr.count("error: no version is called 'nothing'") == 2
    assert done.returncode == 2


def test_a_document_sees_no_home_of_somebody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_HOME", "/elsewhere")
    assert run("```sh\necho ${WEFT_HOME-none}\n```\n", tmp_path).stdout == "none\n"


def test_a_block_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 1 opens is never closed"):
        list(blocks("```sh\nweft runs\n"))


def test_commands_are_found_in_blocks_and_in_prose() -> None:
    assert verbs(EXAMPLE) == {"frobnicate", "show", "launch"}


def test_a_misplaced_command_is_found() -> None:
    document = "```sh\nweft runs  # not make\nmake demo\n```\n```console\nmake test\n```\n"
    assert misplaced(blocks(document)) == ["make demo"]


@pytest.mark.parametrize(
    "listing",
    [
        "╭─ Commands ────╮\n│ run      Launch a run.  │\n│ data     Look at data.  │\n╰──╯",
        "Commands:\n  run   Launch a run.\n  data  Look at data.\n",
    ],
)
def test_commands_are_read_from_the_help(listing: str) -> None:
    assert commands(f"Usage: weft [OPTIONS]\n\n  --help  Show this.\n{listing}") == {"run", "data"}
