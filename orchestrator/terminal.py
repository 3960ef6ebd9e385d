"""The terminal: consoles, options that many commands share, and how their texts are read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

_WIDTH = None if sys.stdout.isatty() else 160  # a pipe has no width of its own

out = Console(soft_wrap=True, width=_WIDTH)
err = Console(stderr=True, soft_wrap=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[list[str], typer.Option("--set", help="Override: path.to.key=value.")]
AllowedHosts = Annotated[
    list[str],
    typer.Option("--allowed-host", metavar="NAME", help="Answer under this name, too; repeat it."),
]
ConnectionsOption = Annotated[
    int, typer.Option("--connections", min=1, help="That are open at once.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Where the base model is, if it moved.")
]
Fields = Annotated[
    str, typer.Option("--fields", help="Column names of your own: text=note,label=dx.")
]


LogFormat = Annotated[
    Literal["text", "json"] | None,
    typer.Option("--log-format", envvar="WEFT_LOG_FORMAT", help="Log each event to stderr."),
]
LogFile = Annotated[
    Path | None, typer.Option("--log-file", envvar="WEFT_LOG_FILE", help="Log to a file instead.")
]
MetricsPort = Annotated[
    int | None,
    typer.Option("--metrics-port", envvar="WEFT_METRICS_PORT", help="Serve Prometheus metrics."),
]
MetricsFile = Annotated[
    Path | None,
    typer.Option("--metrics-file", envvar="WEFT_METRICS_FILE", help="Write them to a textfile."),
]


def print_json(document: Any) -> None:
    """Print ``document`` as JSON."""
    sys.stdout.write(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def workspace_here() -> Any:
    """Return the workspace that the environment names."""
    from orchestrator.workspace import open_workspace

    return open_workspace()


def pairs(texts: list[str], option: str) -> dict[str, str]:
    """Return ``key=value`` texts as a mapping.

    Raises:
        BadConfig: if one is not of this form.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            from orchestrator.config import BadConfig  # most commands read no config

            raise BadConfig(f"{option} takes key=value, got {text!r}")
        found[key] = value
    return found


def limits(texts: list[str]) -> dict[str, int]:
    """Return ``key=value:count`` texts as a mapping from label to count.

    Raises:
        BadConfig: if one is not of this form.
    """
    from orchestrator.config import BadConfig

    found = {}
    for text in texts:
        label, _, count = text.rpartition(":")
        if not count.isdecimal() or not all(label.partition("=")):
            raise BadConfig(f"--limit takes key=value:count such as gpu=a100:2, got {text!r}")
        found[label] = int(count)
    return found


def yaml_value(text: str, option: str) -> Any:
    """Return an option's text read as YAML, as ``--set`` reads it.

    Raises:
        BadConfig: if it is not YAML.
    """
    import yaml

    from orchestrator.config import BadConfig

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise BadConfig(f"{option}: the value {text!r} is not YAML") from None


def numbers(text: str) -> list[float]:
    """Return comma-separated numbers.

    Raises:
        BadConfig: if one is no number.
    """
    from orchestrator.config import BadConfig

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadConfig(f"--weights takes numbers such as 1,0.5, got {text!r}") from None
