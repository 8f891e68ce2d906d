"""Several processes that train as one would: devices and precision by accelerate, BatchNorm over the global batch."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, LoggerType, ProjectConfiguration, parse_flag_from_env
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from glattn.files import one_line
from glattn.memory import keep_freed_memory
from glattn.training.config import TrainConfig


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Make the accelerator that a configuration describes.

    Raises:
        ValueError: accelerate refuses it, the tracker is missing, or it was launched for what this loop does not do.
    """
    tracker = config.tracker
    available = {"all", *map(str, get_available_trackers())}
    if tracker == "auto":
        tracker = "tensorboard" if "tensorboard" in available else "none"
    if tracker in {str(kind) for kind in LoggerType} - available:  # accelerate would go on without
        raise ValueError(f"tracker={tracker}: its package is not installed; install it or give tracker=none")
    if config.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    # told so even where there is nothing else: accelerate would let torchrun's processes run alone
    cpu = config.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if cpu and config.precision == "fp16":
        raise ValueError("precision=fp16: a CPU does not train in it; give bf16 or no")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    if asked not in ("no", config.precision):
        raise ValueError(
            f"accelerate launch, or its configuration file, says mixed_precision={asked}, the run "
            f"precision={config.precision}; give precision={asked}, or --mixed_precision no"
        )
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.precision,
            # not as gradient_accumulation_steps, which a variable of the environment overrules
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulate),
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(logging_dir=config.run or "."),  # trackers start later, in the folder
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        raise ValueError(f"accelerate: {one_line(error)}") from None
    kind, launched = accelerator.distributed_type.name, int(os.environ.get("WORLD_SIZE", "1"))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(f"training with {kind} is not supported: every process holds the whole model; leave it out")
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone on {accelerator.device.type}; "
            "device=cpu trains them together on CPUs"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


class _Sum(torch.autograd.Function):
    """Sum over all processes; so is its gradient, as each process's loss depends on every share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics are those of all processes' equal shares: torch's own takes no CPU tensors.

    The same numbers as `nn.BatchNorm2d` on the global batch; timm's norms with activation
    keep their ``drop`` and ``act``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)``."""
        if not self.training:
            out = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        else:
            axes = [0, *range(2, x.ndim)]
            shape = [1, -1] + [1] * (x.ndim - 2)
            wide = x.float()
            count = dist.get_world_size() * x.numel() / x.shape[1]
            mean = _Sum.apply(wide.sum(axes)) / count
            centred = wide - mean.view(shape)
            var = _Sum.apply(centred.square().sum(axes)) / count
            out = centred * (var + self.eps).rsqrt().view(shape)
            if self.affine:
                out = out * self.weight.view(shape) + self.bias.view(shape)
            out = out.to(x.dtype)
            # within a backward pass, checkpointing computes again what was counted
            if self.track_running_stats and torch._C._current_graph_task_id() == -1:
                self._update(mean.detach(), var.detach() * (count / max(count - 1, 1)))
        for name in ("drop", "act"):
            after = self._modules.get(name)
            if after is not None:
                out = after(out)
        return out

    def _update(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)


def convert_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module with BatchNorm over the batches of all processes."""
    if device.type != "cpu":
        return convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d):
            _swap_class(child)
    return module


def _swap_class(norm: Any) -> None:
    # in place, so that parameters, buffers, hooks and every reference to the module stay what they are
    norm.__class__ = GlobalBatchNorm
