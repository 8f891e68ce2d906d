"""BatchNorm at the edges: training on one value a channel, gradients on the CPU, gradient checkpointing."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from glattn.layers.tracing import sizes_are_known


@torch.fx.wrap
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    tracked: bool,
) -> Tensor:
    """Batch normalisation that takes its running statistics where a channel has a single value, even in training.

    Where they are not ``tracked`` a batch leaves them as they are.
    """
    batch_statistics = running_mean is None or (training and x.numel() > x.shape[1])
    if not tracked and batch_statistics:
        running_mean, running_var = None, None
    out = F.batch_norm(x, running_mean, running_var, weight, bias, batch_statistics, momentum, eps)
    if out.requires_grad and sizes_are_known() and out.numel() > 0 and 1 in [out.shape[0], out.shape[2], out.shape[3]]:
        # On the CPU, torch reads a gradient wrongly whose strides fit two memory formats, as they do where a size is 1:
        # that of `out.flatten(2).transpose(1, 2)` at batch 1. That of merged axes has the map's own format.
        rows = out.permute(0, 2, 3, 1)
        if out.is_contiguous():
            out = _merged_and_split(out)
        elif rows.is_contiguous() and 1 in [out.shape[2], out.shape[3]]:
            out = _merged_and_split(rows).permute(0, 3, 1, 2)
    return out


def _merged_and_split(x: Tensor) -> Tensor:
    """Return the same tensor, no view of it in autograd's eyes, which in-place activations would have copied."""
    merged: Tensor = torch.ops.aten._unsafe_view(x, [x.shape[0], -1])
    split: Tensor = torch.ops.aten._unsafe_view(merged, x.shape)
    return split


@torch.jit.ignore
def counts() -> bool:
    """Tell whether a batch is new to running statistics: in a backward pass, checkpointing computes it once more."""
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1


@torch.fx.wrap
def plain_average(x: Tensor, count: Tensor) -> float:
    """Count a batch, if it has a variance, and return its weight in a plain average of all."""
    if x.numel() <= x.shape[1]:
        return 0.0
    count.add_(1)
    return 1.0 / float(count)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d that also trains at batch 1 on a 1x1 map, where a channel has no variance.

    There, and only there, it normalises by its running statistics and leaves them as they are. What is computed within
    a backward pass does not count: under gradient checkpointing a batch counts once.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Return the normalised ``(B, C, H, W)`` map."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            if torch.jit.is_scripting() or counts():
                if self.momentum is None:
                    momentum = plain_average(input, self.num_batches_tracked)
                else:
                    self.num_batches_tracked.add_(1)
            else:
                momentum = 0.0
        return batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.training,
            momentum,
            self.eps,
            self.track_running_stats,
        )
