"""The plug-ins that there are, as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from orchestrator.config import FAMILIES
from strategies.plugins import UnknownPlugin


def plugin_table(kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield every plug-in of one kind, or of all, as JSON.

    Raises:
        UnknownPlugin: if there is no such kind.
    """
    if kind is not None and kind not in FAMILIES:
        raise UnknownPlugin(f"no kind of plug-in is called {kind!r} ({', '.join(FAMILIES)})")
    for family_kind, family in FAMILIES.items():
        if kind in (None, family_kind):
            for name in family.names():
                plugin = family.get(name)
                yield {
                    "kind": family_kind,
                    "name": name,
                    "summary": plugin.summary,
                    "source": plugin.source,
                    "options": {
                        o.name: {
                            "type": o.describe_type(),
                            **({} if o.required else {"default": o.default}),
                        }
                        for o in plugin.options.values()
                    },
                }
