"""Data sets that every installation of weft already has: nothing downloaded, nothing private.

A data set is a module with ``LABELS`` (its label set, in index order), ``OPTIONS`` (the URI's query
options, each with the values it takes) and ``rows(**options)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from clients.builtin import code_mentions, parameter_types

DATA_SETS: Mapping[str, ModuleType] = {
    "code-mentions": code_mentions,
    "parameter-types": parameter_types,
}
