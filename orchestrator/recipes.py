"""What determines a version's bytes, and nothing else: no path, run id, backend, fault or time."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import Any

from clients.assignment import ModelSpec, PluginChoice
from orchestrator.plan import Plan
from orchestrator.sections import ClippingConfig
from strategies import STRATEGIES

FORMAT = 1
_LIBRARIES = ("weft", "torch", "transformers", "peft", "opacus")


def start_recipe(
    plan: Plan, offset: str | None = None, read: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the recipe of the version that round 1 starts from.

    Args:
        plan: the run's.
        offset: id of what lies underneath besides the stack, or None.
        read: of which public data the adapter was initialised, or None.
    """
    made = {**_common(plan, offset), "kind": "start", "round": 0, "updates": []}
    library = {"library": list(plan.library)} if plan.library else {}
    before = plan.start.labels
    added = list(plan.model.labels[len(before) :]) if before else []
    more = {"added_labels": added} if added else {}
    return made | library | more | ({"init_data": dict(read)} if read else {})


def offset_recipe(plan: Plan, read: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the recipe of what an initialisation takes out of the base model.

    Runs that differ in nothing that it depends on share it: only one that reads data depends on
    their labels, on their text's length, and on the seed.
    """
    config, model = plan.config, model_json(plan.model)
    labels = list(plan.task_labels) if read else []
    return {
        "format": FORMAT,
        "kind": "offset",
        "model": model if read else {name: model[name] for name in ("id", "hash")},
        "adapter": _choice(plan.adapter),
        "stack": list(plan.start.stack),
        "init_data": read and dict(read),
        "seed": config.seed if read else None,
        "task_labels": labels,
        "seen_labels": labels,
        "training": {"device": config.device, "threads": config.threads},
        "private": False,
        "reproducible": _reproducible(plan),
        "libraries": libraries(),
        "updates": [],
    }


def round_recipe(
    plan: Plan, round_: int, updates: Sequence[Mapping[str, Any]], offset: str | None = None
) -> dict[str, Any]:
    """Return the recipe of a round's version; ``updates`` are its leaves, in client order."""
    made = _common(plan, offset)
    return {**made, "kind": "round", "round": round_, "updates": list(updates)}


def final_recipe(
    recipe: Mapping[str, Any], updates: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the recipe of a run's result that is a round's version and the memory of its task.

    ``updates`` are the leaves of its reading, in client order.
    """
    return {**recipe, "kind": "final", "updates": list(updates)}


def prepared_recipe(
    recipe: Mapping[str, Any], updates: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the recipe of a run's start with what a reading before round 1 made of it."""
    unread = ("library", "init_data")  # of the start itself, which is a parent
    made = {name: value for name, value in recipe.items() if name not in unread}
    return {**made, "kind": "prepared", "updates": list(updates)}


def merge_recipe(
    parts: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, float],
    method: PluginChoice,
    stack: Sequence[str],
    converted: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the recipe of a merge.

    Args:
        parts: the merged versions' recipes, by id.
        weights: by id.
        method: the merge and its options.
        stack: versions that stay frozen underneath the result.
        converted: of those that were merged as the nearest LoRA, by id: from what, at which rank.
    """
    first = max(parts.values(), key=lambda recipe: len(recipe["model"]["labels"]))
    labels = first["model"]["labels"]
    seen = {label for recipe in parts.values() for label in recipe["seen_labels"]}
    return {
        "format": FORMAT,
        "kind": "merge",
        "model": first["model"],
        "adapter": first["adapter"],
        "merge": {"name": method.name, "options": dict(method.options)},
        "weights": dict(sorted(weights.items())),
        "stack": list(stack),
        "task_labels": [label for label in labels if label in seen],
        "seen_labels": [label for label in labels if label in seen],
        "reproducible": _weakest(recipe["reproducible"] for recipe in parts.values()),
        "private": all(recipe["private"] for recipe in parts.values()),
        "libraries": libraries(),
        "updates": [],
        **({"converted": {k: dict(v) for k, v in converted.items()}} if converted else {}),
    }


def import_recipe(
    model: ModelSpec,
    adapter: PluginChoice,
    seen_labels: Sequence[str],
    source: Mapping[str, Any],
    peft: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the recipe of an imported adapter.

    Args:
        model: the base model, with its hash.
        adapter: the method.
        seen_labels: what its head can tell apart.
        source: digests of the files it was read from, and the version that these say they are.
        peft: PEFT's config, where the adapter stays in PEFT's own format, else None.
    """
    return {
        "format": FORMAT,
        "kind": "import",
        "model": model_json(model),
        "adapter": _choice(adapter),
        "source": dict(source),
        "peft": peft and dict(peft),
        "stack": [],
        "task_labels": list(seen_labels),
        "seen_labels": list(seen_labels),
        "reproducible": "bitwise",
        "private": False,
        "libraries": libraries(),
        "updates": [],
    }


def model_json(model: ModelSpec) -> dict[str, Any]:
    """Return the base model as a recipe names it: by hash; a local folder's path is left out."""
    document = asdict(model)
    document["labels"] = list(model.labels)
    document["id"] = model.public_id or None
    return document


def _common(plan: Plan, offset: str | None) -> dict[str, Any]:
    config = plan.config
    privacy = config.privacy
    strategy = STRATEGIES.get(plan.strategy.name).build(**plan.strategy.options)
    return {
        "format": FORMAT,
        "model": model_json(plan.model),
        "adapter": _choice(plan.adapter),
        **(
            {"ranks": [one.model_dump(mode="json") for one in config.ranks]} if config.ranks else {}
        ),
        "strategy": _choice(plan.strategy),
        "optimizer": _choice(plan.optimizer),
        "regularizers": [_choice(r) for r in plan.regularizers],
        "training": {
            "batch_size": config.batch_size,
            "microbatch": config.microbatch,
            "steps": config.local_steps,
            "epochs": config.epochs,
            "head": config.head,
            "device": config.device,
            "threads": config.threads,
        },
        "privacy": privacy
        and {
            **(
                {"max_grad_norm": privacy.max_grad_norm, "unit": privacy.unit}
                if plan.central is None
                else {**asdict(plan.central), "unit": plan.central.spend.unit}
            ),
            "delta": privacy.delta,
            "accountant": privacy.accountant,
            "insecure_seed": privacy.insecure_seed,
            **_clipping(privacy.clipping),
            **({"per_unit": privacy.per_unit} if privacy.per_unit > 1 else {}),
            **({"noise_shares": privacy.noise_shares} if privacy.noise_shares else {}),
            **({"report": privacy.report.model_dump(mode="json")} if privacy.report else {}),
        },
        "private": privacy is not None and privacy.insecure_seed is None,
        **({"unbounded": config.accept_unbounded} if config.accept_unbounded else {}),
        "task_labels": list(plan.task_labels),
        "seen_labels": list(plan.seen_labels),
        "start": plan.start.mode,
        "stack": list(plan.start.stack),
        "offset": offset,
        **({"personal": True} if "personal" in strategy.capabilities else {}),
        **({"uplink": [_choice(stage) for stage in plan.uplink]} if plan.uplink else {}),
        "cohort": config.cohort.model_dump(mode="json"),
        "seed": config.seed,
        "reproducible": _reproducible(plan),
        "libraries": libraries(),
    }


def _clipping(clipping: ClippingConfig) -> dict[str, Any]:
    if clipping.mode == "flat":
        return {}
    return {"clipping": clipping.model_dump(mode="json")}


def _choice(choice: PluginChoice) -> dict[str, Any]:
    return {"name": choice.name, "options": dict(choice.options)}


def _reproducible(plan: Plan) -> str:
    return "bitwise" if plan.config.device == "cpu" else "statistical"


def _weakest(claims: Any) -> str:
    return "bitwise" if set(claims) == {"bitwise"} else "statistical"


def drift(recipe: Mapping[str, Any]) -> list[str]:
    """Return what a version was made with that is another here: ``torch 2.12, here 2.13``."""
    here = libraries()
    made = recipe["libraries"].items()
    return [f"{name} {old}, here {here.get(name)}" for name, old in made if here.get(name) != old]


@cache
def libraries() -> dict[str, str]:
    """Return the versions of what determines bytes, here and now."""
    found = {name: version(name) for name in _LIBRARIES}
    return {**found, "python": platform.python_version(), "machine": platform.machine()}
