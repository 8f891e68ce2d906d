"""Which cells see which: a layout turns a map into groups of query and key tokens, and tokens back into a map.

Windows are Swin's (arXiv:2103.14030), the grid MaxViT's (arXiv:2204.01697), the halo HaloNet's (arXiv:2103.12731),
stripes CSWin's (arXiv:2107.00652), the pooled map PVT's (arXiv:2102.12122). They differ from those in one way: a map of
any size is padded on the fly, padded cells are never attended, and shifted windows are cut off at the border
instead of wrapped around, so that one mask, which keys exist, serves every layout.

All are written for channels_last maps, where a group of rows or columns is copied once and the full layout never.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from glattn.config import MixerConfig


@torch.fx.wrap
def pad_map(x: Tensor, pad: list[int]) -> Tensor:
    """Return the map with (top, bottom, left, right) zero cells around it; itself, not a copy, where there are none."""
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():  # a traced size must not be branched on
        if pad[0] == 0 and pad[1] == 0 and pad[2] == 0 and pad[3] == 0:
            return x
    return F.pad(x, [pad[2], pad[3], pad[0], pad[1]])


@torch.fx.wrap
def upsample(x: Tensor, height: int, width: int) -> Tensor:
    """Return the map resized to ``height x width`` cells, bilinearly; the map itself where it has that size."""
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        if x.shape[2] == height and x.shape[3] == width:
            return x
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def partition(x: Tensor, m: int, height: int, n: int, width: int) -> Tensor:
    """Cut a map into windows: ``(B, C, m * height, n * width) -> (B * m * n, height * width, C)``."""
    batch, dim = x.shape[0], x.shape[1]
    x = x.permute(0, 2, 3, 1).reshape(batch * m, height, n, width, dim)
    return x.transpose(1, 2).reshape(batch * m * n, height * width, dim)


def unpartition(tokens: Tensor, batch: int, m: int, height: int, n: int, width: int) -> Tensor:
    """Undo `partition`: ``(B * m * n, height * width, C) -> (B, C, m * height, n * width)``, channels_last."""
    dim = tokens.shape[2]
    x = tokens.reshape(batch * m, n, height, width * dim).transpose(1, 2)
    return x.reshape(batch, m * height, n * width, dim).permute(0, 3, 1, 2)


@torch.fx.wrap
def existing(
    x: Tensor, pad: list[int], rows: Tensor, columns: Tensor, m: int, height: int, n: int, width: int
) -> Tensor | None:
    """Return which keys of each window are cells of the map, ``(windows, keys)`` of bool; None where all are.

    ``pad`` is (top, bottom, left, right); ``rows`` and ``columns`` pick the padded map's cells, as the keys do.
    """
    if torch.jit.is_scripting() or not torch.compiler.is_compiling():
        if pad[0] == 0 and pad[1] == 0 and pad[2] == 0 and pad[3] == 0:
            return None
    row_exists = (rows >= pad[0]) & (rows < pad[0] + x.shape[2])
    column_exists = (columns >= pad[2]) & (columns < pad[2] + x.shape[3])
    cells = row_exists.unsqueeze(1) & column_exists.unsqueeze(0)
    return partition(cells.unsqueeze(0).unsqueeze(0), m, height, n, width).squeeze(2)


@torch.fx.wrap
def steps(like: Tensor, groups: int, between: int, length: int, within: int) -> Tensor:
    """Return ``g * between + i * within`` for each of ``groups`` groups ``g`` and their ``length`` cells ``i``."""
    starts = torch.arange(groups, device=like.device) * between
    return (starts.unsqueeze(1) + torch.arange(length, device=like.device) * within).flatten()


def pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the map's cells at these rows and columns, ``(B, C, len(rows), len(columns))``, channels_last."""
    return x.permute(0, 2, 3, 1).index_select(1, rows).index_select(2, columns).permute(0, 3, 1, 2)


class FixedSize(nn.Module):
    """Windows of a given size: ``(height, width)``, whatever the map."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, height: int, width: int) -> tuple[int, int]:
        """Return the window's height and width on a map of this height and width."""
        return self.height, self.width


class CutSize(nn.Module):
    """Windows that cut each axis of the map into ``cuts`` parts: ``ceil(map / cuts)``."""

    def __init__(self, cuts: int) -> None:
        super().__init__()
        self.cuts = cuts

    def forward(self, height: int, width: int) -> tuple[int, int]:
        """Return the window's height and width on a map of this height and width."""
        return (height + self.cuts - 1) // self.cuts, (width + self.cuts - 1) // self.cuts


class BoundSize(nn.Module):
    """The fewest equal windows with sides of at most ``floor(sqrt(tokens))`` cells, so of at most ``tokens`` cells."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.side = int(tokens**0.5)

    def forward(self, height: int, width: int) -> tuple[int, int]:
        """Return the window's height and width on a map of this height and width."""
        m, n = (height + self.side - 1) // self.side, (width + self.side - 1) // self.side
        return (height + m - 1) // m, (width + n - 1) // n


class StripeSize(nn.Module):
    """Stripes over the whole map: ``size`` cells wide if ``vertical``, else ``size`` cells high."""

    def __init__(self, size: int, vertical: bool) -> None:
        super().__init__()
        self.size, self.vertical = size, vertical

    def forward(self, height: int, width: int) -> tuple[int, int]:
        """Return the window's height and width on a map of this height and width."""
        return (height, self.size) if self.vertical else (self.size, width)


def _fixed(config: MixerConfig, image_size: tuple[int, int]) -> nn.Module:
    return FixedSize(config.window_size, config.window_size)


def _image(config: MixerConfig, image_size: tuple[int, int]) -> nn.Module:
    return FixedSize(*(max(side // config.window_ratio, 1) for side in image_size))


def _map(config: MixerConfig, image_size: tuple[int, int]) -> nn.Module:
    return CutSize(config.window_ratio)


def _tokens(config: MixerConfig, image_size: tuple[int, int]) -> nn.Module:
    return BoundSize(config.window_tokens)


WINDOW_SIZINGS = {"fixed": _fixed, "image": _image, "map": _map, "tokens": _tokens}


class Full(nn.Module):
    """Every cell sees every cell. Cost: ``N^2`` scores; a channels_last map is never copied."""

    def reach(self, height: int, width: int) -> tuple[int, int]:
        """Return one more than the largest offset from a query to a key, an axis, on such a map."""
        return height, width

    def span(self, height: int, width: int) -> tuple[int, int, int]:
        """Return a group's height and width in queries, and how many cells its keys reach beyond them."""
        return height, width, 0

    def queries(self, x: Tensor) -> Tensor:
        """Return the map's query tokens, ``(B, C, H, W) -> (groups, queries, C)``."""
        return x.flatten(2).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """Return the map's key tokens, ``(B, C, H, W) -> (groups, keys, C)``."""
        return self.queries(x)

    def mask(self, x: Tensor) -> Tensor | None:
        """Return which keys exist, ``(groups of one image, keys)`` of bool; None where all do."""
        return None

    def restore(self, tokens: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Return the query tokens' map, ``(groups, queries, C) -> (B, C, H, W)``, channels_last."""
        return tokens.transpose(1, 2).reshape(batch, tokens.shape[2], height, width)


class Window(nn.Module):
    """A cell sees the cells of its window. Cost: ``N`` times the window's cells, its halo counted.

    Args:
        size: Module from a map's height and width to a window's.
        shifted: Cut the first window in half, so that the borders lie where an unshifted layout's windows have
            their middle (Swin's second kind); not along an axis that one window covers.
        halo: Cells around the window that its queries see too.
    """

    def __init__(self, size: nn.Module, *, shifted: bool = False, halo: int = 0) -> None:
        super().__init__()
        self.size, self.shifted, self.halo = size, shifted, halo

    def frame(self, height: int, width: int) -> tuple[int, int, int, int, list[int]]:
        """Return rows of windows, their height, columns, their width, and the empty cells around the map.

        The latter are counted (top, bottom, left, right) and fill the windows up.
        """
        h, w = self.size(height, width)
        m, n = (height + h - 1) // h, (width + w - 1) // w
        top, left = 0, 0
        if self.shifted:
            # 0 for one window, 1 for more, said without a branch on a size that may be traced
            top = (h + 1) // 2 * ((2 * m - 2) // m)
            left = (w + 1) // 2 * ((2 * n - 2) // n)
            m, n = (height + top + h - 1) // h, (width + left + w - 1) // w
        return m, h, n, w, [top, m * h - height - top, left, n * w - width - left]

    def reach(self, height: int, width: int) -> tuple[int, int]:
        """Return one more than the largest offset from a query to a key, an axis, on such a map."""
        h, w = self.size(height, width)
        return h + self.halo, w + self.halo

    def span(self, height: int, width: int) -> tuple[int, int, int]:
        """Return a group's height and width in queries, and how many cells its keys reach beyond them."""
        h, w = self.size(height, width)
        return h, w, self.halo

    def queries(self, x: Tensor) -> Tensor:
        """Return the map's query tokens, ``(B, C, H, W) -> (groups, queries, C)``."""
        m, h, n, w, pad = self.frame(x.shape[2], x.shape[3])
        return partition(pad_map(x, pad), m, h, n, w)

    def keys(self, x: Tensor) -> Tensor:
        """Return the map's key tokens, ``(B, C, H, W) -> (groups, keys, C)``."""
        if self.halo == 0:
            return self.queries(x)
        rows, columns, m, h, n, w, pad = self.key_cells(x)
        return partition(pick(pad_map(x, pad), rows, columns), m, h, n, w)

    def mask(self, x: Tensor) -> Tensor | None:
        """Return which keys exist, ``(groups of one image, keys)`` of bool; None where all do."""
        rows, columns, m, h, n, w, pad = self.key_cells(x)
        return existing(x, pad, rows, columns, m, h, n, w)

    def key_cells(self, x: Tensor) -> tuple[Tensor, Tensor, int, int, int, int, list[int]]:
        """Return the rows and columns of the padded map that the keys are, and `frame` with the halo counted in."""
        m, h, n, w, pad = self.frame(x.shape[2], x.shape[3])
        height, width = h + 2 * self.halo, w + 2 * self.halo
        rows, columns = steps(x, m, h, height, 1), steps(x, n, w, width, 1)
        around = [pad[0] + self.halo, pad[1] + self.halo, pad[2] + self.halo, pad[3] + self.halo]
        return rows, columns, m, height, n, width, around

    def restore(self, tokens: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Return the query tokens' map, ``(groups, queries, C) -> (B, C, H, W)``, channels_last."""
        m, h, n, w, pad = self.frame(height, width)
        return unpartition(tokens, batch, m, h, n, w)[:, :, pad[0] : pad[0] + height, pad[2] : pad[2] + width]


class Grid(nn.Module):
    """A cell sees a grid of ``size x size`` cells spread over the whole map. Cost: ``N * size^2`` scores.

    Args:
        size: Cells of a group, an axis.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def frame(self, height: int, width: int) -> tuple[int, int, list[int]]:
        """Return how far a group's cells lie apart, an axis (also the number of groups), and the empty cells."""
        m, n = (height + self.size - 1) // self.size, (width + self.size - 1) // self.size
        return m, n, [0, m * self.size - height, 0, n * self.size - width]

    def reach(self, height: int, width: int) -> tuple[int, int]:
        """Return one more than the largest offset from a query to a key, an axis, in cells of the grid."""
        return self.size, self.size

    def span(self, height: int, width: int) -> tuple[int, int, int]:
        """Return a group's height and width in queries, and how many cells its keys reach beyond them."""
        return self.size, self.size, 0

    def queries(self, x: Tensor) -> Tensor:
        """Return the map's query tokens, ``(B, C, H, W) -> (groups, queries, C)``."""
        m, n, pad = self.frame(x.shape[2], x.shape[3])
        rows, columns = steps(x, m, 1, self.size, m), steps(x, n, 1, self.size, n)
        return partition(pick(pad_map(x, pad), rows, columns), m, self.size, n, self.size)

    def keys(self, x: Tensor) -> Tensor:
        """Return the map's key tokens, ``(B, C, H, W) -> (groups, keys, C)``."""
        return self.queries(x)

    def mask(self, x: Tensor) -> Tensor | None:
        """Return which keys exist, ``(groups of one image, keys)`` of bool; None where all do."""
        m, n, pad = self.frame(x.shape[2], x.shape[3])
        rows, columns = steps(x, m, 1, self.size, m), steps(x, n, 1, self.size, n)
        return existing(x, pad, rows, columns, m, self.size, n, self.size)

    def restore(self, tokens: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Return the query tokens' map, ``(groups, queries, C) -> (B, C, H, W)``, channels_last."""
        m, n, _ = self.frame(height, width)
        x = unpartition(tokens, batch, m, self.size, n, self.size)
        # row g * size + i of x is row g + i * m of the map: the way back is the same walk, the roles exchanged
        x = pick(x, steps(x, self.size, 1, m, self.size), steps(x, self.size, 1, n, self.size))
        return x[:, :, :height, :width]


Builder = Callable[[MixerConfig, tuple[int, int]], list[nn.Module]]


@dataclass(frozen=True)
class LayoutKind:
    """A row of `LAYOUTS`.

    Args:
        build: From the options and the image's (height, width) to one layout a head group.
        sized: It takes its windows' size from ``window_sizing``.
        sees_beyond: A group's keys are more than its queries.
        pooled: It attends on a strided map.
    """

    build: Builder
    sized: bool = False
    sees_beyond: bool = False
    pooled: bool = False


def _sizing(config: MixerConfig, image_size: tuple[int, int]) -> nn.Module:
    return WINDOW_SIZINGS[config.window_sizing](config, image_size)


def _pooled(config: MixerConfig, image_size: tuple[int, int]) -> list[nn.Module]:
    return [Full() if config.window_sizing == "fixed" else Window(_sizing(config, image_size))]


def _multi_scale(config: MixerConfig, image_size: tuple[int, int]) -> list[nn.Module]:
    return [Window(FixedSize(side, side)) if side else Full() for side in config.window_sizes]


def _cross_shaped(config: MixerConfig, image_size: tuple[int, int]) -> list[nn.Module]:
    return [Window(StripeSize(config.window_size, vertical)) for vertical in (False, True)]


LAYOUTS: dict[str, LayoutKind] = {
    "full": LayoutKind(lambda config, image_size: [Full()]),
    "pooled": LayoutKind(_pooled, sized=True, pooled=True),
    "window": LayoutKind(lambda config, image_size: [Window(_sizing(config, image_size))], sized=True),
    "shifted": LayoutKind(
        lambda config, image_size: [Window(_sizing(config, image_size), shifted=True)], sized=True
    ),
    "grid": LayoutKind(lambda config, image_size: [Grid(config.window_size)]),
    "overlap": LayoutKind(
        lambda config, image_size: [Window(_sizing(config, image_size), halo=config.halo)],
        sized=True,
        sees_beyond=True,
    ),
    "multi_scale": LayoutKind(_multi_scale),
    "cross_shaped": LayoutKind(_cross_shaped),
}
