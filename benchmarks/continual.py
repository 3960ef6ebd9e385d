"""What is kept of each task by methods that learn one task after the other.

    python benchmarks/continual.py [--quick | --full] [--home DIR] [--data DIR] [--report]

all-MiniLM-L6-v2 with LoRA on query and value and a head that grows, driven as
``weft stream run`` drives it. Sequences: CLINC150 as ten tasks of one domain and as five of two,
where a seed also decides the order, and four text sets (AG News, Amazon, DBpedia, SST-2) in three
orders. Controls: one adapter that is trained on (*sequential*), all tasks at once (*joint*: the
ceiling), an adapter a task (*isolated*). All methods train as many numbers in as many steps; each
has four tries, of a learning rate or of two rates by two weights of its penalty, on rows held back
from the training data of five of the tasks in another order, and keeps the one that is best with
and without the task told.

Every stream is measured twice: *task-incremental*, where the task of an input is told, and
*class-incremental*, where any label seen so far may be answered; with an adapter a task, also by a
router. Eight clients get unlike labels of each task, by Dirichlet's 0.5.

The same command again does what is missing; Ctrl-C or SIGTERM puts the run it was at back, and
``weft stream show`` and ``weft plot`` with the same home work on what there is. What there is of
the plan is printed at the end, or with ``--report`` at once, and what is missing is named. The
default plan is made for ten hours of one core, the most telling part first; ``--quick`` is a minute
on data that are built in, ``--full`` all methods with three seeds everywhere. ``--perplexity`` is
about a language model's own language instead.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from _continual_bench import measure
from _continual_perplexity import json_perplexities, show_perplexities
from _continual_perplexity import measure as perplexities
from _continual_plan import CONTROLS, DOMAINS, METHODS, NAMED, Cell, Part, Plan
from _continual_report import show_json, show_report
from _quality_bench import arguments, in_home
from _quality_plan import dtype_for

EVERY = (*CONTROLS, *METHODS)
SEEDS = (0, 1, 2)
ORDERS = (
    ("dbpedia14", "amazon5", "sst2", "agnews"),
    ("dbpedia14", "amazon5", "agnews", "sst2"),
    ("sst2", "amazon5", "agnews", "dbpedia14"),
)
"""O-LoRA's three orders, with SST-2 in the place of Yahoo."""
TEN = Cell("c10", "CLINC150, ten tasks", tuple((name,) for name in DOMAINS), shuffled=True)
FIVE = Cell(
    "c5",
    "CLINC150, five tasks of two domains",
    tuple(zip(DOMAINS[::2], DOMAINS[1::2], strict=True)),
    shuffled=True,
    steps=48,
)
TEXT = tuple(
    Cell(f"t{n}", f"text sets, order {n}", tuple((name,) for name in order), max_length=64)
    for n, order in enumerate(ORDERS, 1)
)
TUNING = Cell("tune", "tuning", tuple((name,) for name in DOMAINS[1::2]), shuffled=True)


def federated(cell: Cell) -> Cell:
    """Return a cell on eight clients."""
    return replace(
        cell, name=f"{cell.name}f", title=f"{cell.title}, 8 clients", clients=8, rounds=4, steps=6
    )


def default_plan(device: str) -> Plan:
    """Return what ten hours of one core are for."""
    named = tuple(m for m in EVERY if m in CONTROLS or m.name in NAMED)
    parts = (
        Part(TEN, EVERY, SEEDS[:1]),
        Part(TEN, named, SEEDS[1:]),
        *(Part(cell, named, SEEDS[:1]) for cell in TEXT[:1]),
        Part(federated(TEN), named[:7], SEEDS[:1]),
        Part(FIVE, named, SEEDS[:1]),
        *(Part(cell, named, SEEDS[:1]) for cell in TEXT[1:]),
        Part(TEN, tuple(m for m in EVERY if m not in named), SEEDS[1:]),
    )
    return Plan(parts, TUNING, device=device, compute_dtype=dtype_for(device))


def full_plan(device: str) -> Plan:
    """Return every method with every seed on every sequence, by one client and by eight."""
    cells = (TEN, FIVE, *TEXT)
    parts = [Part(cell, EVERY, SEEDS) for cell in (*cells, *map(federated, cells))]
    return Plan(tuple(parts), TUNING, device=device, compute_dtype=dtype_for(device))


def quick_plan() -> Plan:
    """Return three methods with one rate on two small tasks: that everything works, no result."""
    few = tuple(replace(m, rates=m.rates[:1]) for m in (*CONTROLS[:2], METHODS[0]))
    cell = Cell("quick", "built-in data", (("types-1",), ("types-2",)), steps=1)
    return Plan((Part(cell, few, (0,)),), replace(cell, name="tune"), train=32, test=16)


def main() -> None:
    """Measure and print."""
    quick, full = "three methods on built-in data", "all methods and sequences, three seeds"
    parser = arguments(__doc__.partition("\n")[0], quick, full)
    parser.add_argument(
        "--perplexity",
        action="store_true",
        help="instead: what tasks do to a small language model's own language",
    )
    parser.add_argument(
        "--kept", type=Path, metavar="JSON", help="what is in it is not run again; new is added"
    )
    given = parser.parse_args()
    if given.perplexity:
        told = in_home(given, "continual", lambda home: perplexities(given, home))
        if given.json:
            json_perplexities(told)
        else:
            show_perplexities(told, given.markdown)
        return
    plan = full_plan(given.device) if given.full else default_plan(given.device)
    plan = quick_plan() if given.quick else plan
    found = in_home(given, "continual", lambda home: measure(given, plan, home))
    if given.json:
        show_json(found)
    else:
        show_report(found, given.markdown)
    if given.plot is not None:
        from _continual_report import draw

        draw(found, given.plot)


if __name__ == "__main__":
    main()
