"""Which engine measures a model's per-example gradients: taps where they know every layer.

It follows from the model's layers alone, so that the same config gives the same bits; whether what
an engine measures is true is found out where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from clients.hooks import hooked
from clients.samples import Engine, NoPerExampleGradient
from clients.taps import tappable, tapped


@contextmanager
def measuring(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[Engine]:
    """Measure inside; leave no trace in the model outside.

    Args:
        model: the whole task model, in train mode.
        params: all of its trainable parameters.

    Raises:
        NoPerExampleGradient: if the model mixes examples, no engine serves a layer, or the model's
            trainable parameters are not exactly ``params``.
    """
    _refuse_undeclared(model, params)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise NoPerExampleGradient(
                f"{name} is a batch norm, which mixes the examples of a batch; put it in eval mode"
            )
    with (tapped if _tappable(model) else hooked)(model, params) as engine:
        yield engine


def _refuse_undeclared(model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    given = {id(p) for p in params.values()}
    if given != trainable.keys():
        # Anything trainable that is not in params would be trained without clip and noise.
        extra = [name for key, name in trainable.items() if key not in given]
        missing = [name for name, p in params.items() if id(p) not in trainable]
        raise NoPerExampleGradient(
            f"the model's trainable parameters must be those given; only the model trains {extra}, "
            f"only given {missing}"
        )


def _tappable(model: nn.Module) -> bool:
    return all(tappable(m) for m in model.modules() if _trains(m))


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))
