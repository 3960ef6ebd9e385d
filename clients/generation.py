"""What a causal model answers to a prompt, greedily, and how like the right answer that is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from clients.tags import IGNORED
from clients.tokens import Encoded


class NoPrompt(ValueError):
    """Answers are asked for, and a record has no prompt to answer."""


def answers(
    model: nn.Module,
    tokenizer: Any,
    encoded: Sequence[Encoded],
    most: int,
    device: str = "cpu",
) -> list[str]:
    """Return the text that a model goes on with after each example's prompt.

    Greedy: the likeliest token each time, until the end of sequence. Whatever the model's own
    settings say of sampling, beams or penalties is not heeded.

    Args:
        model: a transformers causal model, with what is attached to it.
        tokenizer: the model's.
        encoded: examples of like length; their prompts are what is not learned of them.
        most: tokens at most, >= 1.
        device: where the model is.

    Raises:
        NoPrompt: if an example is a text and no prompt with its completion.
    """
    from transformers import GenerationConfig

    prompts = [one.input_ids[one.labels == IGNORED] for one in encoded]
    if any(len(prompt) == 0 for prompt in prompts):
        raise NoPrompt("answers are asked for, and a record is a text without a prompt to answer")
    end = tokenizer.eos_token_id
    pad = next((t for t in (tokenizer.pad_token_id, end) if t is not None), 0)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # on the right, where the answer begins
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    greedy = GenerationConfig(
        max_new_tokens=most, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=end
    )
    said = model.generate(  # type: ignore[operator]  # a transformers model's own
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=greedy
    )
    found: list[str] = tokenizer.batch_decode(said[:, width:].cpu(), skip_special_tokens=True)
    return found


def exact_match(answer: str, wanted: str) -> float:
    """Return 1 if two texts are the same but for case and white space, else 0.

    >>> exact_match(" Very  Good ", "very good")
    1.0
    """
    return float(answer.casefold().split() == wanted.casefold().split())


def rouge_l(answer: str, wanted: str) -> float:
    """Return ROUGE-L: the F1 of the longest common subsequence of words (Lin 2004).

    Words are runs of letters, digits and underscores, without regard to case, and are not stemmed.
    Two texts without a word are alike.

    >>> round(rouge_l("the cat sat", "the dog sat down"), 4)
    0.5714
    """
    ours, theirs = _words(answer), _words(wanted)
    if not ours or not theirs:
        return float(ours == theirs)
    common = _longest_common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return row[-1]
