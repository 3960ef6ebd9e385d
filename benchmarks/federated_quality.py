"""How well federated LoRA methods learn, at equal steps and at equal communication.

    python benchmarks/federated_quality.py [--quick | --full] [--home DIR] [--data DIR] [--report]

all-MiniLM-L6-v2 with LoRA of rank 8 on query and value and a head, ten clients that all
train in every round, on data sets dealt to them IID or by Dirichlet's alpha. Each method has its
own learning rate, the best of four by one seed after half of the rounds, on training rows held back
in the first cell. Then come three seeds of each method and cell; a seed decides first tensors,
batches and the deal alike.

Two columns, from the same runs. *Equal steps*: after eight rounds of eight steps, for everybody.
*Equal bytes*: the last score within what FedAvg moves up and down in those rounds; a method that
moves less goes on for as many rounds as that is, one that moves more is scored earlier.

All runs are those of sweeps, whose files the script makes in ``--home``: the same command again
does what is missing, Ctrl-C or SIGTERM puts the run it was at back, and ``weft sweep``, ``weft runs
compare --sweep`` and ``weft coordinator`` with the same home work on them. What there is of the
plan is printed at the end, or with ``--report`` at once, and what is missing is named. The default
plan is made for ten hours of one core, the most telling part first; ``--quick`` is a minute on data
that are built in, ``--full`` all methods and data sets, for ``--device cuda``.
"""

from __future__ import annotations

from dataclasses import replace

from _quality_bench import comparing, measured_as_asked
from _quality_plan import GROUPS, MORE, Cell, Plan, dtype_for
from _quality_report import show_json, show_report

ALPHAS = (0.5, 0.1, None)
SETS = ("banking77", "sst2", "clinc150", "mnli")
EVERY_SET = (*SETS, "agnews", "amazon5", "dbpedia14", "boolq", "mdsent5")


def default_plan(device: str) -> Plan:
    """Return what ten hours of one core are for.

    All methods on one set at alpha 0.5; there at the other alphas, and on the other sets, the first
    group, which are the methods that differ in A alone.
    """
    first = [Cell(SETS[0], alpha) for alpha in ALPHAS]
    others = [Cell(name, ALPHAS[0]) for name in SETS[1:]]
    depth = (3, 1, 1, 1, 1, 1)
    dtype = dtype_for(device)
    return Plan(GROUPS, (*first, *others), depth=depth, device=device, compute_dtype=dtype)


def full_plan(device: str) -> Plan:
    """Return every method on every set at every alpha."""
    cells = tuple(Cell(name, alpha) for name in EVERY_SET for alpha in ALPHAS)
    return Plan((*GROUPS, MORE), cells, max_length=128, device=device)


def quick_plan() -> Plan:
    """Return two methods with two rates on one set: that everything works, and no result."""
    fedavg, ffa = (replace(method, rates=method.rates[2:]) for method in GROUPS[0][:2])
    cell = Cell("parameter-types", 0.5)
    return Plan(
        ((fedavg, ffa),), (cell,), (0,), rounds=2, tuning_rounds=1, steps=1, clients=4, every=1
    )


def main() -> None:
    """Measure and print."""
    quick, full = "two methods on built-in data", "all methods on all data sets"
    given = comparing(__doc__.partition("\n")[0], quick, full).parse_args()
    plan = full_plan(given.device) if given.full else default_plan(given.device)
    measured_as_asked(
        given,
        "federated-quality",
        quick_plan() if given.quick else plan,
        show_json if given.json else lambda found: show_report(found, given.markdown),
    )


if __name__ == "__main__":
    main()
