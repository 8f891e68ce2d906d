"""The optimiser that a configuration describes, and how its learning rates change."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from torch import nn

from glattn.files import one_line
from glattn.training.config import TrainConfig


def build_optimizer(config: TrainConfig, model: nn.Module, task: TrainingTask) -> torch.optim.Optimizer:
    """Create timm's optimiser over what is trained of the model, and over the task's own parameters.

    Raises:
        ValueError: timm refuses it, or it needs second derivatives.
    """
    fused = {"fused": True} if config.optimizer == "adamw" else {}  # one pass over memory, and one call
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **{**fused, **config.optimizer_args},
        )
    except (AssertionError, IndexError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"optimizer={config.optimizer!r}: {one_line(error)}") from None
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"optimizer={config.optimizer!r}: it needs second derivatives, which this loop does not take")
    known = {id(p) for p in model.parameters()}
    trained: Any = task.get_trainable_module()  # the model, and a distillation's projections
    own = [p for p in trained.parameters() if p.requires_grad and id(p) not in known]
    if own:
        optimizer.add_param_group({"params": own, "lr": config.lr, "weight_decay": 0.0})
    return optimizer


def make_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler | None:
    """Make timm's scheduler, stepped with every update; None leaves the learning rates as they are, scaled by layer.

    What falls by steps falls tenfold behind each third of the epochs; a polynomial is of degree one.
    """
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.schedule,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # a fraction works too
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            decay_epochs=config.epochs / 3 if config.schedule == "step" else None,
            decay_milestones=[config.epochs / 3, config.epochs * 2 / 3],  # type: ignore[list-item]
            decay_rate=1.0 if config.schedule == "poly" else 0.1,  # timm takes it for the degree there
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"schedule={config.schedule!r}: {error}") from None
    if scheduler is None:
        for group in optimizer.param_groups:  # a scheduler of timm's does so itself
            group["lr"] *= group.get("lr_scale", 1.0)
    return scheduler
