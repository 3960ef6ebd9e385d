"""An exported folder against weft's own model, through nothing but peft and transformers."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from clients import data, models
from clients.assignment import DataSpec
from clients.session import opened
from orchestrator import service

_NUM = 64


def compare_with_peft(
    workspace: service.Workspace, ref: str, folder: Path, dataset: str
) -> tuple[float, int]:
    """Return the largest difference between both sides' logits, and on how many examples.

    Raises:
        RuntimeError: if they differ by more than 1e-3.
    """
    version = workspace.store.version(ref)
    assignment = service.use(workspace, version, DataSpec(dataset))
    spec = assignment.model
    examples = data.examples(assignment.data, spec)[:_NUM]
    with opened(assignment) as session, torch.no_grad():
        session.write(assignment.broadcast.tensors)
        session.model.eval()
        tokenizer = session.base.tokenizer
        encoded = data.encode(examples, tokenizer, spec)
        batch = data.collate(encoded, data.padding_id(tokenizer))
        ours = session.model(batch)
    theirs = _plain(folder, models.locate(spec.id, spec.revision), batch)
    difference = float((ours - theirs).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"the exported adapter's logits differ by {difference:.1e}")
    return difference, len(examples)


def _plain(folder: Path, base_folder: Path, batch: data.Batch) -> Tensor:
    """Return the logits that a user gets who has never heard of weft (mean pooling).

    The base is loaded from where it is on this machine, so that no network is needed.
    """
    from peft import PeftModel
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, about transformers
        base = AutoModel.from_pretrained(base_folder)
        model = PeftModel.from_pretrained(base, folder).eval()
    head = load_file(folder / "head.safetensors")
    with torch.no_grad():
        hidden = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
        mask = batch.attention_mask.unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        logits: Tensor = pooled @ head["head.weight"].T + head["head.bias"]
    return logits
