"""The one door through which every backend runs an assignment."""

from __future__ import annotations

import traceback

import torch

from clients.assignment import Assignment
from clients.downlink import expanded
from clients.evaluate import Evaluation, evaluate
from clients.pace import GivenUp, Stepped, unheard
from clients.private_scores import private_evaluation
from clients.reading import read
from clients.site import Site
from clients.starting import initial_update
from clients.trainer import train
from strategies.base import Update


def perform(
    assignment: Assignment, stepped: Stepped = unheard, checkpoint_s: float | None = None
) -> Update | Evaluation:
    """Do what the assignment asks for and return its result.

    Deterministic kernels are asked for; threads are set as the assignment says, because they
    change rounding. The traceback of an error stays in the client's private folder.

    Args:
        assignment: what to do.
        stepped: told of progress; what it raises ends the work.
        checkpoint_s: as :func:`clients.trainer.train` says.

    Raises:
        clients.pace.GivenUp: if ``stepped`` raised it; the process can go on with another.
    """
    try:
        return _perform(assignment, stepped, checkpoint_s)
    except GivenUp:
        raise
    except Exception:
        Site(assignment.site).note_error(assignment.client, traceback.format_exc())
        raise


def _perform(
    assignment: Assignment, stepped: Stepped, checkpoint_s: float | None
) -> Update | Evaluation:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(assignment.threads)
    if assignment.action == "evaluate":
        score = evaluate if assignment.privacy is None else private_evaluation
        return score(assignment, stepped)
    if assignment.action == "init":
        return initial_update(assignment)
    if assignment.action != "train":
        return read(assignment, assignment.action, stepped)
    return train(expanded(assignment), stepped, checkpoint_s)
