"""What a quality benchmark has measured, in a small file: what is in one is not run again.

Homes hold models, texts and logs of every run; the file holds rates and scores, as JSON, and
outlives them. It is of one plan's setting, and no other plan takes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from _quality_plan import Plan
from _quality_report import Measured
from _quality_results import Result, Score, Tuned

from clients.files import write_durably


@dataclass(frozen=True, slots=True)
class Kept:
    """What was measured before.

    Attributes:
        tuned: by method, how its learning rate was chosen; all of its rates have ended.
        results: by cell's name, seed and method; at equal bytes, too, where the plan has that.
    """

    tuned: Mapping[str, Tuned] = field(default_factory=dict)
    results: Mapping[tuple[str, int, str], Result] = field(default_factory=dict)


def load(paths: Sequence[Path], plan: Plan, setting: str) -> Kept:
    """Return what files hold of a plan's methods and cells; those that are not there hold nothing.

    Args:
        paths: of what was measured in one place and another.
        plan: what is compared.
        setting: of the plan, in a line.

    Raises:
        SystemExit: if a file is of another setting.
    """
    cells = {cell.name: cell for cell in plan.cells}
    methods = {method.name for method in plan.methods}
    tuned: dict[str, Tuned] = {}
    results: dict[tuple[str, int, str], Result] = {}
    for path in paths:
        if not path.exists():
            continue
        document = json.loads(path.read_text("utf-8"))
        if document["setting"] != setting:
            raise SystemExit(
                f"{path} was measured in another setting ({document['setting']}; here: {setting}); "
                "give another --kept"
            )
        for name, scores in document["tuned"].items():
            if name in methods:
                tuned[name] = Tuned(name, {float(rate): score for rate, score in scores.items()})
        for name, seed, method, steps, spent in document["results"]:
            if name in cells and method in methods:
                at = None if spent is None else Score(*spent)
                one = Result(cells[name], seed, method, Score(*steps), at)
                results[name, seed, method] = one
    return Kept(tuned, results)


def save(path: Path, found: Measured) -> None:
    """Add what is there for good: rates that are all tried, and runs that are at their end.

    Args:
        path: what it holds of other methods and cells stays in it.
        found: what was measured, with what was kept before.
    """
    before = json.loads(path.read_text("utf-8")) if path.exists() else {"tuned": {}, "results": []}
    tuned = before["tuned"] | {
        one.method: {f"{rate:g}": score for rate, score in one.accuracy.items()}
        for one in found.tuned
        if one.accuracy and not one.missing
    }
    results = {tuple(row[:3]): row for row in before["results"]} | {
        (r.cell.name, r.seed, r.method): [
            *(r.cell.name, r.seed, r.method),
            *(astuple(r.steps), r.bytes and astuple(r.bytes)),
        ]
        for r in found.results
        if r.bytes is not None or not found.plan.equal_bytes
    }
    rates = ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in tuned.items())
    lines = ",\n".join(f"  {json.dumps(results[key])}" for key in sorted(results))
    head = f'{{\n"setting": {json.dumps(found.setting)},\n'
    text = f'{head}"tuned": {{\n{rates}\n}},\n"results": [\n{lines}\n]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode())
