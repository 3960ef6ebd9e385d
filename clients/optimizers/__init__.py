"""Optimizers: ``f(params, lr, **options) -> torch.optim.Optimizer``, one file each."""

from strategies.plugins import Family

OPTIMIZERS = Family("optimizer", "clients.optimizers", context=("params",))
