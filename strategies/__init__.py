"""The server half of learning, and merging: pure functions over tensors.

Imports torch and the standard library, nothing else.
"""

from strategies.plugins import Family

STRATEGIES = Family("strategy", "strategies")
