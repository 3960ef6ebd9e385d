"""A checkpoint inside an assignment, kept at the client: what a long round has done survives it.

All that changes while an assignment trains is in it: trained parameters, the optimizer's state, the
regularizers' memory, the state of torch's generators (an adapter's dropout draws from them) and the
number of steps done. The order of the data follows from the assignment's seed and is counted off
again. An assignment that goes on from it ends with the bytes of one that was never interrupted.

With DP it keeps what DP promises. Noise and Poisson sample of a step are functions of the client's
key, the assignment's digest and the step's number. A checkpoint is bound to that digest and to the
data's fingerprint, so a step that is done again after a crash is the same step: same parameters,
same examples, same noise, hence the same release. Noise is never added to two different gradients
of which both are seen, because nothing that an interrupted attempt made has left the client: one
update leaves for one digest, at the end. On other data, or by other libraries, the work begins
anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from clients.site import Site


class NotPlain(ValueError):
    """A training state holds what can be written neither as a tensor nor as JSON."""


@dataclass(slots=True)
class Checkpoints:
    """The checkpoint of one assignment at one client.

    Args:
        site: where it is kept.
        run: the run's id.
        client: whose it is.
        digest: the assignment's.
        fingerprint: of the data; a checkpoint made on other data is not used.
        every_s: seconds between checkpoints, 0 for one after every step.
    """

    site: Site
    run: str
    client: str
    digest: str
    fingerprint: str
    every_s: float
    _last: float = field(default_factory=time.monotonic, init=False)

    def found(self) -> Any:
        """Return the state that was kept, or None where there is none that fits."""
        data = self.site.checkpoint(self.run, self.client, self.digest)
        if data is None:
            return None
        try:
            kept = unpack(data)
            return kept["state"] if kept["bound"] == self._bound() else None
        except (SafetensorError, KeyError, TypeError, ValueError):
            return None  # of another version of weft: the work begins anew

    def offer(self, state: Callable[[], Any]) -> None:
        """Keep the state if it is time to; it replaces the one before.

        Raises:
            NotPlain: if the state is not plain.
        """
        if time.monotonic() - self._last >= self.every_s:
            data = pack({"bound": self._bound(), "state": state()})
            self.site.store_checkpoint(self.run, self.client, self.digest, data)
            self._last = time.monotonic()

    def _bound(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint, "torch": str(torch.__version__), "weft": _weft()}


def pack(state: Any) -> bytes:
    """Return nested dicts, lists and tuples of tensors and plain values as safetensors bytes.

    Raises:
        NotPlain: naming what is neither.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _skeleton(state, tensors, "state")
    data: bytes = save(tensors, metadata={"skeleton": json.dumps(skeleton)})
    return data


def unpack(data: bytes) -> Any:
    """Return the state that :func:`pack` was given, each tensor on its device.

    Raises:
        SafetensorError, KeyError, ValueError: if the bytes are something else.
    """
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length])["__metadata__"]["skeleton"]
    return _filled(json.loads(text), load(data))


def generators(device: str) -> dict[str, Tensor]:
    """Return the state of torch's global generators that training on ``device`` draws from."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.startswith("cuda") else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_generators(states: dict[str, Tensor], device: str) -> None:
    """Put torch's global generators into the states that :func:`generators` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that an optimizer carries from step to step; its parameters by their order."""
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    return {
        "state": [dict(optimizer.state.get(p, {})) for p in parameters],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in groups],
    }


def set_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer what :func:`optimizer_state` returned, in the dtypes that it had.

    Torch's own ``load_state_dict`` would cast to the parameters' dtype.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, own in zip(parameters, state["state"], strict=True):
        if own:
            optimizer.state[parameter] = own
    for group, values in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(values)


def _skeleton(value: Any, tensors: dict[str, Tensor], path: str) -> list[Any]:
    """Return ``value`` as JSON, in pairs of a kind and its content; tensors go into ``tensors``."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"  # a name once, also where two places hold one tensor
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return ["tensor", [name, str(value.device)]]
    if isinstance(value, dict):
        items = [
            [_skeleton(k, tensors, path), _skeleton(v, tensors, f"{path}.{k}")]
            for k, v in value.items()
        ]
        return ["dict", items]
    if isinstance(value, (list, tuple)):
        parts = [_skeleton(v, tensors, f"{path}[{i}]") for i, v in enumerate(value)]
        return ["tuple" if isinstance(value, tuple) else "list", parts]
    if value is None or type(value) in (bool, int, float, str):
        return ["value", value]
    raise NotPlain(
        f"{path} is a {type(value).__name__}, and a checkpoint holds tensors, numbers and text "
        "alone; leave backend.checkpoint_s out for this optimizer"
    )


def _filled(skeleton: list[Any], tensors: dict[str, Tensor]) -> Any:
    kind, content = skeleton
    if kind == "tensor":
        name, device = content
        return tensors[name].to(device)
    if kind == "dict":
        return {_filled(k, tensors): _filled(v, tensors) for k, v in content}
    if kind in ("list", "tuple"):
        parts = [_filled(part, tensors) for part in content]
        return tuple(parts) if kind == "tuple" else parts
    if kind != "value":
        raise ValueError(f"a checkpoint has no {kind!r}")
    return content


def _weft() -> str:
    return version("weft")
