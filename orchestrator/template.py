"""The commented run.yaml that ``weft init`` writes."""

from __future__ import annotations

from pathlib import Path

from clients.assignment import Task

TEMPLATE = """\
# One federated run. Check it with: weft check run.yaml     Launch it with: weft run run.yaml
# Any value can be overridden: weft run run.yaml --set rounds=20 --set adapter.r=16

name: task-1                        # the adapter's name in the store
model: builtin:minilm               # a Hugging Face id, a local folder, or builtin:minilm
task: classification                # token-classification, or causal-lm (without labels)
labels: [int, float, bool, str, array, callable, sequence, mapping]   # the declared label set
# task_labels: [int, float]         # the labels that this run learns, if not all

adapter: {name: lora, r: 8}         # weft plugins adapter
strategy: fedsvd                    # weft plugins strategy
optimizer: {name: adamw, lr: 0.002} # weft plugins optimizer
# regularizers: [{name: proximal, mu: 0.01}]
head: train                         # train, freeze or personal (kept at the client)

rounds: 4
batch_size: 64                      # the expected batch size under DP
steps: 10                           # optimizer steps a client and round; or epochs, without DP
# cohort: 3                         # clients a round, or a share of them; all by default
# quorum: 0.8                       # with how many updates a round makes do at its deadline
# deadline_s: 600                   # seconds a round
# late: drop                        # or keep (weighed by age; with ffa-lora or fedavg)
# stop: {metric: accuracy, patience: 3}    # end early; select: best names the best version

privacy:                            # leave out to train without differential privacy
  epsilon: 8                        # what this run may spend of each client's privacy
  delta: 1.0e-5
  max_grad_norm: 1.0

clients:                            # one of: simulate, select, names
  simulate: {data: "builtin:parameter-types?split=train", by: column, column: client}
# clients: {select: {ward: north}}  # registered clients by label; {} is all of them
# clients: {names: [clinic-7]}      # registered clients by name

evaluate: {data: "builtin:parameter-types?split=test", every: 2}
# loggers: [tensorboard]            # weft plugins logger
# notify: {url_env: WEFT_WEBHOOK}   # posts when it fails, is done, or nears a privacy budget

# start_from: task-0                # another version of the store
# start: stack                      # continue, stack or fresh
# library: [task-a, task-b]         # adapters to start from (with eigenlorax or lori)

seed: 0
backend: ray                        # or inline: one process
"""


_INSTEAD: dict[Task, dict[str, str]] = {
    "classification": {},
    "token-classification": {
        "classification                # token-": "token-classification          # ",
        "[int, float, bool, str, array, callable, sequence, mapping]   # the declared label set": (
            "[O, B-PARAM, I-PARAM, B-VALUE, I-VALUE, B-CODE, I-CODE]   # the declared tags"
        ),
        "[int, float]         #": "[O, B-VALUE, I-VALUE]   #",
        "builtin:parameter-types": "builtin:code-mentions",
        "{metric: accuracy,": "{metric: entity_f1,",
    },
}


class FileTaken(FileExistsError):
    """There is a file already."""


def template(task: Task = "classification") -> str:
    """Return the template of a run for ``task``.

    Raises:
        ValueError: if there is none for it.
    """
    if task not in _INSTEAD:
        raise ValueError(
            f"there is no template for {task}, because no text to generate comes with weft; the "
            "tasks with one are " + " and ".join(_INSTEAD)
        )
    text = TEMPLATE
    for words, others in _INSTEAD[task].items():
        text = text.replace(words, others)
    return text


def write_template(path: Path, force: bool = False, task: Task = "classification") -> None:
    """Write the template.

    Raises:
        FileTaken: if there is a file and ``force`` is not set.
        ValueError: if there is none for ``task``.
    """
    if path.exists() and not force:
        raise FileTaken(f"{path} exists; --force overwrites it")
    path.write_text(template(task), "utf-8")
