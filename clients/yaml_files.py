"""YAML files that people write: a mapping of options each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class BadFile(ValueError):
    """A file that is not there, or holds no mapping; the message names it."""


def mapping_in(file: Path, hint: str, example: str) -> dict[str, Any]:
    """Return the mapping in a YAML file, unchecked.

    Args:
        file: where it is.
        hint: how to come by such a one, for the message.
        example: one of its options, likewise.

    Raises:
        BadFile: if there is none.
    """
    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except FileNotFoundError:
        raise BadFile(f"there is no file {file}; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{file} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise BadFile(f"{file} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise BadFile(f"{file} must hold a mapping of options, such as {example!r}")
    return document
