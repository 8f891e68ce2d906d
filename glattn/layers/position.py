"""Where a cell is: encodings of queries and keys, biases of their scores, and an encoding of the map itself.

Relative bias: Swin (arXiv:2103.14030); log-spaced continuous bias: Swin v2 (arXiv:2111.09883); rotary: RoFormer
(arXiv:2104.09864), axial and mixed in 2-D: Heo et al. (arXiv:2403.13298); convolution: CPVT (arXiv:2102.10882). They
differ from those in that nothing is tied to a size: tables are interpolated and rotations computed for the map at hand.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat, trunc_normal_
from torch import Tensor, nn

from glattn.layers.conv import ConvNorm, conv_of, folded, like
from glattn.layers.precision import precise
from glattn.layers.resizing import resized
from glattn.layers.tracing import sizes_are_known


class NoPosition(nn.Module):
    """No position: content alone decides. Also what the other encodings leave as it is.

    What differs from it is a `forward`: tools that move or remake parameters do so when their module is called.

    Args:
        num_heads: Heads of the group.
        head_dim: Channels a head.
        reach: One more than the largest offset from a query to a key, an axis, at the nominal image size.
    """

    def __init__(self, num_heads: int, head_dim: int, reach: tuple[int, int], **factory: Any) -> None:
        super().__init__()

    def encode(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps of queries and keys, ``(B, heads * head_dim, H, W)`` each, with their position."""
        return q, k

    def bias(self, like: Tensor, span: tuple[int, int, int], reach: tuple[int, int]) -> Tensor | None:
        """Return what is added to a group's scores, ``(heads, queries, keys)``.

        ``span`` is the group's (height, width, halo): its keys are its queries' cells and ``halo`` more on every side.
        ``reach`` is that of the layout's tables on this map. ``like`` gives the type.
        """
        return None


def at_least_two(size: int) -> int:
    """Return ``max(size, 2)`` of a positive size, without a branch on it: it may be traced."""
    return size + 1 // size


@torch.fx.wrap
def resize_table(table: Tensor, height: int, width: int) -> Tensor:
    """Return a ``(heads, 2R - 1, 2S - 1)`` table resized to reaches ``height`` and ``width``: its centre stays.

    A reach is at least 2: a single row would be resized from the table's edge.
    """
    rows, columns = 2 * at_least_two(height) - 1, 2 * at_least_two(width) - 1
    if sizes_are_known():
        if table.shape[1] == rows and table.shape[2] == columns:
            return table
    wide = table.to(precise(table)).unsqueeze(0)
    wide = F.interpolate(wide, size=(rows, columns), mode="bicubic", align_corners=True)
    return wide.squeeze(0).to(table.dtype)


@torch.fx.wrap
def pairs(table: Tensor, span: tuple[int, int, int]) -> Tensor:
    """Return ``out[:, query, key] = table[:, query - key]``, ``(heads, queries, keys)``.

    ``table`` is ``(heads, 2 R - 1, 2 S - 1)``, its centre standing for no offset; ``span`` is (height, width, halo).
    """
    height, width, halo = span
    rows, columns = table.shape[1], table.shape[2]
    query = torch.arange(height * width, device=table.device).unsqueeze(1)
    key = torch.arange((height + 2 * halo) * (width + 2 * halo), device=table.device).unsqueeze(0)
    down = query // width - key // (width + 2 * halo) + (halo + rows // 2)
    across = query % width - key % (width + 2 * halo) + (halo + columns // 2)
    out = F.embedding(down * columns + across, table.flatten(1).t())
    return out.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


class ScoreBias(NoPosition):
    """What adds to the scores: `forward` is the bias."""

    def bias(self, like: Tensor, span: tuple[int, int, int], reach: tuple[int, int]) -> Tensor | None:
        """Return what is added to the scores, ``(heads, queries, keys)``."""
        bias: Tensor = self(like, span, reach)
        return bias


class RelativeBias(ScoreBias):
    """``scores += table[head, query - key]``: one learned number a head and offset, resized to the group at hand."""

    def __init__(self, num_heads: int, head_dim: int, reach: tuple[int, int], **factory: Any) -> None:
        super().__init__(num_heads, head_dim, reach)
        rows, columns = (2 * at_least_two(size) - 1 for size in reach)
        self.table = nn.Parameter(torch.empty(num_heads, rows, columns, **factory))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the table anew: truncated normal, standard deviation 0.02."""
        trunc_normal_(self.table, std=0.02)

    @torch.jit.ignore
    def set_reach(self, reach: tuple[int, int]) -> None:
        """Resize the table for another nominal image size."""
        with torch.no_grad():
            table = resize_table(self.table, *reach)
        self.table = resized(self.table, table)

    @torch.jit.ignore
    def resize_state(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Resize a checkpoint's table to this one's size, in place."""
        table = state_dict.get(f"{prefix}table")
        if table is not None and table.ndim == 3 and table.shape[0] == self.table.shape[0]:
            reach = [(size + 1) // 2 for size in self.table.shape[1:]]
            state_dict[f"{prefix}table"] = resize_table(table, *reach)

    def forward(self, like: Tensor, span: tuple[int, int, int], reach: tuple[int, int]) -> Tensor:
        """Return what is added to the scores, ``(heads, queries, keys)``."""
        return pairs(resize_table(self.table, reach[0], reach[1]), span).to(like.dtype)


@torch.fx.wrap
def log_offsets(height: int, width: int, largest: Tensor) -> Tensor:
    """Return the offsets within a reach of ``height x width`` cells, ``(2 height - 1, 2 width - 1, 2)``.

    Log-spaced as in Swin v2: ``sign(d) log2(1 + 8 |d| / largest) / 3``, ``largest`` being ``(2,)`` for y and x.
    """
    rows = torch.arange(2 * height - 1, device=largest.device) - (height - 1)
    columns = torch.arange(2 * width - 1, device=largest.device) - (width - 1)
    rows = rows.to(largest.dtype).unsqueeze(1).expand(-1, columns.shape[0])
    columns = columns.to(largest.dtype).expand(rows.shape[0], -1)
    steps = torch.stack([rows, columns], dim=-1) * 8.0 / largest
    return torch.sign(steps) * torch.log2(1.0 + steps.abs()) / 3.0


class ContinuousBias(ScoreBias):
    """``scores += 16 sigmoid(mlp(log-spaced offset))``: a function of the offset, so of no size (Swin v2).

    The largest offset that it was made for goes with the weights: at any other size an offset means the same.

    Args:
        num_heads: Heads of the group.
        head_dim: Channels a head.
        reach: The reach whose largest offset stands at log2(9) / 3; larger groups go beyond it.
    """

    def __init__(self, num_heads: int, head_dim: int, reach: tuple[int, int], **factory: Any) -> None:
        super().__init__(num_heads, head_dim, reach)
        self.reach = reach
        self.register_buffer("largest", torch.empty(2, **factory))
        self.mlp = nn.Sequential(
            nn.Linear(2, 512, **factory), nn.ReLU(), nn.Linear(512, num_heads, bias=False, **factory)
        )
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Set the largest offset to the one that the module was made for."""
        for axis, size in enumerate(self.reach):
            self.largest[axis] = max(size - 1, 1)

    def forward(self, like: Tensor, span: tuple[int, int, int], reach: tuple[int, int]) -> Tensor:
        """Return what is added to the scores, ``(heads, queries, keys)``."""
        places = log_offsets(reach[0], reach[1], self.largest)
        table = 16.0 * torch.sigmoid(self.mlp(places)).permute(2, 0, 1)
        return pairs(table, span).to(like.dtype)


@torch.fx.wrap
def axial_frequencies(like: Tensor, head_dim: int, base: float) -> Tensor:
    """Return ``(2, 1, head_dim / 2)`` frequencies in radians a cell: half of the pairs turn with y, half with x."""
    bands = torch.arange(head_dim // 4, device=like.device, dtype=precise(like)) * (-4.0 * math.log(base) / head_dim)
    bands, zeros = bands.exp(), torch.zeros_like(bands)
    return torch.stack([torch.cat([bands, zeros]), torch.cat([zeros, bands])]).unsqueeze(1)


@torch.fx.wrap
def rotate(x: Tensor, frequencies: Tensor, num_heads: int) -> Tensor:
    """Turn each pair of a head's channels by its cell's angle: ``(B, heads * head_dim, H, W)`` in and out.

    ``frequencies`` is ``(2, heads or 1, head_dim / 2)`` for y and x. Angles and products are at least float32.
    """
    _, dim, height, width = x.shape
    frequencies = frequencies.to(precise(x))
    rows = torch.arange(height, device=x.device, dtype=frequencies.dtype).reshape(-1, 1, 1, 1)
    columns = torch.arange(width, device=x.device, dtype=frequencies.dtype).reshape(1, -1, 1, 1)
    angles = (rows * frequencies[0] + columns * frequencies[1]).flatten(0, 1)
    angles = torch.stack([angles, angles], -1).flatten(2)  # repeat_interleave: wrong in the older export to ONNX
    table = torch.cat([angles.sin(), angles.cos()], -1)
    tokens = x.flatten(2).transpose(1, 2).reshape(-1, height * width, num_heads, dim // num_heads)
    turned = apply_rot_embed_cat(tokens, table).to(x.dtype)
    return turned.flatten(2).transpose(1, 2).reshape(-1, dim, height, width)


class AxialRotary(NoPosition):
    """Queries and keys turned by angles that grow with y in half of the channel pairs, with x in the other half.

    Scores then depend on offsets alone; norms are kept. Frequencies fall from 1 radian a cell towards 1/100,
    the nearer to it the wider a head is.

    Raises:
        ValueError: ``head_dim`` is no multiple of 4.
    """

    def __init__(self, num_heads: int, head_dim: int, reach: tuple[int, int], **factory: Any) -> None:
        super().__init__(num_heads, head_dim, reach)
        if head_dim % 4:
            raise ValueError(
                f"position='rope' turns pairs of channels in y and in x: head_dim={head_dim} is no multiple of 4;"
                " choose another head_dim or num_heads"
            )
        self.num_heads, self.head_dim = num_heads, head_dim

    def frequencies(self, x: Tensor) -> Tensor:
        """Return the turn a cell, in radians, ``(2, heads or 1, head_dim / 2)``, for y and x."""
        return axial_frequencies(x, self.head_dim, 100.0)

    def encode(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps of queries and keys, turned."""
        turned: tuple[Tensor, Tensor] = self(q, k)
        return turned

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return `encode`."""
        frequencies = self.frequencies(q)
        return rotate(q, frequencies, self.num_heads), rotate(k, frequencies, self.num_heads)


class MixedRotary(AxialRotary):
    """`AxialRotary` with learned frequencies, a head and a pair each, so that pairs turn along any direction."""

    def __init__(self, num_heads: int, head_dim: int, reach: tuple[int, int], **factory: Any) -> None:
        super().__init__(num_heads, head_dim, reach)
        self.freqs = nn.Parameter(torch.empty(2, num_heads, head_dim // 2, **factory))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the frequencies anew: axial ones (base 10) turned to a random direction, one a head."""
        half = self.head_dim // 4
        bands = 10.0 ** -(torch.arange(half, dtype=torch.float32) / half)
        turns = torch.rand(self.num_heads, 1) * (2 * math.pi)
        along = torch.cat([bands * turns.cos(), bands * (turns + math.pi / 2).cos()], -1)
        across = torch.cat([bands * turns.sin(), bands * (turns + math.pi / 2).sin()], -1)
        with torch.no_grad():
            self.freqs.copy_(torch.stack([along, across]))

    def frequencies(self, x: Tensor) -> Tensor:
        """Return the turn a cell, in radians, ``(2, heads or 1, head_dim / 2)``, for y and x."""
        return self.freqs


class ConvPosition(nn.Module):
    """``x + BatchNorm(depthwise 3x3(x))`` on the attended map: zero padding tells where its border is.

    Args:
        dim: Channels in and out.
    """

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.conv = ConvNorm(dim, dim, kernel_size=3, groups=dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Return the ``(B, C, H, W)`` map with its position."""
        return x + self.conv(x)

    @torch.jit.ignore
    def fuse(self) -> nn.Conv2d:
        """Return the one convolution that this module computes in evaluation mode."""
        weight, bias = folded(self.conv)
        centre = F.pad(torch.ones_like(weight[:, :, :1, :1]), [1, 1, 1, 1])
        return like(conv_of(self.conv), weight + centre, bias)


def _identity(dim: int, **factory: Any) -> nn.Module:
    return nn.Identity()


@dataclass(frozen=True)
class PositionKind:
    """A row of `POSITIONS`.

    Args:
        group: Encoding of a head group's queries and keys, and bias of its scores.
        embed: From a width to the encoding of the attended map, before queries and keys are made.
        adds_bias: It adds to the scores.
    """

    group: type[NoPosition] = NoPosition
    embed: Callable[..., nn.Module] = _identity
    adds_bias: bool = False


POSITIONS: dict[str, PositionKind] = {
    "none": PositionKind(),
    "bias": PositionKind(RelativeBias, adds_bias=True),
    "cpb": PositionKind(ContinuousBias, adds_bias=True),
    "rope": PositionKind(AxialRotary),
    "rope_mixed": PositionKind(MixedRotary),
    "conv": PositionKind(embed=ConvPosition),
}
