"""What a method of continual learning does not go with is refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clients.regularizers.o_lora import OLoRA
from orchestrator.config import BadConfig
from orchestrator.continual_refusals import refuse_continual
from orchestrator.memory_refusals import refuse_memory
from orchestrator.plan import Start

SHAPES = {
    f"encoder.{layer}{part}": shape
    for layer in ("query", "value")
    for part, shape in ((".lora_A.weight", (2, 8)), (".lora_B.weight", (6, 2)), (".scaling", ()))
}
CLIENT_LEVEL = {"level": "client", "noise_multiplier": 1.0, "clip": 0.5, "delta": 1e-3}
GOES_ON = Start("continue", "f" * 64, seen_labels=("cat",))


@pytest.fixture
def refusal(make_plan):
    """Return a function: why a plan is refused, or "" where it is not."""

    def of(*methods, **changes):
        plan = make_plan(regularizers=list(methods), **changes)
        try:
            refuse_continual(plan, SHAPES, [n for n in SHAPES if not n.endswith(".scaling")])
        except BadConfig as error:
            return str(error)
        return ""

    return of


@pytest.mark.parametrize("method", ["replay", "der-plus-plus"])
@pytest.mark.parametrize("privacy", [{"epsilon": 8}, CLIENT_LEVEL], ids=["example", "client"])
def test_kept_examples_are_not_rehearsed_under_privacy(refusal, method, privacy):
    why = refusal(method, privacy=privacy)
    assert f"{method!r} trains again on examples of earlier tasks, more often than" in why


@pytest.mark.parametrize("method", ["lwf", "l2-sp"])
def test_what_reads_no_example_goes_with_privacy(refusal, method):
    assert refusal(method, start=GOES_ON, privacy={"epsilon": 8}) == ""


def test_a_client_keeps_one_reservoir(refusal):
    assert "'replay' and 'der-plus-plus' both keep examples" in refusal("replay", "der-plus-plus")
    assert refusal("replay", "lwf", "l2-sp", start=GOES_ON) == ""


def test_logits_of_every_token_are_not_kept(refusal):
    causal = {"task": "causal-lm", "labels": None}
    why = refusal("der-plus-plus", **causal)
    assert "the task is causal-lm, whose every token has one for each of its vocabulary" in why
    assert refusal("replay", **causal) == ""


@pytest.mark.parametrize("method", ["replay", "der-plus-plus", "lwf"])
def test_texts_with_a_tag_a_word_are_kept_as_others_are(refusal, method):
    assert refusal(method, task="token-classification", start=GOES_ON) == ""


@pytest.mark.parametrize("method", ["lwf", "l2-sp"])
@pytest.mark.parametrize("strategy", ["fedex-lora", "flora"])
def test_what_lies_beneath_cannot_be_held_against_the_start(refusal, method, strategy):
    why = refusal(method, strategy=strategy, start=GOES_ON)
    assert f"strategy {strategy!r} (as set) lays what is learned beneath the adapter" in why


@pytest.mark.parametrize("changes", [{"strategy": "fedsa-lora"}, {"head": "personal"}])
@pytest.mark.parametrize("method", ["lwf", "l2-sp"])
def test_a_personal_part_has_no_common_start(refusal, method, changes):
    assert "a part of the model stays at each client" in refusal(method, start=GOES_ON, **changes)


@pytest.mark.parametrize("method", ["lwf", "l2-sp"])
def test_clients_of_lower_ranks_cannot_be_held_against_the_whole(refusal, method):
    ranks = {"strategy": "flexlora", "ranks": [{"names": ["a"], "r": 1}]}
    assert "which has the adapter's whole rank" in refusal(method, start=GOES_ON, **ranks)


@pytest.mark.parametrize("strategy", ["fedsvd", "flexlora"])
def test_a_basis_that_turns_is_no_anchor_for_entries_and_one_for_outputs(refusal, strategy):
    why = refusal("l2-sp", strategy=strategy, start=GOES_ON)
    assert f"strategy {strategy!r} (as set) factors B A anew in every round" in why
    assert refusal("lwf", strategy=strategy, start=GOES_ON) == ""


CLIPPED = {"name": "norm-clip", "inner": "rolora", "bound": 0.01}


@pytest.mark.parametrize(
    "strategy", ["fedavg", "ffa-lora", "rolora", "fedadam", "scaffold", CLIPPED], ids=str
)
def test_a_basis_that_stays_is_an_anchor(refusal, strategy):
    assert refusal("l2-sp", strategy=strategy, start=GOES_ON) == ""


def test_a_teacher_must_be_what_the_run_starts_from(refusal):
    fresh = Start("fresh", "f" * 64)
    assert "start: fresh begins with an adapter that has learned nothing" in refusal(
        "lwf", start=fresh
    )
    assert refusal("lwf") == ""  # a first task: there is nothing to teach
    assert refusal("l2-sp", start=fresh) == ""


def test_what_chooses_a_frozen_factor_does_not_go_with_one_of_the_library(make_plan):
    """The strategy would put the library's in its place, and the method would do nothing."""
    hard = {"name": "o-lora", "form": "hard"}
    plan = make_plan(strategy="lori", regularizers=[hard])
    trained = [n for n in SHAPES if "lora_B" in n]
    method = OLoRA(form="hard")
    refuse_memory(plan, "o-lora", method, SHAPES, trained)
    with pytest.raises(BadConfig, match=r"'o-lora' .* strategy 'lori' takes it from the library"):
        refuse_memory(replace(plan, library=("f" * 64,)), "o-lora", method, SHAPES, trained)
