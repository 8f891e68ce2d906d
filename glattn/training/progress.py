"""Where a run stands, and what it may be gone on with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from glattn.training.config import OF_TEACHER, TrainConfig

# options that may change when a run is resumed: they do not bear on its numbers (epochs: on those still to come), or
# the images that they name are compared themselves
_FREE = {
    "run", "resume", "data", "val_split", "workers", "device", "keep", "checkpoint_minutes", "tracker", "epochs",
    "early_stop", "eval_metric",
}  # fmt: skip


@dataclass
class Progress:
    """Where a run stands; saved whole with each checkpoint.

    Args:
        epoch: Epochs done.
        step: Optimiser steps done of the next epoch.
        loss_sum: Sum of the losses of those steps.
        rows: One a finished epoch, as in metrics.csv.
        best: The row of the exported model.
        bad: Numbers of training images that could not be read.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    bad: list[int] = field(default_factory=list)


def refuse_changed(state: dict[str, Any], config: TrainConfig, images: dict[str, Any]) -> None:
    """Refuse to go on from a state with other options, or on other images.

    Raises:
        ValueError: They are.
    """
    now = dataclasses.asdict(config)
    then = dataclasses.asdict(TrainConfig()) | state["config"]  # what it lacks came later
    free = _FREE if now["teacher"] or then["teacher"] else _FREE.union(OF_TEACHER)  # once, nothing refused them
    if then["pretrained"] and then["checkpoint"]:  # once, nothing refused both, and the latter was what counted
        free = free | {"pretrained"}
    changed = [name for name in now if name not in free and now[name] != then[name]]
    if changed:
        listed = ", ".join(f"{name} (was {then[name]!r}, is {now[name]!r})" for name in changed)
        raise ValueError(f"{config.run} was started with other options: {listed}; give another run=FOLDER")
    if any(state.get(name, value) != value for name, value in images.items()):  # what it lacks came later
        raise ValueError(f"{config.run} was started on other images; give another run=FOLDER")
