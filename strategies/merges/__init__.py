"""Merges: ``f(adapters, weights, *, options) -> tensors``, pure, one file each.

Every merge takes the factored adapters of one base model and returns one factored adapter with the
same naming (``NAME.lora_A.weight``, ``NAME.lora_B.weight``, ``NAME.scaling``). Heads are merged by
the caller, which knows the tasks' labels. What a merge measures of its result is told with a
:class:`strategies.terms.Measured`.

Each module declares ``MEAN_OPTIONS``, the options at which copies of an adapter whose weights sum
to 1 merge into that adapter, and ``WEIGHTS``: ``"sums"`` where weights times c give the product
times c, ``"ratios"`` where they give the same product (for c > 0). The contract tests prove both.
"""

from strategies.plugins import Family

MERGES = Family("merge", "strategies.merges", context=("adapters", "weights"))
