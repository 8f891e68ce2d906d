"""Pictures made by formula: fractals of a thousand iterated function systems, drawn in batches as they are asked for.

After FractalDB (arXiv:2101.08515), the systems sampled as by Anderson and Farrell (arXiv:2110.03091). A system is two
to four affine maps ``x -> A x + t``; its picture is the set that they map onto itself, found by the chaos game. Nothing
here is a photograph: no licence, no privacy.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glattn.files import gzipped

TABLE = "fractals1k.csv.gz"
CLASSES, MOST_MAPS = 1000, 4
SETTLING, STEPS = 12, 16  # steps of a walk before its points count, and that count
CHAINS = 256  # walks at once, for 64 x 64 pixels: 4096 points; as many a pixel at other sizes
ALONE, CROWDED = (0.8, 1.6, 0.3), (0.35, 1.0, 0.6)  # least and largest scale, largest shift: half a picture's side is 1
_MONO = np.cumsum([0.7, 0.15, 0.15])  # in colour, black on white, white on black
_DIGITS = 5  # decimals of the table: coarser than the last bits in which machines differ


def make_class(number: int, *, seed: int = 0) -> np.ndarray:
    """Return one class's maps, ``(n, 6)``: rows of A, then t; a function of the seed and the class alone.

    Singular values s1 >= s2 of U(0, 1), rotations and signs at random, t of U(-1, 1); taken where the sum of s1 + 2 s2
    lies in [(5 + n) / 2, (6 + n) / 2] and the picture fills 0.08 to 0.6 of its square.
    """
    rng = np.random.default_rng([seed, number])
    n = int(rng.integers(2, MOST_MAPS, endpoint=True))
    while True:
        values = np.sort(rng.uniform(size=(n, 2)))[:, ::-1]
        if not (5 + n) / 2 <= (values @ [1.0, 2.0]).sum() <= (6 + n) / 2:
            continue
        turns = rng.uniform(0, 2 * np.pi, size=(2, n))
        signs = rng.choice([-1.0, 1.0], size=(n, 2))
        cos, sin = np.cos(turns), np.sin(turns)
        left, right = (np.array([[c, -s], [s, c]]).transpose(2, 0, 1) for c, s in zip(cos, sin, strict=True))
        matrices = left @ (values[:, :, None] * right) * signs[:, None, :]
        maps = np.concatenate([matrices.reshape(n, 4), rng.uniform(-1, 1, size=(n, 2))], axis=1).round(_DIGITS)
        if 0.08 <= _fill(maps) <= 0.6:
            return maps


def _fill(maps: np.ndarray) -> float:
    """Return the share of a 64 x 64 square that the picture of a system fills, fitted into it."""
    uniform = np.random.default_rng(0).random((1, SETTLING + STEPS, CHAINS))
    padded, shares = systems([maps])
    points = fitted(walk(torch.from_numpy(padded), torch.from_numpy(choose(shares, uniform))))
    if not torch.isfinite(points).all():
        return 0.0
    cells = ((points + 1) * 32).floor().clamp(0, 63)
    return len(torch.unique(cells[..., 0] * 64 + cells[..., 1])) / 64**2


def pack(table: Sequence[np.ndarray]) -> bytes:
    """Return a table of systems as gzipped CSV, one row a map."""
    rows = ([number, *(f"{value:.{_DIGITS}f}" for value in row)] for number, maps in enumerate(table) for row in maps)
    return pack_rows(["class", "a", "b", "c", "d", "e", "f"], rows)


def read_table() -> list[np.ndarray]:
    """Return the classes that the package carries."""
    rows = read_rows(TABLE)
    maps: list[list[list[float]]] = [[] for _ in range(1 + int(rows[-1][0]))]
    for number, *values in rows:
        maps[int(number)].append([float(value) for value in values])
    return [np.array(rows) for rows in maps]


def pack_rows(head: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Return rows as gzipped CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return gzipped(text.getvalue())


def read_rows(table: str) -> list[list[str]]:
    """Return the rows of a table that the package carries, without its head."""
    text = gzip.decompress(resources.files("glattn.training").joinpath(table).read_bytes()).decode()
    return list(csv.reader(io.StringIO(text)))[1:]


def systems(maps: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return maps ``(B, 4, 6)``, and the shares of each ``(B, 4)`` summed up: by its area, a hundredth at least."""
    padded = np.zeros((len(maps), MOST_MAPS, 6))
    shares = np.zeros((len(maps), MOST_MAPS))
    for number, rows in enumerate(maps):
        padded[number, : len(rows)] = rows
        shares[number, : len(rows)] = np.maximum(np.abs(rows[:, 0] * rows[:, 3] - rows[:, 1] * rows[:, 2]), 0.01)
    summed = np.cumsum(shares, axis=1)
    return padded, summed / summed[:, -1:]


def choose(shares: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return which map each chain takes at each step, ``(B, steps, chains)`` uint8.

    Args:
        shares: ``(B, 4)``, summed up.
        uniform: ``(B, steps, chains)``, of U(0, 1).
    """
    thresholds = shares.astype(uniform.dtype)[:, :, None, None]
    chosen = np.zeros(uniform.shape, np.uint8)
    for number in range(MOST_MAPS - 1):
        chosen += uniform >= thresholds[:, number]
    return chosen


def walk(maps: Tensor, chosen: Tensor) -> Tensor:
    """Play the chaos game: ``(B, steps * chains, 2)`` points, of the steps after the first `SETTLING`.

    Args:
        maps: ``(B, 4, 6)``.
        chosen: See `choose`.
    """
    x = y = maps.new_zeros(len(chosen), chosen.shape[2])
    points = []
    for step in range(chosen.shape[1]):
        a, b, c, d, e, f = maps.gather(1, chosen[:, step, :, None].long().expand(-1, -1, 6)).unbind(-1)
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= SETTLING:
            points.append(torch.stack([x, y], dim=-1))
    return torch.cat(points, dim=1)


def fitted(points: Tensor) -> Tensor:
    """Return points moved and scaled into [-1, 1], the longer side filling it."""
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    factor = 2 / (high - low).amax(-1, keepdim=True).clamp(min=1e-6)
    return (points - (low + high) / 2) * factor


@dataclass(frozen=True)
class Draws:
    """What is random of the fractals of a batch of pictures, drawn for each from a seed of its own.

    Args:
        counts: Fractals of each picture, which come one after another: B in all.
        maps: Its system, one map of it scaled by U(0.85, 1.05), though never to expand: ``(B, 4, 6)``.
        chosen: See `choose`.
        pose: Turn or flip (0 to 7), scale, shift along both axes, see `ALONE`, `CROWDED`: ``(B, 4)``.
        colours: Two of the figure's: ``(B, 2, 3)``.
        noise: Of the ground, and of the figure's shading: ``(B, 4, 5, 5)``.
        mono: 0: in colour (70%); 1: black on white; 2: white on black: ``(B,)``.
    """

    counts: Sequence[int]
    maps: Tensor
    chosen: Tensor
    pose: Tensor
    colours: Tensor
    noise: Tensor
    mono: Tensor

    @classmethod
    def of(
        cls,
        maps: Sequence[np.ndarray],
        seeds: Sequence[Sequence[int]],
        counts: Sequence[int],
        *,
        side: int,
    ) -> Draws:
        """Draw for fractals of these systems, in pictures of ``side`` pixels."""
        chains = max(CHAINS * side**2 // 64**2, 16)
        crowded = [count > 1 for count in counts for _ in range(count)]
        drawn: list[list[np.ndarray]] = [[] for _ in range(6)]
        uniform = np.empty((len(maps), SETTLING + STEPS, chains), np.float32)
        for own, rows, seed, among_others in zip(uniform, maps, seeds, crowded, strict=True):
            least, largest, shift = CROWDED if among_others else ALONE
            rng = np.random.default_rng(seed)
            number, factor = rng.integers(len(rows)), rng.uniform(0.85, 1.05)
            rng.random(out=own, dtype=np.float32)
            values = (
                number,
                factor,
                np.array([rng.integers(8), rng.uniform(least, largest), *rng.uniform(-shift, shift, size=2)]),
                rng.uniform(size=(2, 3)),
                rng.uniform(size=(4, 5, 5)),
                np.searchsorted(_MONO, rng.random(), side="right"),
            )
            for column, value in zip(drawn, values, strict=True):
                column.append(np.asarray(value))
        numbers, factors, *others = (np.stack(column) for column in drawn)
        padded, shares = systems(_changed(maps, numbers, factors))
        chosen = torch.from_numpy(choose(shares, uniform))
        return cls(counts, torch.from_numpy(padded).float(), chosen, *(torch.from_numpy(a).float() for a in others))

    def to(self, device: torch.device) -> Draws:
        """Return them on a device."""
        return self._each(lambda value: moved(value, device))

    def pin_memory(self) -> Draws:
        """Return them in page-locked memory; torch's `DataLoader` calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Draws:
        tensors: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if name != "counts"}
        return replace(self, **tensors)


def _changed(maps: Sequence[np.ndarray], numbers: np.ndarray, factors: np.ndarray) -> list[np.ndarray]:
    """Return systems with one map of each scaled by a factor, though never to expand."""
    scaled = np.stack([rows[number, :4] for rows, number in zip(maps, numbers, strict=True)])
    scaled *= np.minimum(factors, 0.99 / np.linalg.norm(scaled.reshape(-1, 2, 2), 2, axis=(1, 2)))[:, None]
    changed = [rows.copy() for rows in maps]
    for rows, number, row in zip(changed, numbers, scaled, strict=True):
        rows[number, :4] = row
    return changed


def render(draws: Draws, side: int) -> Tensor:
    """Return pictures, ``(len(counts), 3, side, side)`` in [0, 1], on the draws' device.

    Each fractal of a picture is drawn over those before it, on the first one's ground; in colour if the first one is.
    """
    points = fitted(walk(draws.maps, draws.chosen))
    kind = draws.pose[:, 0].long()[:, None, None]
    points = torch.where(kind % 2 == 1, points.flip(-1), points)
    signs = torch.stack([1 - 2 * (kind // 2 % 2), 1 - 2 * (kind // 4)], dim=-1).squeeze(1)
    points = points * signs * draws.pose[:, None, 1:2] + draws.pose[:, None, 2:]
    cells = ((points + 1) * (side / 2)).floor()
    inside = ((cells >= 0) & (cells < side)).all(-1)
    index = torch.where(inside, cells[..., 0] * side + cells[..., 1], 0).long()
    hits = torch.zeros(len(points), side * side, device=points.device).scatter_add_(1, index, inside.float())
    figure = (1 - torch.exp(-hits)).view(-1, 1, side, side)
    smooth = F.interpolate(draws.noise, size=(side, side), mode="bilinear", align_corners=True)
    first, second = draws.colours[:, :, :, None, None].unbind(1)
    ink, ground = torch.lerp(first, second, smooth[:, 3:]), smooth[:, :3]
    start = np.cumsum([0, *draws.counts[:-1]])
    below = moved(torch.from_numpy(start), points.device)  # an array would be moved too, and waited for
    mono = draws.mono[below][:, None, None, None]
    picture = torch.where(mono == 0, ground[below], 2 - mono)
    for place in range(max(draws.counts)):
        shown = np.flatnonzero(np.greater(draws.counts, place))
        has, fractal = (moved(torch.from_numpy(index), points.device) for index in (shown, start[shown] + place))
        colour = torch.where(mono[has] == 0, ink[fractal], mono[has] - 1)
        picture[has] = torch.lerp(picture[has], colour, figure[fractal])
    return picture


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device: on CUDA without waiting for it, where what is moved may be freed at once."""
    return value.to(device, non_blocking=device.type == "cuda")
