"""A learned table of absolute positions (ViT, arXiv:2010.11929), resized to any map."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from glattn.layers.precision import precise
from glattn.layers.resizing import resized
from glattn.layers.tracing import sizes_are_known


class AbsolutePosition(nn.Module):
    """``x + table``, the learned table resized (bicubic) to the map: ``(B, C, H, W)`` in and out.

    Args:
        dim: Channels.
        map_size: Height and width of the table: the map's at the nominal image size.
    """

    def __init__(self, dim: int, map_size: tuple[int, int], **factory: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, dim, *map_size, **factory))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the table anew: truncated normal, standard deviation 0.02."""
        trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map with its position."""
        return x + resize_map(self.table, x.shape[2], x.shape[3]).to(x.dtype)

    @torch.jit.ignore
    def set_map_size(self, map_size: tuple[int, int]) -> None:
        """Resize the table for another nominal image size."""
        with torch.no_grad():
            table = resize_map(self.table, *map_size)
        self.table = resized(self.table, table)

    @torch.jit.ignore
    def resize_state(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Resize a checkpoint's table to this one's size, in place."""
        table = state_dict.get(f"{prefix}table")
        if table is not None and table.ndim == 4 and table.shape[1] == self.table.shape[1]:
            state_dict[f"{prefix}table"] = resize_map(table, *self.table.shape[2:])


@torch.fx.wrap
def resize_map(table: Tensor, height: int, width: int) -> Tensor:
    """Return a ``(1, C, h, w)`` table resized to ``height x width`` cells, bicubically; itself where it fits."""
    if sizes_are_known():
        if table.shape[2] == height and table.shape[3] == width:
            return table
    wide = F.interpolate(table.to(precise(table)), size=(height, width), mode="bicubic", align_corners=False)
    return wide.to(table.dtype)
