"""torch's Conv2d, computed as what is fastest or right on a device: matrix products, strides, laid-out weights."""

from threading import Lock
from typing import Any
from weakref import WeakSet

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from glattn.layers import onednn
from glattn.layers.tracing import sizes_are_known

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


_laid_out: WeakSet["FoldedConv"] = WeakSet()
_lock = Lock()  # another thread may use a model for the first time meanwhile


def _forget(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Drop what is kept of weights that have taken a step: fused optimisers count no change of a tensor."""
    if _laid_out:
        stepped = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        with _lock:
            laid_out = list(_laid_out)
        for conv in laid_out:
            if id(conv._parameters.get("weight")) in stepped:
                conv._prepared = None


register_optimizer_step_post_hook(_forget)


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
    reach = x.shape[-1] + 2 * padding[1] - dilation[1] * (weight.shape[3] - 1)
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

    Raises:
        ValueError: There is no batch dimension, or one too many.
    """
    if x.dim() != 4:  # a model's first convolution is strided: what comes behind it would say less
        raise ValueError(f"expected 4 dimensions, (B, C, H, W), got {x.dim()}; a single image is x.unsqueeze(0)")
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
    """torch's Conv2d in a folded model, asked at a call for what stands behind it as well: a ReLU, a sum.

    In inference on x86 those are oneDNN's (a sum, where it is a matrix product), and it keeps its weight as that
    lays it out: a matrix product at once, others at the second map of one shape in a row; until the weight is another
    one, or moved, cast or changed. ``train`` and ``eval`` drop what is kept: call one after a change that torch does
    not count, through ``weight.data``, numpy, ``vector_to_parameters`` or ``torch.distributed.broadcast``.
    """

    __jit_ignored_attributes__ = ("_prepared", "_seen")
    _prepared: tuple[Any, Any, onednn.Convolve, int, Any] | None = None
    _seen: Any = None

    def forward(
        self,
        input: Tensor,  # noqa: A002 (torch's name)
        added: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Return the convolved ``(B, C, H, W)`` map, rectified if so asked, and added to another if one is given."""
        if not torch.jit.is_scripting():
            if onednn.takes(input):
                convolve = self.prepared(input)
                if convolve is not None:
                    return convolve(input, added, relu)
        out = self.convolved(input)
        if relu:
            out = F.relu(out, inplace=True)
        return out if added is None else added + out

    def convolved(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the convolved map alone."""
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
            with _lock:
                _laid_out.add(self)
        return made[2]

    @torch.jit.ignore
    def key(self, weight: nn.Parameter, bias: Tensor | None, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return what tells this convolution, of maps of a type, from any other that it may become."""
        tensors = (id(weight), weight.data_ptr(), weight._version, weight.shape, weight.stride())
        of_bias = bias if bias is None else (id(bias), bias.shape, bias.stride())
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        return dtype, tensors, of_bias, geometry

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
