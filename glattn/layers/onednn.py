"""oneDNN's operators that torch's compiler uses, in inference on x86: what torch itself calls on the CPU is slower.

F.linear in fp32 is MKL's product, half as fast as oneDNN's on AMD processors whose units are 512 bits wide (on those of
256, and on Intel, the two are about level); and F.conv2d lays its weight out anew in each call, which at batch 1 takes
up to half of its time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# of a map, what is added to the answer, and whether that is rectified
Convolve = Callable[[Tensor, Tensor | None, bool], Tensor]

_OPERATORS = (
    "_linear_pointwise",
    "_reorder_linear_weight",
    "_convolution_pointwise",
    "_reorder_convolution_weight",
    "_is_mkldnn_bf16_supported",
    "_nbytes",
)


def _find() -> Any:
    """Return oneDNN's operators, if this processor and torch have them, and what tells where not to use them."""
    needed = (torch._C, "_len_torch_dispatch_stack"), (torch._C._functorch, "maybe_current_level")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(*name) for name in needed):
        return None
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    return torch.ops.mkldnn if all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS) else None


_ONEDNN = _find()
_DTYPES = {torch.float32} | ({torch.bfloat16} if _ONEDNN and _ONEDNN._is_mkldnn_bf16_supported() else set())


def takes(x: Tensor) -> bool:
    """Tell whether those operators take this map: they have no derivatives, no checks, and no mode of torch sees them.

    It is one in channels_last memory and no other; a weight is to be of the same type and its channels to fit.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first: the compiler knows none of the others
        return False
    if type(x) is not Tensor or _ONEDNN is None or torch.is_grad_enabled() or torch._C._functorch.maybe_current_level():
        return False
    shape, strides = x.shape, x.stride()
    return (
        len(shape) == 4
        and 0 not in shape
        and strides[1] == 1
        and strides[3] == shape[1]
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.is_cpu
        and x.dtype in _DTYPES
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()  # of what counts multiply-adds, say
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None = None, relu: bool = False) -> Tensor:
    """Return the matrix product of each cell with an ``(out, in)`` weight, rectified if so asked, or added to a map."""
    rows = x.permute(0, 2, 3, 1)
    if added is not None and not relu and _is_alike(added, x, weight.shape[0]):
        total: Tensor = _ONEDNN._linear_pointwise.binary(rows, added.permute(0, 2, 3, 1), weight, bias, "add")
        return total.permute(0, 3, 1, 2)
    product: Tensor = _ONEDNN._linear_pointwise(rows, weight, bias, "relu" if relu else "none", [], "")
    out = product.permute(0, 3, 1, 2)
    return out if added is None else added + out


def _is_alike(added: Tensor, x: Tensor, channels: int) -> bool:
    """Tell whether a map is a plain one of the product's type, shape and memory format."""
    return (
        type(added) is Tensor
        and added.dtype == x.dtype
        and added.shape == (x.shape[0], channels, x.shape[2], x.shape[3])
        and added.is_contiguous(memory_format=torch.channels_last)
        and added.is_cpu
    )


def prepare(conv: nn.Conv2d, shape: Sequence[int], product: bool) -> tuple[Convolve, int]:
    """Return what convolves maps of this shape, and how many bytes it keeps of the weight.

    A matrix product takes maps of any shape. With its weight laid out for another shape, a convolution of more cells
    than one can take twenty times as long.
    """
    bias = conv.bias
    if product:
        laid_out = _ONEDNN._reorder_linear_weight(conv.weight.flatten(1))
        return lambda x, added, relu: multiply(x, laid_out, bias, added, relu), _ONEDNN._nbytes(laid_out)
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    laid_out = _ONEDNN._reorder_convolution_weight(conv.weight, *geometry, shape)

    def convolve(x: Tensor, added: Tensor | None, relu: bool) -> Tensor:
        out: Tensor = _ONEDNN._convolution_pointwise(x, laid_out, bias, *geometry, "relu" if relu else "none", [], "")
        return out if added is None else added + out

    return convolve, _ONEDNN._nbytes(laid_out)
