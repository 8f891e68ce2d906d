"""Which cells see which: a layout turns a map into groups of query and key tokens, and tokens back into a map.

Windows are Swin's (arXiv:2103.14030), the grid MaxViT's (arXiv:2204.01697), the halo HaloNet's (arXiv:2103.12731),
stripes CSWin's (arXiv:2107.00652), the pooled map PVT's (arXiv:2102.12122), with pooled queries. The others differ from
those in one way: a map of any size is padded on the fly, padded cells are never attended, and shifted windows are cut
off at the border instead of wrapped around, so that one mask, which keys exist, serves every layout.

A layout is an index of the map's cells, so that a channels_last map is copied once on its way into groups, and never by
the full layout. Index arithmetic is on one flat range: a traced graph then holds for any number of groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.tracing import certain, sizes_are_known
from glattn.layers.window_size import BoundSize, CutSize, FixedSize, ImageSize, StripeSize


@torch.fx.wrap
def upsample(x: Tensor, height: int, width: int) -> Tensor:
    """Return the map resized to ``height x width`` cells, bilinearly; the map itself where it has that size."""
    if sizes_are_known():
        if x.shape[2] == height and x.shape[3] == width:
            return x
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


@torch.fx.wrap
def pad_to_multiple(x: Tensor, stride: int) -> Tensor:
    """Return the map with zeros below and right of it, up to multiples of ``stride``; itself where it has those."""
    height, width = x.shape[2], x.shape[3]
    if certain(height % stride == 0) and certain(width % stride == 0):
        return x
    # no negative number is divided: ONNX would round it up
    down = (height + stride - 1) // stride * stride - height
    right = (width + stride - 1) // stride * stride - width
    return F.pad(x, [0, right, 0, down])


@torch.fx.wrap
def unpool(x: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Return the map with each cell spread over ``stride x stride``, bilinearly, and cut to ``height x width``."""
    x = upsample(x, x.shape[2] * stride, x.shape[3] * stride)
    if certain(height % stride == 0) and certain(width % stride == 0):
        return x
    if sizes_are_known():
        return x[:, :, :height, :width]
    # in a trace the strides of such a view would tie it to the sizes it was made with
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return x.index_select(2, rows).index_select(3, columns)


@torch.fx.wrap
def group_cells(
    like: Tensor,
    groups: list[int],
    cells: list[int],
    between: list[int],
    within: list[int],
    first: list[int],
) -> tuple[Tensor, Tensor]:
    """Return which cell of a batch of maps each cell of each group is, and whether there is one: ``(groups, cells)``.

    ``like`` is the ``(B, C, H, W)`` map, whose images' groups follow each other. All lists are (vertical, horizontal):
    the groups of an image, the cells of one; the cells from a group to the next, from a cell of it to the next, and the
    place of the very first, which may lie outside the map.
    """
    batch, height, width = like.shape[0], like.shape[2], like.shape[3]
    group = torch.arange(batch * (groups[0] * groups[1]), device=like.device)
    image, group = group // (groups[0] * groups[1]), group % (groups[0] * groups[1])
    cell = torch.arange(cells[0] * cells[1], device=like.device)
    row = (group // groups[1] * between[0] + first[0]).unsqueeze(1) + (cell // cells[1] * within[0]).unsqueeze(0)
    column = (group % groups[1] * between[1] + first[1]).unsqueeze(1) + (cell % cells[1] * within[1]).unsqueeze(0)
    exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    return (image * (height * width)).unsqueeze(1) + index, exists


@torch.fx.wrap
def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the cells at ``index``, ``(groups, cells)``, of the maps: ``(B, C, H, W) -> (groups, cells, C)``."""
    rows = x.permute(0, 2, 3, 1).reshape(x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])
    return F.embedding(index, rows)


@torch.fx.wrap
def put(tokens: Tensor, index: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Return the maps whose cells stand at ``index`` of the groups: ``(groups, cells, C) -> (B, C, H, W)``."""
    rows = tokens.reshape(tokens.shape[0] * tokens.shape[1], tokens.shape[2])
    return rows.index_select(0, index).view(batch, height, width, tokens.shape[2]).permute(0, 3, 1, 2)


@torch.fx.wrap
def key_mask(exists: Tensor, outside: list[int]) -> Tensor | None:
    """Return which keys exist, ``(groups, cells)``; None where no cell lies ``outside`` the map on any side."""
    if sizes_are_known():
        if max(outside) == 0:
            return None
    return exists


def _fixed(config: MixerConfig, image_size: tuple[int, int]) -> nn.Module:
    return FixedSize(config.window_size, config.window_size)


def _image(config: MixerConfig, image_size: tuple[int, int]) -> nn.Module:
    return ImageSize(image_size, config.window_ratio)


def _map(config: MixerConfig, image_size: tuple[int, int]) -> nn.Module:
    return CutSize(config.window_ratio)


def _tokens(config: MixerConfig, image_size: tuple[int, int]) -> nn.Module:
    return BoundSize(config.window_tokens, config.halo if LAYOUTS[config.layout].sees_beyond else 0)


WINDOW_SIZINGS = {"fixed": _fixed, "image": _image, "map": _map, "tokens": _tokens}


class Full(nn.Module):
    """Every cell sees every cell. Cost: ``N^2`` scores; a channels_last map is never copied."""

    def reach(self, height: int, width: int) -> tuple[int, int]:
        """Return the reach that tables of offsets have on such a map: offsets from a query to a key are smaller."""
        return height, width

    def span(self, height: int, width: int) -> tuple[int, int, int]:
        """Return a group's height and width in queries, and how many cells its keys reach beyond them."""
        return height, width, 0

    def group(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries, keys and values as ``(groups, tokens, C)``, and which keys exist (None: all)."""
        return q.flatten(2).transpose(1, 2), k.flatten(2).transpose(1, 2), v.flatten(2).transpose(1, 2), None

    def restore(self, tokens: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Return the queries' map, ``(groups, queries, C) -> (B, C, H, W)``, channels_last."""
        return tokens.reshape(batch, height, width, tokens.shape[2]).permute(0, 3, 1, 2)


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

    def frame(self, height: int, width: int) -> tuple[int, int, int, int, int, int]:
        """Return the windows' rows, height, columns and width, and the cells missing above and left of the map."""
        h, w = self.size(height, width)
        m, n = (height + h - 1) // h, (width + w - 1) // w
        top, left = 0, 0
        if self.shifted:
            # 0 for one window, 1 for more, said without a branch on a size that may be traced; % as a window of one
            # cell has no half
            top = (h + 1) // 2 % h * ((2 * m - 2) // m)
            left = (w + 1) // 2 % w * ((2 * n - 2) // n)
            m, n = (height + top + h - 1) // h, (width + left + w - 1) // w
        return m, h, n, w, top, left

    def reach(self, height: int, width: int) -> tuple[int, int]:
        """Return the reach that tables of offsets have on such a map: offsets from a query to a key are smaller."""
        h, w = self.size.largest(height, width)
        return h + self.halo, w + self.halo

    def span(self, height: int, width: int) -> tuple[int, int, int]:
        """Return a group's height and width in queries, and how many cells its keys reach beyond them."""
        h, w = self.size(height, width)
        return h, w, self.halo

    def group(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries, keys and values as ``(groups, tokens, C)``, and which keys exist (None: all)."""
        height, width, halo = q.shape[2], q.shape[3], self.halo
        m, h, n, w, top, left = self.frame(height, width)
        cells, exists = group_cells(q, [m, n], [h, w], [h, w], [1, 1], [-top, -left])
        q = take(q, cells)
        if halo > 0:
            around, first = [h + 2 * halo, w + 2 * halo], [-top - halo, -left - halo]
            cells, exists = group_cells(k, [m, n], around, [h, w], [1, 1], first)
        outside = [top + halo, left + halo, m * h - height - top + halo, n * w - width - left + halo]
        return q, take(k, cells), take(v, cells), key_mask(exists, outside)

    def restore(self, tokens: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Return the queries' map, ``(groups, queries, C) -> (B, C, H, W)``, channels_last."""
        m, h, n, w, top, left = self.frame(height, width)
        return put(
            tokens, window_places(tokens, [batch, height, width], [m, n], [h, w], [top, left]), batch, height, width
        )


@torch.fx.wrap
def window_places(like: Tensor, size: list[int], groups: list[int], cells: list[int], first: list[int]) -> Tensor:
    """Return where each cell of a batch of maps, of ``size`` (B, H, W), stands in its windows: ``(B * H * W,)``.

    The other lists are (vertical, horizontal): windows of an image, cells of one, cells missing above and left.
    """
    place = torch.arange(size[0] * size[1] * size[2], device=like.device)
    image, row, column = place // (size[1] * size[2]), place // size[2] % size[1] + first[0], place % size[2] + first[1]
    group = (image * groups[0] + row // cells[0]) * groups[1] + column // cells[1]
    return group * (cells[0] * cells[1]) + row % cells[0] * cells[1] + column % cells[1]


class Grid(nn.Module):
    """A cell sees a grid of ``size x size`` cells spread over the whole map. Cost: ``N * size^2`` scores.

    Args:
        size: Cells of a group, an axis.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def frame(self, height: int, width: int) -> tuple[int, int]:
        """Return how far a group's cells lie apart, vertically and horizontally: also the number of groups."""
        return (height + self.size - 1) // self.size, (width + self.size - 1) // self.size

    def reach(self, height: int, width: int) -> tuple[int, int]:
        """Return the reach that tables of offsets have, in cells of the grid: offsets are smaller."""
        return self.size, self.size

    def span(self, height: int, width: int) -> tuple[int, int, int]:
        """Return a group's height and width in queries, and how many cells its keys reach beyond them."""
        return self.size, self.size, 0

    def group(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries, keys and values as ``(groups, tokens, C)``, and which keys exist (None: all)."""
        height, width, g = q.shape[2], q.shape[3], self.size
        m, n = self.frame(height, width)
        cells, exists = group_cells(q, [m, n], [g, g], [1, 1], [m, n], [0, 0])
        mask = key_mask(exists, [m * g - height, n * g - width])
        return take(q, cells), take(k, cells), take(v, cells), mask

    def restore(self, tokens: Tensor, batch: int, height: int, width: int) -> Tensor:
        """Return the queries' map, ``(groups, queries, C) -> (B, C, H, W)``, channels_last."""
        m, n = self.frame(height, width)
        return put(tokens, grid_places(tokens, [batch, height, width], [m, n], self.size), batch, height, width)


@torch.fx.wrap
def grid_places(like: Tensor, size: list[int], groups: list[int], side: int) -> Tensor:
    """Return where each cell of a batch of maps, of ``size`` (B, H, W), stands in its grids: ``(B * H * W,)``.

    ``groups`` is (vertical, horizontal): the grids of an image, and how far their cells lie apart.
    """
    place = torch.arange(size[0] * size[1] * size[2], device=like.device)
    image, row, column = place // (size[1] * size[2]), place // size[2] % size[1], place % size[2]
    group = (image * groups[0] + row % groups[0]) * groups[1] + column % groups[1]
    return group * (side * side) + row // groups[0] * side + column // groups[1]


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
    "shifted": LayoutKind(lambda config, image_size: [Window(_sizing(config, image_size), shifted=True)], sized=True),
    "grid": LayoutKind(lambda config, image_size: [Grid(config.window_size)]),
    "overlap": LayoutKind(
        lambda config, image_size: [Window(_sizing(config, image_size), halo=config.halo)],
        sized=True,
        sees_beyond=True,
    ),
    "multi_scale": LayoutKind(_multi_scale),
    "cross_shaped": LayoutKind(_cross_shaped),
}
