"""Exchange between windows: UNetFormer's cross-shaped interaction by strip means (arXiv:2109.08937).

There the strips are fixed and the border reflected; here they are as long as the window at hand, and at the border a
mean is over the cells that exist.
"""

import torch
import torch.fx
from torch import Tensor, nn

from glattn.layers.precision import precise


@torch.fx.wrap
def strip_mean(x: Tensor, length: int, dim: int) -> Tensor:
    """Return the mean over the ``length`` cells around each cell along ``dim``, those outside the map left out.

    Cell ``i`` takes cells ``i - length // 2`` to ``i + (length - 1) // 2``. By running sums: linear in cells.
    """
    cells = x.shape[dim]
    place = torch.arange(cells, device=x.device)
    start = (place - length // 2).clamp(min=0)
    stop = (place + (length + 1) // 2).clamp(max=cells)
    total = x.to(precise(x)).cumsum(dim)
    shape = [1, 1, cells, 1] if dim == 2 else [1, 1, 1, cells]
    before = (start > 0).reshape(shape) * total.index_select(dim, (start - 1).clamp(min=0))
    return ((total.index_select(dim, stop - 1) - before) / (stop - start).reshape(shape)).to(x.dtype)


class NoExchange(nn.Module):
    """Windows stay apart."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return the ``(B, C, H, W)`` map as it is."""
        return x


class StripExchange(nn.Module):
    """The mean along a vertical strip of the window's height, plus that along a horizontal one of its width."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return the ``(B, C, H, W)`` map, ``height`` and ``width`` being the window's."""
        return strip_mean(x, height, 2) + strip_mean(x, width, 3)


CROSS_WINDOWS: dict[str, type[nn.Module]] = {"none": NoExchange, "strip": StripExchange}
