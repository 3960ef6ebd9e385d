"""Merges: ``f(adapters, weights, *, options) -> tensors``, pure, one file each.

Every merge takes the factored adapters of one base model and returns one factored adapter with the
same naming (``NAME.lora_A.weight``, ``NAME.lora_B.weight``, ``NAME.scaling``). Heads are merged by
the caller, which knows the tasks' labels. What a merge measures of its result is told with a
:class:`strategies.terms.Measured`.

Each module declares ``MEAN_OPTIONS``, the options at which copies of an adapter whose weights sum
to 1 merge into that adapter, and ``WEIGHTS``: ``"sums"`` where weights times c give the product
times c, ``"ratios"`` where they give the same product (for c > 0). The contract tests prove both.
One that merges only adapters whose A's have one row space declares ``ONE_ROW_SPACE`` as well: the
options at which that is so, empty for any.
"""

import sys
from collections.abc import Mapping
from typing import Any

from strategies.plugins import Family

MERGES = Family("merge", "strategies.merges", context=("adapters", "weights"))


def shares_rows(name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a merge, as set, needs adapters whose A's have one row space.

    >>> shares_rows("linear", {}), shares_rows("lori", {"form": "cat"}), shares_rows("svd", {})
    (True, False, False)
    """
    module = sys.modules[MERGES.get(name).factory.__module__]
    needs: Mapping[str, Any] | None = getattr(module, "ONE_ROW_SPACE", None)
    return needs is not None and needs.items() <= options.items()
