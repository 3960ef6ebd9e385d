"""The training loop as one would write it without weft: torch, transformers, PEFT; needs no weft.

Loaded once: the base model with LoRA and a head, and the tokens of every example. A client is: the
round's tensors written into the model, a fresh AdamW, its batches in a shuffled order, the tensors
read back. Flower's clients run this loop (``flower/training.py``), and so does the bare process:

    python benchmarks/_plain_loop.py JOB

which trains the clients that a line of JSON on stdin names, ``{"round": 1, "parts": [0, 2]}``, and
answers with the seconds it took. A job is a file that ``simulate.py`` writes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

State = dict[str, Tensor]


class PlainLoop:
    """A base model, an adapter, and everybody's data.

    Args:
        job: the file that says which.
    """

    def __init__(self, job: str) -> None:
        self.job = json.loads(Path(job).read_text())
        torch.set_num_threads(1)
        rows = [json.loads(line) for line in Path(self.job["rows"]).read_text().splitlines()]
        tokenizer = AutoTokenizer.from_pretrained(self.job["model"])
        texts = [row["text"] for row in rows]
        found = tokenizer(texts, truncation=True, max_length=self.job["max_length"])
        self.tokens = [torch.tensor(ids) for ids in found["input_ids"]]
        self.labels = torch.tensor([self.job["labels"].index(row["label"]) for row in rows])
        base = AutoModel.from_pretrained(
            self.job["model"],
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        config = LoraConfig(
            r=self.job["rank"], lora_alpha=self.job["rank"], target_modules=["query", "value"]
        )
        self.model: Any = get_peft_model(base, config)
        self.head = torch.nn.Linear(base.config.hidden_size, len(self.job["labels"]))
        self.model.train()
        adapter = {
            name.removeprefix("base_model.model.").replace(".default", ""): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        head = {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        self.trained = adapter | head

    def train(self, tensors: State, part: int, round_: int) -> tuple[State, float, int]:
        """Return what a client made of ``tensors`` in an epoch, its mean loss, and its size."""
        for name, parameter in self.trained.items():
            parameter.data.copy_(tensors[name])
        optimizer = torch.optim.AdamW(self.trained.values(), lr=self.job["lr"], weight_decay=0.0)
        mine = self.job["parts"][part]
        generator = torch.Generator().manual_seed(self.job["seeds"][round_ - 1][part])
        order = torch.randperm(len(mine), generator=generator).tolist()
        size, losses = self.job["batch_size"], torch.zeros(())
        for start in range(0, len(order), size):
            chosen = [mine[i] for i in order[start : start + size]]
            loss = self._loss(chosen)
            loss.backward()
            losses += loss.detach() * len(chosen)
            optimizer.step()
            optimizer.zero_grad()
        state = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        return state, float(losses) / len(mine), len(mine)

    def _loss(self, chosen: list[int]) -> Tensor:
        ids = [self.tokens[i] for i in chosen]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(i) for i in ids])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        hidden = self.model(input_ids=padded, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask.unsqueeze(-1)).sum(1) / lengths[:, None]
        return cross_entropy(self.head(pooled), self.labels[chosen])


def main() -> None:
    """Train whom stdin names, from the job's first tensors."""
    from _memory import private_bytes

    loop = PlainLoop(sys.argv[1])
    first = load_file(loop.job["tensors"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        results = [loop.train(first, part, asked["round"]) for part in asked["parts"]]
        seconds = time.perf_counter() - start
        frozen = [p for p in loop.model.parameters() if not p.requires_grad]
        answer = {
            "seconds": seconds,
            "losses": [loss for _, loss, _ in results],
            "private_weights": private_bytes(frozen),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
