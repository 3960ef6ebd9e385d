"""The engines that measure a model's per-example gradients.

There are four, the fastest first. An adapter declares the first that is exact for it, and its
contract test proves that; a run begins with it, and goes on to the next where the model in hand (a
quantised layer, gradient checkpointing) makes that one fail: see :mod:`clients.verification`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from clients.alone import alone
from clients.hooks import hooked
from clients.samples import Engine, NoPerExampleGradient
from clients.taps import tapped
from clients.vmapped import vmapped

ENGINES: Mapping[
    str, Callable[[nn.Module, Mapping[str, nn.Parameter]], AbstractContextManager[Engine]]
] = {"taps": tapped, "hooks": hooked, "vmap": vmapped, "alone": alone}
"""The engines by name, the fastest first; an adapter declares ``dp-NAME``."""


def engines_of(capabilities: Collection[str]) -> list[str]:
    """Return the engines for an adapter, in the order in which to try them; none without any.

    Args:
        capabilities: see :attr:`clients.adapters.Adapter.capabilities`.
    """
    names = list(ENGINES)
    declared = [index for index, name in enumerate(names) if f"dp-{name}" in capabilities]
    return names[min(declared) :] if declared else []


@contextmanager
def measuring(
    model: nn.Module, params: Mapping[str, nn.Parameter], engine: str
) -> Iterator[Engine]:
    """Measure inside; leave no trace in the model outside.

    Args:
        model: the whole task model, in train mode.
        params: all of its trainable parameters.
        engine: which of :data:`ENGINES`.

    Raises:
        NoPerExampleGradient: if the model mixes examples, the engine does not serve a layer, or
            the model's trainable parameters are not exactly ``params``.
    """
    _refuse_undeclared(model, params)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise NoPerExampleGradient(
                f"{name} is a batch norm, which mixes the examples of a batch; put it in eval mode"
            )
        if engine != "alone" and _pools_outliers(module):
            raise NoPerExampleGradient(
                f"{name} is quantised to int8, and on a GPU how it computes a feature depends on "
                "whether any example of a batch is large in it; examples must be alone"
            )
    with ENGINES[engine](model, params) as found:
        yield found


def _pools_outliers(module: nn.Module) -> bool:
    """Return whether a layer is bitsandbytes' int8, where it looks for outliers in whole batches.

    It does so by ``LLM.int8``'s threshold (2208.07339), and not on a CPU.
    """
    threshold = getattr(getattr(module, "state", None), "threshold", 0)
    return threshold > 0 and any(not p.is_cpu for p in module.parameters(recurse=False))


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
