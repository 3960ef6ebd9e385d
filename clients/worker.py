"""The one door through which every backend runs an assignment."""

from __future__ import annotations

import traceback

import torch

from clients.assignment import Assignment
from clients.evaluate import Evaluation, evaluate
from clients.site import Site
from clients.trainer import initial_update, train
from strategies.base import Update


def perform(assignment: Assignment) -> Update | Evaluation:
    """Do what the assignment asks for and return its result.

    Deterministic kernels are asked for; threads are set as the assignment says, because they
    change rounding. The traceback of an error stays in the client's private folder.
    """
    try:
        return _perform(assignment)
    except Exception:
        Site(assignment.site).note_error(assignment.client, traceback.format_exc())
        raise


def _perform(assignment: Assignment) -> Update | Evaluation:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(assignment.threads)
    if assignment.action == "evaluate":
        return evaluate(assignment)
    if assignment.action == "init":
        return initial_update(assignment)
    return train(assignment)
