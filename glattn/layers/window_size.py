"""How large windows are: fixed, or by the nominal image, the map, or a number of tokens."""

import math

import torch
from torch import nn


class FixedSize(nn.Module):
    """Windows of a given size: ``(height, width)``, whatever the map."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, height: int, width: int) -> tuple[int, int]:
        """Return the window's height and width on a map of this height and width."""
        return self.height, self.width

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that tables of offsets are made for: the window's own."""
        return self.forward(height, width)


class ImageSize(FixedSize):
    """Windows of the nominal image's height and width, in pixels, over ``ratio``, rounded down, in cells."""

    def __init__(self, image_size: tuple[int, int], ratio: int) -> None:
        super().__init__(1, 1)
        self.ratio = ratio
        self.set_image_size(image_size)

    @torch.jit.ignore
    def set_image_size(self, image_size: tuple[int, int]) -> None:
        """Size the windows for another nominal image."""
        self.height, self.width = (max(side // self.ratio, 1) for side in image_size)


class CutSize(nn.Module):
    """Windows that cut each axis of the map into ``cuts`` parts: ``ceil(map / cuts)``."""

    def __init__(self, cuts: int) -> None:
        super().__init__()
        self.cuts = cuts

    def forward(self, height: int, width: int) -> tuple[int, int]:
        """Return the window's height and width on a map of this height and width."""
        return (height + self.cuts - 1) // self.cuts, (width + self.cuts - 1) // self.cuts

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that tables of offsets are made for: the window's own, so that they scale with the map."""
        return self.forward(height, width)


class BoundSize(nn.Module):
    """The fewest equal windows that with their halo have sides of at most ``floor(sqrt(tokens))`` cells.

    So a query never sees more than ``tokens`` cells, whatever the map.

    Raises:
        ValueError: The halo leaves no window.
    """

    def __init__(self, tokens: int, halo: int = 0) -> None:
        super().__init__()
        self.side = math.isqrt(tokens) - 2 * halo
        if self.side < 1:
            raise ValueError(
                f"window_tokens={tokens} with halo={halo} leaves no window: a halo and one cell are"
                f" {(2 * halo + 1) ** 2}; use more tokens or a smaller halo"
            )

    def forward(self, height: int, width: int) -> tuple[int, int]:
        """Return the window's height and width on a map of this height and width."""
        m, n = (height + self.side - 1) // self.side, (width + self.side - 1) // self.side
        return (height + m - 1) // m, (width + n - 1) // n

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that tables of offsets are made for: the largest, so that an offset means one distance."""
        return self.side, self.side


class StripeSize(nn.Module):
    """Stripes over the whole map: ``size`` cells wide if ``vertical``, else ``size`` cells high."""

    def __init__(self, size: int, vertical: bool) -> None:
        super().__init__()
        self.size, self.vertical = size, vertical

    def forward(self, height: int, width: int) -> tuple[int, int]:
        """Return the window's height and width on a map of this height and width."""
        return (height, self.size) if self.vertical else (self.size, width)

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """Return the size that tables of offsets are made for: the stripe's own, so that they scale with the map."""
        return self.forward(height, width)
