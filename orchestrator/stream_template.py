"""The commented stream.yaml that ``weft stream init`` writes."""

from __future__ import annotations

from pathlib import Path

from orchestrator.template import FileTaken

STREAM_TEMPLATE = """\
# Tasks that arrive one after the other, each a run that goes on from the version before.
# What they would spend of people's privacy: weft stream plan stream.yaml
# Run those that are not done: weft stream run stream.yaml

name: types                         # its versions are types:v1, types:v2, …: one a task
base:                               # what all have in common: a run's file, or what is in one
  model: builtin:minilm
  # all labels that are in its data; what a task brings besides is appended
  labels: [int, float, bool, str, array, callable, sequence, mapping]
  adapter: {name: lora, r: 8}
  strategy: fedavg
  optimizer: {name: adamw, lr: 0.002}
  rounds: 2
  batch_size: 64
  steps: 10
  privacy: {epsilon: 4, delta: 1.0e-5, max_grad_norm: 1.0}   # of each task; or leave it out
  clients:
    simulate: {data: "builtin:parameter-types?split=train", by: column, column: client}
  seed: 0
  backend: ray                      # or inline: one process

method: sequential                  # or stacked, isolated, fresh, joint; or one of
# method: {regularizers: [lwf]}     # the version before is a teacher; goes with privacy
# method: {regularizers: [o-lora]}  # an adapter a task, away from those before; goes with privacy
# method: {start: isolated, merge: {name: svd}, merge_weight: mean}    # merged after each task
# metric: macro_f1                  # what the matrix is of; accuracy by default

tasks:
  - name: numbers
    labels: [int, float, bool, str] # what it learns, or brings: then the head grows
    evaluate: "builtin:parameter-types?split=test"           # its column of the matrix
  - name: containers
    labels: [array, callable, sequence, mapping]
    evaluate: "builtin:parameter-types?split=test"
    rounds: 3
    set: {optimizer.lr: 0.001}      # any key of a run's file, by its path
# What arrives later is appended here, or is a file of its own: weft stream extend types --task FILE
# - name: tickets
#   labels: [billing, login]
#   data: "jsonl:tickets.jsonl"     # of the base's simulated clients
#   fields: {text: note, label: dx}
# - name: wards
#   labels: [north, south]
#   clients: {names: [clinic-7]}    # registered ones, who need not be those of other tasks
"""


def write_stream_template(path: Path, force: bool = False) -> None:
    """Write the template.

    Raises:
        FileTaken: if there is a file and ``force`` is not set.
    """
    if path.exists() and not force:
        raise FileTaken(f"{path} exists; --force overwrites it")
    path.write_text(STREAM_TEMPLATE, "utf-8")
