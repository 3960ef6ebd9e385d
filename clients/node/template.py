"""A new node.yaml: what its owner decided, and a word on all that may be decided later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Plans:
    """What is to be in a new node.yaml.

    Attributes:
        name: of the node.
        superlink: host and port where it dials in.
        root_certificates: PEM file of who may have signed the SuperLink's certificate, or None.
        data: URIs by the names that others will know them by.
        fields: weft's column names to the files' own, of all of them.
        models: folders of base models by their hash.
        labels: of the site.
        epsilon: what all runs together may spend of each data set's population; None for public
            data.
        delta: at this delta.
        insecure: dial in without TLS, on this machine.
    """

    name: str
    superlink: str
    root_certificates: Path | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, Path] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    epsilon: float | None = None
    delta: float = 1e-5
    insecure: bool = False

    @property
    def are_whole(self) -> bool:
        """Whether a node could start with them: else its owner has to write the rest."""
        return bool(self.data and self.models)


def written(plans: Plans) -> str:
    """Return a node.yaml with these settings, and a word on all others."""
    roots = plans.root_certificates
    names = list(plans.data)
    data = [_data_set(name, plans, plans.name if len(names) == 1 else "") for name in names]
    models = [f"  {_quoted(digest)}: {_quoted(path)}\n" for digest, path in plans.models.items()]
    return (
        _HEAD.format(
            name=_quoted(plans.name),
            superlink=_quoted(plans.superlink),
            roots="null" if roots is None else _quoted(roots.absolute()),
            insecure="true" if plans.insecure else "false",
            labels=json.dumps(dict(plans.labels), ensure_ascii=False),
        )
        + "\n# Base models by hash, each a folder here: weft node models FOLDER prints the line.\n"
        + ("models:\n" + "".join(models) if models else "models: {}\n")
        + _DATA
        + ("data:\n" + "".join(data) if data else _NO_DATA)
        + _TAIL
    )


def _data_set(name: str, plans: Plans, alone: str) -> str:
    bound = "null" if plans.epsilon is None else f"{plans.epsilon:g}"
    fields = json.dumps(dict(plans.fields), ensure_ascii=False)
    return (
        f"  {name}:\n"
        f"    uri: {_quoted(plans.data[name])}\n"
        f"    fields: {fields}\n"
        f"    population: {_quoted(alone or f'{plans.name}.{name}')}\n"
        f"    public: {'true' if plans.epsilon is None else 'false'}\n"
        f"    epsilon: {bound}\n"
        f"    delta: {plans.delta!r}\n"
    )


def _quoted(value: object) -> str:
    """Return a text as YAML that is read as this text, whatever is in it."""
    return json.dumps(str(value), ensure_ascii=False)


_HEAD = """\
# A site's node: who it is, what it has, and what runs may do with it. Nobody changes it from afar.
# Relative paths are relative to this file. After a change: weft node join, and give the join file
# to whoever runs the coordinator.
name: {name}
superlink: {superlink}
# Who may have signed the SuperLink's certificate, a PEM file; null for whom this system trusts.
root_certificates: {roots}
# Without TLS, and only to a SuperLink on this machine.
insecure: {insecure}
# The private key. It never leaves this machine; keep a copy where only you can read it.
key: node.key
# Runs may choose clients by these.
labels: {labels}
# What the node remembers: keys of its noise, its own privacy ledger, what it sent. Never delete it.
state: state
"""

_DATA = """
# Data sets by the names that others know them by. Never told: where they lie (uri), what your
# columns are called, an exact count.
#   fields      weft's column names to yours: {text: note, label: diagnosis}
#   unit        your column that says whose a record is: runs then protect persons
#   population  whose data they are; data sets of one population share a budget. Do not change it
#   public      whether everyone may have them
#   holdout     the share that is never trained on, in [0, 1)
#   epsilon, delta   what all runs together may spend; only you can raise it
"""

_NO_DATA = """\
data: {}
#  notes:
#    uri: "jsonl:/data/notes.jsonl"
#    fields: {text: note, label: diagnosis}
#    unit: ""
#    population: clinic-north
#    public: false
#    holdout: 0.1
#    epsilon: 8
#    delta: 1.0e-5
"""

_TAIL = """
# What runs may do. What is commented out is as it stands here.
policy:
  without_privacy: false         # true: runs without privacy may use data that are not public
#  trust_coordinator_noise: false  # true: client-level noise counts as it is in the sum
#  adapters: null                # or the only ones: [lora, dora]
#  strategies: null              # or the only ones: [fedsvd, ffa-lora]
#  min_noise_multiplier: null    # of this node's own noise
#  max_epsilon_per_run: null     # of one population; whoever begins runs can begin another
#  insecure_seed: false          # true: noise that everybody can compute; for tests
#  max_steps: 10000
#  max_epochs: 10.0
#  max_batch_size: 65536
#  max_microbatch: 1024
#  max_length: 8192
#  max_threads: 64
#  max_order_mb: 2048            # tensors of an order, which are held in memory
"""
