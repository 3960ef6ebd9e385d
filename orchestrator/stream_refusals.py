"""What of a stream's file does not go together, said before its first task trains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch

from clients.adapters import ADAPTERS, Adapter
from clients.assignment import PluginChoice
from clients.regularizers import REGULARIZERS, Regularizer
from orchestrator.config import RunConfig
from orchestrator.policy import ANSWERS, LOWER_IS_BETTER
from orchestrator.stream_file import StreamFile
from strategies import STRATEGIES
from strategies.base import ClientSpec, Strategy
from strategies.merges import shares_rows

_A = "x.lora_A.weight"


def stream_problem(
    file: StreamFile, start: str, configs: Sequence[RunConfig], merge: PluginChoice | None
) -> str:
    """Return the key of a stream's file that does not go with the rest, and why; or empty.

    Args:
        file: the stream's.
        start: how a task starts from the one before.
        configs: of its runs, in order.
        merge: what makes one version of those of all tasks so far; None for nothing.
    """
    for key, problem in (
        ("router", _router_problem(file, start, configs[-1])),
        ("head", _head_problem(file, configs[-1])),
        ("method.merge", _merge_problem(merge, configs)),
    ):
        if problem:
            return f"{key}: {problem}"
    return ""


def strategy_of(config: RunConfig) -> Strategy:
    """Return the strategy of a run, with its options."""
    chosen = config.checked_plugins()["strategy"]
    strategy: Strategy = STRATEGIES.get(chosen.name).build(**chosen.options)
    return strategy


def _head_problem(file: StreamFile, config: RunConfig) -> str:
    """Return why a stream's head could not do what is asked of it, or empty."""
    tested = any(task.evaluate is not None for task in file.tasks)
    if tested and (config.head == "personal" or "personal" in strategy_of(config).capabilities):
        return (
            "a part of each version stays at the clients, so that none can be scored; leave "
            "evaluate out, or train without"
        )
    if config.head == "freeze" and any(task.labels for task in file.tasks):
        return (
            "with head: freeze the rows of labels that tasks bring would stay as they were drawn; "
            "use head: train, or declare the labels in the base alone"
        )
    return ""


def _router_problem(file: StreamFile, start: str, config: RunConfig) -> str:
    """Return why a router has nothing to choose from, or empty."""
    routed = [task.router is not None for task in file.tasks]
    if not any(routed):
        return ""
    metric = file.metric or config.metrics[0]
    if metric in LOWER_IS_BETTER:
        instead = " or ".join(ANSWERS) if config.task == "causal-lm" else config.metrics[0]
        return (
            f"each input is answered by one of several adapters, and answers have no {metric}, by "
            f"which this stream is measured; give metric: {instead}, or leave it out"
        )
    if start not in ("fresh", "isolated"):
        return (
            f"with start: {start} one adapter answers for all tasks, and there is none to choose; "
            "use method: isolated or fresh, or leave it out"
        )
    if not all(routed):
        lacking = next(task.name for task in file.tasks if task.router is None)
        return f"task {lacking!r} has none, so that nothing would be sent to it; give all or none"
    return ""


def _merge_problem(merge: PluginChoice | None, configs: Sequence[RunConfig]) -> str:
    """Return why what the tasks train cannot be merged so, or empty."""
    if merge is None or len(configs) < 2 or not shares_rows(merge.name, merge.options):
        return ""
    chooses = next((name for config in configs for name in _choosing_a(config)), None)
    if chooses is not None:
        return (
            f"{merge.name} (as set) merges adapters that share the row space of A, and {chooses} "
            "gives each task one of its own; merge with svd or cat, or leave it out"
        )
    if not any(_trains_a(config) for config in configs):
        return ""
    return (
        f"{merge.name} (as set) merges adapters that share the row space of A, and here every task "
        "trains its own; use strategy ffa-lora or fedsvd, which keep it, or merge with svd or cat"
    )


def _choosing_a(config: RunConfig) -> Iterator[str]:
    """Yield the regularizers that choose a task's A and keep it: hard O-LoRA, InfLoRA."""
    for one in config.checked_plugins()["regularizers"]:
        method: Regularizer = REGULARIZERS.get(one.name).build(**one.options)
        if re.fullmatch(method.freezes, _A):
            yield one.name


def _trains_a(config: RunConfig) -> bool:
    """Return whether clients train A, in a first round or a second one."""
    chosen, strategy = config.checked_plugins()["adapter"], strategy_of(config)
    adapter: Adapter = ADAPTERS.get(chosen.name).build(**chosen.options)
    if re.fullmatch(adapter.frozen, _A):
        return False
    sample = {_A: torch.eye(2), "x.lora_B.weight": torch.eye(2), "x.scaling": torch.tensor(1.0)}
    state = strategy.init(sample)
    sent = [
        strategy.broadcast(one, ClientSpec("anyone"))
        for one in (state, strategy.aggregate(state, []))
    ]
    return any(re.fullmatch(one.trainable, _A) for one in sent)
