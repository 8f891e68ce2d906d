"""Convolutions whose BatchNorm folds away: the only normalisation of the family (folding: RepVGG, arXiv:2101.03697)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_act_layer
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.utils.fusion import fuse_conv_bn_weights

from glattn.layers.conv2d import FoldedConv, Pointwise, StridedConv
from glattn.layers.norm import BatchNorm2d
from glattn.layers.precision import precise


class ConvNorm(nn.Module):
    """``BatchNorm(conv(x))``, with "same" padding: ``(B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))``.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel_size: Odd side of the kernel, in cells.
        stride: Stride, in cells.
        dilation: Dilation, in cells.
        groups: Groups of channels that do not see each other.
        padding: Cells of zeros around the map, in place of "same".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        padding: int | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        kind = Pointwise if kernel_size == stride == groups == 1 else StridedConv if stride > 1 else nn.Conv2d
        self.conv = kind(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=dilation * (kernel_size // 2) if padding is None else padding,
            dilation=dilation,
            groups=groups,
            bias=False,
            **factory,
        )
        self.bn = BatchNorm2d(out_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised convolution."""
        return self.bn(self.conv(x))

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Take a submodule; torch's BatchNorm, which timm's ``unfreeze`` puts here, becomes ours."""
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d
        super().add_module(name, module)

    @torch.jit.ignore
    def fuse(self) -> nn.Conv2d:
        """Return the one convolution that this module computes in evaluation mode."""
        weight, bias = folded(self)
        return like(self.conv, weight, bias)


class MultiScaleConv(nn.Module):
    """Parallel convolutions of several sizes, each with its BatchNorm, summed: ``(B, in, H, W) -> (B, out, H, W)``.

    Folding leaves one convolution of the largest size. Cost a cell: the sum of ``k^2 in out / groups`` over the sizes;
    folded, the largest alone.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel_sizes: Odd kernel sizes, in cells.
        groups: Groups of channels that do not see each other.
        dilation: Dilation of every branch, in cells.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_sizes: Sequence[int],
        groups: int,
        dilation: int = 1,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            ConvNorm(in_channels, out_channels, kernel_size=k, dilation=dilation, groups=groups, **factory)
            for k in kernel_sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches."""
        out = self.branches[0](x)
        for i, branch in enumerate(self.branches):
            if i > 0:
                out = out + branch(x)
        return out

    @torch.jit.ignore
    def fuse(self) -> nn.Conv2d:
        """Return the one convolution that this module computes in evaluation mode."""
        largest = max(map(conv_of, self.branches), key=lambda conv: conv.kernel_size[0])
        side = largest.kernel_size[0]
        weights, biases = zip(*(folded(branch) for branch in self.branches), strict=True)
        weight = sum(F.pad(w, [(side - w.shape[-1]) // 2] * 4) for w in weights)
        return like(largest, weight, sum(biases))


def folded(branch: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a `ConvNorm`, its norm folded in; of a convolution that was folded before, as is.

    Of a `ConvNorm` they are in float32 at least, for `like` to round once.
    """
    if isinstance(branch, nn.Conv2d):
        return branch.weight, branch.bias
    conv, bn = branch.conv, branch.bn
    parts = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    weight, bias, mean, var, scale, shift = (None if t is None else t.to(precise(t)) for t in parts)
    return fuse_conv_bn_weights(weight, bias, mean, var, bn.eps, scale, shift)


def conv_of(branch: nn.Module) -> nn.Module:
    """Return the convolution of a `ConvNorm`; one that was folded before, as is."""
    return branch if isinstance(branch, nn.Conv2d) else branch.conv


def like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution with ``conv``'s geometry, type, memory format and mode, and the given weight and bias."""
    weight, bias = weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)
    out = FoldedConv(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        device="meta",
    )
    nhwc = conv.weight.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    out.weight = nn.Parameter(weight.detach().contiguous(memory_format=memory_format), conv.weight.requires_grad)
    out.bias = nn.Parameter(bias.detach(), conv.weight.requires_grad)
    return out.train(conv.training)


def scale_output(conv: nn.Module, scale: Tensor) -> None:
    """Multiply the output channels of a `ConvNorm`, or of a folded convolution, by ``(out,)`` factors, in place.

    A norm in half precision, which is to be folded next, is in float32 behind that.
    """
    target = conv.bn.to(precise(conv.bn.weight)) if isinstance(conv, ConvNorm) else conv
    with torch.no_grad():
        target.weight.mul_(scale.reshape(-1, *[1] * (target.weight.ndim - 1)))
        target.bias.mul_(scale)


def activation(act_layer: str, **factory: Any) -> nn.Module:
    """Return an activation, by timm's name, in place where autograd needs no copy for that: ReLU's reads its output."""
    act: nn.Module = create_act_layer(act_layer, inplace=act_layer == "relu")
    return act.to(**factory)  # PReLU has a parameter


def activate_in_place(act: nn.Module) -> None:
    """Make an activation overwrite what it is given, if it can, for inference."""
    if hasattr(act, "inplace"):
        act.inplace = True


def is_watched(*modules: nn.Module) -> bool:
    """Tell whether some modules are each to be called for themselves: hooks look on, or a call is something else."""
    if _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
        return True
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:  # accelerate's offload
            return True
        if module._backward_hooks or module._backward_pre_hooks:
            return True
    return False


def num_groups(dim: int, groups: str | int) -> int:
    """Return the number of convolution groups that ``local_groups`` means at this width."""
    number = {"depthwise": dim, "dense": 1}.get(groups, groups) if isinstance(groups, str) else groups
    if not isinstance(number, int) or number < 1 or dim % number:
        raise ValueError(
            f"local_groups={groups!r} does not divide the local branch's {dim} channels; use 'depthwise', 'dense'"
            " or a divisor"
        )
    return number
