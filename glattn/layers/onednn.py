"""oneDNN's operators that torch's compiler uses, in inference on x86: what torch itself calls on the CPU is slower.

F.linear in fp32 is MKL's product, half as fast on AMD as oneDNN's (on Intel the two were not compared); and F.conv2d
lays its weight out anew in each call, which at batch 1 takes up to half of its time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_OPERATORS = (
    "_linear_pointwise",
    "_reorder_linear_weight",
    "_convolution_pointwise",
    "_reorder_convolution_weight",
    "_is_mkldnn_bf16_supported",
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

    It is one in channels_last memory; a weight is to be of the same type and its channels to fit.
    """
    return (
        not torch.compiler.is_compiling()  # first: the compiler knows none of the others
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and _ONEDNN is not None
        and not torch.is_grad_enabled()
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._functorch.maybe_current_level()
        and not torch._C._len_torch_dispatch_stack()  # of what counts multiply-adds, say
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
        and x.is_cpu
        and x.dtype in _DTYPES
        and x.ndim == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the matrix product of each cell with an ``(out, in)`` weight."""
    product: Tensor = _ONEDNN._linear_pointwise(x.permute(0, 2, 3, 1), weight, bias, "none", [], "")
    return product.permute(0, 3, 1, 2)


def prepare(conv: nn.Conv2d, shape: Sequence[int]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return a convolution for maps of this shape, as a function of map and bias: its weight is laid out in it.

    Laid out for another shape, or for none, a kernel of several cells can take twenty times as long.
    """
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    if conv.kernel_size == (1, 1) and geometry == ((0, 0), (1, 1), (1, 1), 1):
        weight = _ONEDNN._reorder_linear_weight(conv.weight.flatten(1))
        return lambda x, bias: multiply(x, weight, bias)
    weight = _ONEDNN._reorder_convolution_weight(conv.weight, *geometry, shape)
    return lambda x, bias: _ONEDNN._convolution_pointwise(x, weight, bias, *geometry, "none", [], "")
