"""Merges: ``f(adapters, weights, *, options) -> tensors``, pure, one file each.

Every merge takes the factored adapters of one base model and returns one factored adapter with the
same naming (``NAME.lora_A.weight``, ``NAME.lora_B.weight``, ``NAME.scaling``). Heads are merged by
the caller, which knows the tasks' labels. What a merge measures of its result is told with a
:class:`strategies.terms.Measured`.
"""

from strategies.plugins import Family

MERGES = Family("merge", "strategies.merges", context=("adapters", "weights"))
