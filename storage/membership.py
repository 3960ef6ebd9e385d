"""Thousands of values in one statement."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Connection, String, any_, cast, func, literal, select
from sqlalchemy.dialects import postgresql


def is_among(
    connection: Connection, column: ColumnElement[Any], values: Collection[int] | Collection[str]
) -> ColumnElement[bool]:
    """Return whether a column is one of any number of values, which go as one parameter.

    A parameter each would be limited in number, and with thousands takes longer than the query.
    """
    if len(values) == 1:
        [only] = values
        return column == only
    listed = literal(json.dumps([*values]), String)
    if connection.dialect.name != "postgresql":
        return column.in_(select(func.json_each(listed).table_valued("value").c.value))
    each = func.json_array_elements_text(cast(listed, postgresql.JSON)).table_valued("value")
    # One scan of an index with an array costs half of a join with its elements.
    elements = select(cast(each.c.value, column.type)).scalar_subquery()
    return column == any_(func.array(elements))
