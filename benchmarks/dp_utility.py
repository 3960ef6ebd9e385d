"""What differential privacy costs federated LoRA methods in accuracy, beside what was published.

    python benchmarks/dp_utility.py [--quick | --full] [--home DIR] [--data DIR] [--report]

all-MiniLM-L6-v2 with LoRA of rank 8 on query and value and a head, on SST-2 and MNLI,
dealt to six clients by Dirichlet's alpha of 0.5; three of them train in a round. DP-SGD of examples
at every client, with noise for an ε of 1, 3 or 6 over all of its rounds, or none (ε = infinity).
FedAvg, FFA-LoRA, FFA-LoRA with an orthonormal A, and FedSVD: the methods of 2505.12805, whose
published numbers are printed beside ours. Each has its own learning rate, the best of four by one
seed, on training rows held back in the first cell (SST-2 at ε = 3), and three seeds; a seed decides
first tensors, batches, cohorts, the deal and the noise alike (the data are public).

The runs are those of sweeps, whose files the script makes in ``--home``; the same command again
does what is missing, and ``--report`` prints what there is, as in ``federated_quality.py``. The
default plan is made for ten hours of one core; ``--quick`` is a minute on built-in data, and
``--full`` has the sizes of the paper, for ``--device cuda``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from _quality_bench import comparing, measured_as_asked
from _quality_plan import GROUPS, Cell, Method, Plan, dtype_for
from _quality_report import Measured, show_json, show_report
from _quality_results import Claim, summaries
from rich.table import Table

SETS = ("sst2", "mnli")
EPSILONS = (3.0, None, 1.0, 6.0)
ALPHA = 0.5
RATES = (1e-3, 3e-3, 8e-3, 2e-2)
PUBLISHED: Mapping[tuple[str, float | None], Mapping[str, float]] = {
    ("sst2", None): {"fedavg": 85.89, "ffa-lora": 94.06, "fedsvd": 94.26},
    ("sst2", 6.0): {"fedavg": 89.41, "ffa-lora": 91.42, "fedsvd": 91.32},
    ("sst2", 3.0): {"ffa-lora": 91.08, "fedsvd": 90.46},
    ("mnli", None): {"fedavg": 74.79, "ffa-lora": 82.75, "fedsvd": 83.96},
    ("mnli", 6.0): {
        "fedavg": 65.45,
        "ffa-lora": 55.56,
        "ffa-lora, orthonormal": 55.58,
        "fedsvd": 71.68,
    },
    ("mnli", 3.0): {"ffa-lora": 57.76, "fedsvd": 70.65},
}
"""Accuracy in %, 2505.12805v2, tables 1, 2 and its ablation of A (RoBERTa-large, 100 rounds of 10
steps of 128 texts, SGD; MNLI matched)."""


def claims() -> tuple[Claim, ...]:
    """Return the published orderings, better first, each for its own set and ε."""
    found = []
    for (data, epsilon), scores in PUBLISHED.items():
        best = scores["fedsvd"]
        for method, score in scores.items():
            if method != "fedsvd":
                better, worse = ("fedsvd", method) if best > score else (method, "fedsvd")
                high, low = max(best, score), min(best, score)
                about = f"{_setting(data, epsilon)}: {high:.1f} and {low:.1f}"
                cells = (Cell(data, ALPHA, epsilon),)
                found.append(Claim(better, worse, "2505.12805", about, cells))
    return tuple(found)


def methods() -> tuple[Method, ...]:
    """Return the methods, with the rates that are tried."""
    return tuple(replace(method, rates=RATES) for method in GROUPS[0])


def default_plan(device: str) -> Plan:
    """Return what ten hours of one core are for: 16 runs that try a rate, and 96."""
    cells = tuple(Cell(name, ALPHA, epsilon) for name in SETS for epsilon in EPSILONS)
    return Plan(
        (methods(),),
        cells,
        # many short rounds: in long ones, clients with other labels undo each other's
        rounds=30,
        tuning_rounds=30,
        steps=2,
        batch_size=32,
        clients=6,
        every=30,
        device=device,
        compute_dtype=dtype_for(device),
        cohort=3,
        # a client is charged for the rounds that it may have; fifteen are expected
        privacy={"delta": 1e-5, "max_grad_norm": 1.0, "max_participations": 20},
        equal_bytes=False,
    )


def full_plan(device: str) -> Plan:
    """Return the same with the paper's rounds, steps, batches and lengths, and all of the noise."""
    plan = default_plan(device)
    privacy = {"delta": 1e-5, "max_grad_norm": 2.0, "max_participations": 60}
    sizes = {"rounds": 100, "tuning_rounds": 50, "every": 25, "steps": 10, "batch_size": 128}
    return replace(plan, **sizes, max_length=128, seeds=(0, 1, 2, 3, 4), privacy=privacy)


def quick_plan() -> Plan:
    """Return two methods with two rates, with noise and without: that everything works."""
    first, *_, last = methods()
    few = tuple(replace(method, rates=RATES[2:]) for method in (first, last))
    cells = tuple(Cell("parameter-types", ALPHA, epsilon) for epsilon in (8.0, None))
    small = {"rounds": 2, "tuning_rounds": 1, "every": 1, "steps": 1, "batch_size": 8}
    privacy = {"delta": 1e-4, "max_grad_norm": 1.0, "accountant": "rdp"}
    plan = replace(default_plan("cpu"), groups=(few,), cells=cells, seeds=(0,), privacy=privacy)
    return replace(plan, **small)


def _setting(data: str, epsilon: float | None) -> str:
    return f"{data}, ε = {'infinity' if epsilon is None else f'{epsilon:g}'}"


def beside(found: Measured) -> Table:
    """Return ours and the published accuracy of each method, by set and ε."""
    made = summaries(found.results, "steps")
    title = "accuracy in %: here / published (2505.12805, RoBERTa-large)"
    cells = sorted(found.plan.cells, key=lambda c: (c.data, -(c.epsilon or 1e9)))
    table = Table("method", *(_setting(c.data, c.epsilon) for c in cells), title=title)
    for method in found.plan.methods:
        row = []
        for cell in cells:
            ours = made.get((cell, method.name))
            theirs = PUBLISHED.get((cell.data, cell.epsilon), {}).get(method.name)
            row.append(f"{ours or '-'} / {'-' if theirs is None else f'{theirs:.1f}'}")
        table.add_row(method.name, *row)
    return table


def main() -> None:
    """Measure and print."""
    quick, full = "two methods on built-in data", "the sizes of the paper"
    given = comparing(__doc__.partition("\n")[0], quick, full).parse_args()
    plan = full_plan(given.device) if given.full else default_plan(given.device)

    def show(found: Measured) -> None:
        judged = replace(found, claims=claims())
        if given.json:
            show_json(judged, "Utility under differential privacy")
        else:
            show_report(judged, given.markdown, (beside(judged),))

    measured_as_asked(given, "dp-utility", quick_plan() if given.quick else plan, show)


if __name__ == "__main__":
    main()
