"""An example's way to tensors: tokens, then batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clients.alignment import aligned
from clients.assignment import ModelSpec
from clients.examples import Example
from clients.tags import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One example in tokens, made once and collated in every epoch.

    Attributes:
        input_ids: ``[length]`` int64, 1 <= length <= ``max_length``.
        labels: the class index (0-d), or ``[length]`` with -100 where nothing is learned: for
            token-classification a tag at each word's first token, for causal-lm not shifted, as in
            transformers.
    """

    input_ids: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples as padded tensors.

    Attributes:
        input_ids: ``[batch, length]`` int64.
        attention_mask: ``[batch, length]`` int64, 0 on padding.
        labels: ``[batch]`` class indices, or ``[batch, length]`` with -100 where nothing is
            learned.
        taught: what teachers say of the examples, ``[batch, ...]`` each, by ``PLUGIN/NAME``.
    """

    input_ids: Tensor = field(repr=False)
    attention_mask: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    taught: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            {name: tensor.to(device) for name, tensor in self.taught.items()},
        )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token to pad with: the tokenizer's, else its end of sequence, else 0.

    Which it is makes no difference: padding is masked, and no target.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def by_length(encoded: Sequence[Encoded], indices: Iterable[int], size: int) -> Iterator[list[int]]:
    """Yield ``indices`` in parts of at most ``size`` and of like length, which need less padding.

    Shortest first; equally long ones in the order given.
    """
    ordered = sorted(indices, key=lambda i: len(encoded[i].input_ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, model: ModelSpec
) -> list[Encoded]:
    """Return ``examples`` in tokens, in order, each at most ``model.max_length`` long.

    Classification takes the tokenizer's special tokens, and shortens the longer text of a pair.
    Token-classification takes them too; words beyond the end are not learned.

    Causal-lm learns the whole of a plain text, and of a prompt and completion the completion alone
    (the chat template's turns where the tokenizer has one, else the two texts as they are, one
    after the other). An end of sequence is learned too. Where both do not fit, the prompt loses its
    beginning, down to half of ``max_length``, and then the completion its end.
    """
    if not examples:
        return []
    if model.kind == "classification":
        return _encode_texts(examples, tokenizer, model.max_length)
    limit = model.max_length
    if model.kind == "token-classification":
        return [
            Encoded(torch.tensor(one.input_ids), torch.tensor(one.targets(example.tags)))
            for one, example in zip(aligned(examples, tokenizer, limit), examples, strict=True)
        ]
    return [_joined(*parts, limit) for parts in _prompts_and_targets(examples, tokenizer)]


def _encode_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[Encoded]:
    found: dict[int, Encoded] = {}
    for paired in (False, True):  # a tokenizer takes either pairs or single texts
        places = [i for i, e in enumerate(examples) if (e.text_pair is not None) == paired]
        if not places:
            continue
        texts = [examples[i].text for i in places]
        pairs = [examples[i].text_pair for i in places] if paired else None
        ids = tokenizer(texts, pairs, truncation=True, max_length=limit)["input_ids"]
        for i, tokens in zip(places, ids, strict=True):
            found[i] = Encoded(torch.tensor(tokens), torch.tensor(examples[i].label))
    return [found[i] for i in range(len(examples))]


_Tokens: TypeAlias = list[int]


def _prompts_and_targets(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[_Tokens, _Tokens, _Tokens]]:
    """Return the beginning of sequence, the prompt and the targets of every example."""
    chat = tokenizer.chat_template is not None
    texts = [_turns(e, tokenizer) if chat else (e.prompt or "", e.completion) for e in examples]
    prompts = [prompt for prompt, _ in texts]
    targets = [e.text if c is None else c for e, (_, c) in zip(examples, texts, strict=True)]
    tokenized = tokenizer(prompts + targets, add_special_tokens=False, verbose=False)["input_ids"]
    empty = tokenizer("")["input_ids"]
    start = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    found = []
    for i, example in enumerate(examples):
        prompt, target = tokenized[i], tokenized[len(examples) + i]
        templated = chat and example.prompt is not None
        # A template may end an answer itself, perhaps with a newline after.
        ended = templated and bool(end) and end[0] in target[-2:]
        found.append(([] if templated else start, prompt, target if ended else target + end))
    return found


def _turns(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """Return prompt and completion as the chat template writes them; a plain text has neither."""
    if example.prompt is None:
        return "", None
    turns = [{"role": "user", "content": example.prompt}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": example.completion or ""})
    both = tokenizer.apply_chat_template(turns, tokenize=False)
    # Some templates open an answer otherwise than they write it ("<think>"): then it is taken bare.
    completion = both.removeprefix(prompt) if both.startswith(prompt) else example.completion
    return prompt, completion


def _joined(start: _Tokens, prompt: _Tokens, target: _Tokens, limit: int) -> Encoded:
    """Return the three parts as one, at most ``limit`` long and never without a target."""
    room = max(limit - len(start) - len(prompt), (limit + 1) // 2)
    target = target[:room]
    space = limit - len(target)
    start = start[:space]
    space -= len(start)
    prompt = prompt[max(0, len(prompt) - space) :]
    given = start + prompt
    # A plain text's beginning of sequence is not a target either: nothing predicts it.
    return Encoded(
        torch.tensor(given + target, dtype=torch.int64),
        torch.tensor([IGNORED] * len(given) + target, dtype=torch.int64),
    )


def collate(encoded: Sequence[Encoded], pad_token_id: int) -> Batch:
    """Return ``encoded`` as one batch, padded on the right to its longest; none give ``[0, 1]``."""
    if not encoded:
        none = torch.empty((0, 1), dtype=torch.int64)
        return Batch(none, none, none)
    ids = [example.input_ids for example in encoded]
    labels = [example.labels for example in encoded]
    whole = labels[0].ndim == 0
    return Batch(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
        attention_mask=pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        labels=torch.stack(labels)
        if whole
        else pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )
