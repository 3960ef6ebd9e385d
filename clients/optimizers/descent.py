"""What an optimizer may declare of its steps."""

from __future__ import annotations

import torch


class PlainDescent(torch.optim.SGD):
    """Declares that every step moves a parameter by ``lr`` times its gradient, and nothing else.

    What a round moves is then ``lr`` times the sum of its gradients, for all parameters alike.
    """
