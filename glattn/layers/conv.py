"""Convolutions whose BatchNorm folds away: the only normalisation of the family (folding: RepVGG, arXiv:2101.03697)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import create_act_layer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.optim.optimizer import register_optimizer_step_post_hook

from glattn.layers import onednn
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
) -> Tensor:
    """Batch normalisation that takes its running statistics where a channel has a single value, even in training."""
    batch_statistics = running_mean is None or (training and x.numel() > x.shape[1])
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


class BatchNorm2d(nn.BatchNorm2d):
    """torch's BatchNorm2d that also trains at batch 1 on a 1x1 map, where a channel has no variance.

    There, and only there, it normalises by its running statistics and leaves them as they are. What is computed within
    a backward pass does not count: under gradient checkpointing a batch counts once.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Return the normalised ``(B, C, H, W)`` map."""
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            if torch.jit.is_scripting() or counts():
                self.num_batches_tracked.add_(1)
                if self.momentum is None:  # a plain average
                    momentum = 1.0 / float(self.num_batches_tracked)
            else:
                momentum = 0.0
        return batch_norm(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.training, momentum, self.eps
        )


_PLAIN = (Tensor, nn.Parameter)
_LEAST = 2**20  # multiply-adds, below which laying the weight out for oneDNN's product takes longer than it saves


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> bool:
    """Tell whether a weight and a bias are plain tensors that go with a map: oneDNN's operators do not look."""
    return (
        type(weight) in _PLAIN
        and weight.dtype == x.dtype
        and x.shape[1] == weight.shape[1] * groups
        and (
            bias is None
            or (
                type(bias) in _PLAIN
                and bias.dtype == x.dtype
                and bias.shape == weight.shape[:1]
                and bias.is_contiguous()
            )
        )
    )


_steps = 0  # of any optimiser: fused ones do not count as changes of a tensor


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


@torch.fx.wrap
def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution; in channels_last memory, as the matrix product that it is where that is faster.

    So it is on the CPU, in inference; and of few cells, of the whole batch, of which the convolution takes up to twice
    as long, and eight times as long on a map of one cell. In training in fp32 it gains of fewer cells only. And on CUDA
    in half precision, in inference: there cuDNN adds the bias in a pass of its own. In training the two are level.
    """
    if sizes_are_known():
        rows = x.permute(0, 2, 3, 1)
        # contiguous: in channels_last memory, asked in a way that vmap can answer
        if x.device.type == "cpu" and rows.is_contiguous():
            cells = x.shape[0] * x.shape[2] * x.shape[3]
            if not torch.jit.is_scripting():
                large = cells * weight.shape[0] * weight.shape[1] >= _LEAST
                if large and x.dtype == torch.float32 and onednn.takes(x) and _fits(x, weight, bias):
                    return onednn.multiply(x, weight.flatten(1), bias)
            if cells <= (256 if torch.is_grad_enabled() and x.dtype == torch.float32 else 1024):
                return F.linear(rows, weight.flatten(1), bias).permute(0, 3, 1, 2)
        elif x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and rows.is_contiguous():
            return F.linear(rows, weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


class Pointwise(nn.Conv2d):
    """torch's Conv2d of kernel size 1, without stride, padding or groups, computed by `pointwise`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Return the convolved ``(B, C, H, W)`` map."""
        return pointwise(input, self.weight, self.bias)


def _in_bfloat16(x: Tensor) -> bool:
    """Tell whether a convolution of this map is computed in bfloat16; autocasting may take fp16 as well."""
    if torch.jit.is_scripting():
        return x.dtype == torch.bfloat16
    else:  # noqa: RET505 (TorchScript compiles what stands behind an if)
        return x.dtype == torch.bfloat16 or (torch.is_autocast_enabled("cpu") and x.dtype != torch.float64)


def is_misread(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> bool:
    """Tell whether oneDNN computes a strided convolution wrongly with AMX: in bfloat16, to one cell's width.

    The output where it is higher, the weight's gradient even where it is not.
    """
    reach = x.shape[3] + 2 * padding[1] - dilation[1] * (weight.shape[3] - 1)
    return x.device.type == "cpu" and stride[1] > 1 and reach <= stride[1] and _in_bfloat16(x)


@torch.fx.wrap
def strided(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """A convolution that is computed in float32 where oneDNN misreads it, see `is_misread`.

    What is compiled, traced or exported has no such branch.
    """
    if sizes_are_known() and is_misread(x, weight, stride, padding, dilation):
        wide_bias = bias if bias is None else bias.float()
        if torch.jit.is_scripting():
            out = F.conv2d(x.float(), weight.float(), wide_bias, stride, padding, dilation, groups)
            return out.to(x.dtype)
        else:  # noqa: RET505
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            with torch.autocast("cpu", enabled=False):
                out = F.conv2d(x.float(), weight.float(), wide_bias, stride, padding, dilation, groups)
            return out.to(dtype)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


class StridedConv(nn.Conv2d):
    """torch's Conv2d of zero padding, computed by `strided`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Return the convolved ``(B, C, H, W)`` map."""
        return strided(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FoldedConv(nn.Conv2d):
    """torch's Conv2d in a folded model: in inference on x86 it keeps its weight as oneDNN lays it out.

    A matrix product does so at once, others at the second map of one shape in a row; until the weight is another one,
    or moved, cast or changed. ``train`` and ``eval`` drop what is kept: call one after a change that torch does not
    count, through ``weight.data``, numpy, ``vector_to_parameters`` or ``torch.distributed.broadcast``.
    """

    __jit_ignored_attributes__ = ("_prepared", "_seen")
    _prepared: tuple[Any, Any, onednn.Convolve, int, Any] | None = None
    _seen: Any = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Return the convolved ``(B, C, H, W)`` map."""
        if not torch.jit.is_scripting():
            if onednn.takes(input):
                convolve = self.prepared(input)
                if convolve is not None:
                    return convolve(input)
        if self.is_product():
            return pointwise(input, self.weight, self.bias)
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return strided(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self._conv_forward(input, self.weight, self.bias)

    def is_product(self) -> bool:
        """Tell whether each cell is multiplied with one matrix."""
        return self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1

    @torch.jit.ignore
    def prepared(self, x: Tensor) -> onednn.Convolve | None:
        """Return what convolves this map with this weight, made where the last is of others; None if nothing is to."""
        parameters = self._parameters  # self.weight takes eight times as long to be found
        if "weight" not in parameters or "bias" not in parameters:  # made at each call, as torch's pruning does
            return None
        weight, bias = parameters["weight"], parameters["bias"]
        if type(weight) is not nn.Parameter or weight.is_inference():  # it does not count its changes
            return None
        of, made = self.key(weight, bias, x.dtype), self._prepared
        if made is not None and made[0] != of:
            made = None
        product = self.is_product() if made is None else isinstance(made[1], int)
        if product and x.numel() * weight.shape[0] < _LEAST:
            return None
        shape = x.shape[1] if product else x.shape
        if made is None or made[1] != shape:
            if not self.can_be_laid_out(x):
                return None
            if not product and self._seen != (of, shape):
                self._seen = of, shape
                return None
            convolve, size = onednn.prepare(self, x.shape, product)
            # weight and bias are held on to, so that no others get their places in memory
            self._prepared = made = of, shape, convolve, size, (weight, weight.detach(), bias)
        return made[2]

    @torch.jit.ignore
    def key(self, weight: nn.Parameter, bias: Tensor | None, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return what tells this convolution, of maps of a type, from any other that it may become."""
        tensors = (id(weight), weight.data_ptr(), weight._version, weight.shape, weight.stride())
        added = bias if bias is None else (id(bias), bias.shape, bias.stride())
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        return dtype, tensors, weight.requires_grad and _steps, added, geometry

    @torch.jit.ignore
    def can_be_laid_out(self, x: Tensor) -> bool:
        """Tell whether oneDNN's operators compute the same of this map."""
        return (
            _fits(x, self.weight, self.bias, self.groups)
            and not self.weight.is_shared()
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and not is_misread(x, self.weight, self.stride, self.padding, self.dilation)
        )

    @torch.jit.ignore
    def kept_bytes(self) -> int:
        """Return the bytes of the weight as it is kept laid out."""
        return 0 if self._prepared is None else self._prepared[3]

    def train(self, mode: bool = True) -> "FoldedConv":
        """Set the mode, as torch does."""
        self._prepared = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "FoldedConv":
        self._prepared = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None, "_seen": None}  # opaque: it cannot be copied or saved


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
        largest = max(self.branches, key=lambda branch: branch.conv.kernel_size[0])
        side = largest.conv.kernel_size[0]
        weights, biases = zip(*(folded(branch) for branch in self.branches), strict=True)
        weight = sum(F.pad(w, [(side - w.shape[-1]) // 2] * 4) for w in weights)
        return like(largest.conv, weight, sum(biases))


def folded(branch: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a `ConvNorm`, its norm folded in; of a convolution that was folded before, as is."""
    if isinstance(branch, nn.Conv2d):
        return branch.weight, branch.bias
    bn = branch.bn
    return fuse_conv_bn_weights(
        branch.conv.weight, branch.conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )


def like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution with ``conv``'s geometry, memory format and mode, and the given weight and bias."""
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
    """Multiply the output channels of a `ConvNorm`, or of a folded convolution, by ``(out,)`` factors, in place."""
    target = conv.bn if isinstance(conv, ConvNorm) else conv
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


def num_groups(dim: int, groups: str | int) -> int:
    """Return the number of convolution groups that ``local_groups`` means at this width."""
    number = {"depthwise": dim, "dense": 1}.get(groups, groups) if isinstance(groups, str) else groups
    if not isinstance(number, int) or number < 1 or dim % number:
        raise ValueError(
            f"local_groups={groups!r} does not divide the local branch's {dim} channels; use 'depthwise', 'dense'"
            " or a divisor"
        )
    return number
