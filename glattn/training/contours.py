"""Pictures made by formula: scenes of a few closed contours, filled or outlined, in batches as they are asked for.

After the radial contours of RCDB (arXiv:2206.09132): a contour is a ring of corners around a point, joined by straight
lines or by waves. Where RCDB draws lines alone, a scene here is drawn as an icon is: filled or in outline, in black and
white or in colours, some contours cut out of those below them. Which way up a scene stands is part of its class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glattn.training.fractals import moved, pack_rows, read_rows

TABLE = "contours1k.csv.gz"
CLASSES, FEWEST, MOST = 1000, 2, 4  # of contours in a scene
MOST_CORNERS = 12
ALONE, CROWDED = (0.65, 1.15, 0.15), (0.3, 0.8, 0.5)  # least and largest scale, largest shift: half a side is 1
_ANGLES = 256  # at which a contour's radius is computed
_MONO = np.cumsum([0.6, 0.25, 0.15])  # in colour, black on white, white on black
_STYLE = np.cumsum([0.4, 0.4, 0.2])  # all outlined, all filled, either
_DIGITS = 4  # decimals of the table


@dataclass(frozen=True)
class Contour:
    """One contour of a scene; half a picture's side is 1.

    Args:
        x: Where it stands, to the right.
        y: Where it stands, downwards.
        size: Largest radius.
        aspect: Height as a share of width, before it is turned.
        turn: In radians.
        cut: Painted in the ground's colour when it is filled.
        smooth: Corners are joined by half waves, not by straight lines.
        radii: Of 3 to 12 corners at even angles, 1 at most.
    """

    x: float
    y: float
    size: float
    aspect: float
    turn: float
    cut: bool
    smooth: bool
    radii: tuple[float, ...]


def make_class(number: int, *, seed: int = 0) -> list[Contour]:
    """Return one class's contours, a function of the seed and the class alone."""
    rng = np.random.default_rng([seed, number])
    count = int(rng.integers(FEWEST, MOST, endpoint=True))
    return [_make_contour(rng, first=place == 0) for place in range(count)]


def _make_contour(rng: np.random.Generator, *, first: bool) -> Contour:
    reach = 0.25 if first else 0.65
    x, y = rng.uniform(-reach, reach, size=2)
    size = rng.uniform(0.5, 0.9) if first else np.exp(rng.uniform(np.log(0.15), np.log(0.6)))
    aspect = rng.uniform(0.1, 0.3) if rng.random() < 0.3 else rng.uniform(0.5, 1)
    turn = rng.integers(4) * np.pi / 4 if rng.random() < 0.5 else rng.uniform(0, 2 * np.pi)
    cut, smooth, kind = not first and rng.random() < 0.35, rng.random() < 0.5, rng.random()
    corners = int(rng.integers(3, MOST_CORNERS, endpoint=True))
    if kind < 0.35:  # regular
        radii = np.ones(corners)
    elif kind < 0.6:  # a star
        radii = np.tile([1, rng.uniform(0.3, 0.8)], max(corners // 2, 2))
    else:
        radii = rng.uniform(0.3, 1, size=corners)
        radii /= radii.max()
    x, y, size, aspect, turn, *rounded = (round(float(value), _DIGITS) for value in (x, y, size, aspect, turn, *radii))
    return Contour(x, y, size, aspect, turn, bool(cut), bool(smooth), tuple(rounded))


def pack(table: Sequence[Sequence[Contour]]) -> bytes:
    """Return a table of scenes as gzipped CSV, one row a contour."""
    rows: list[list[object]] = []
    for number, scene in enumerate(table):
        for one in scene:
            numbers = (f"{value:.{_DIGITS}f}" for value in (one.x, one.y, one.size, one.aspect, one.turn))
            radii = " ".join(f"{radius:.{_DIGITS}f}" for radius in one.radii)
            rows.append([number, *numbers, int(one.cut), int(one.smooth), radii])
    return pack_rows(["class", "x", "y", "size", "aspect", "turn", "cut", "smooth", "radii"], rows)


def read_table() -> list[list[Contour]]:
    """Return the classes that the package carries."""
    rows = read_rows(TABLE)
    scenes: list[list[Contour]] = [[] for _ in range(1 + int(rows[-1][0]))]
    for number, *frame, cut, smooth, radii in rows:
        x, y, size, aspect, turn = map(float, frame)
        corners = tuple(map(float, radii.split()))
        scenes[int(number)].append(Contour(x, y, size, aspect, turn, cut == "1", smooth == "1", corners))
    return scenes


class Draws(NamedTuple):
    """What is random of the scenes of a batch of pictures, drawn for each from a seed of its own.

    A named tuple is pinned, and sent by workers, by torch itself.

    Args:
        counts: Scenes of each picture, which come one after another: B in all.
        contours: Contours of each scene.
        frames: x, y, size, aspect and turn of each, moved by up to 0.06, 15% and 0.15: ``(B, 4, 5)``.
        corners: How many: ``(B, 4)``.
        radii: Of the corners, each changed by up to 7%: ``(B, 4, 12)``.
        smooth: See `Contour`: ``(B, 4)`` bool.
        outlined: Drawn as a line, else filled: ``(B, 4)`` bool.
        cut: See `Contour`: ``(B, 4)`` bool.
        pose: Turn by up to 0.2, scale, shift along both axes, see `ALONE`, `CROWDED`: ``(B, 4)``.
        width: Of lines, in pixels, 0.019 to 0.11 of a side: ``(B,)``.
        mono: 0: in colour (60%); 1: black on white; 2: white on black: ``(B,)``.
        colours: Of the contours and the ground: ``(B, 5, 3)``.
        shade: How much each contour's colour changes to the right and downwards, in 40%: ``(B, 4, 2)``.
        noise: Of a ground that is not plain: ``(B, 3, 4, 4)``.
        plain: ``(B,)`` bool, 60%.
        edged: What is filled has a black line around it, if in colour: ``(B,)`` bool, 30%.
    """

    counts: Sequence[int]
    contours: Sequence[int]
    frames: Tensor
    corners: Tensor
    radii: Tensor
    smooth: Tensor
    outlined: Tensor
    cut: Tensor
    pose: Tensor
    width: Tensor
    mono: Tensor
    colours: Tensor
    shade: Tensor
    noise: Tensor
    plain: Tensor
    edged: Tensor

    @classmethod
    def of(
        cls,
        scenes: Sequence[Sequence[Contour]],
        seeds: Sequence[Sequence[int]],
        counts: Sequence[int],
        *,
        side: int,
    ) -> Draws:
        """Draw for these scenes, in pictures of ``side`` pixels."""
        ends = np.cumsum([math.prod(shape) for shape in _RANDOM.values()])
        drawn = np.stack([np.random.default_rng(seed).random(ends[-1], dtype=np.float32) for seed in seeds])
        parts = np.split(drawn, ends[:-1], axis=1)
        u = {name: part.reshape(-1, *_RANDOM[name]) for name, part in zip(_RANDOM, parts, strict=True)}
        padded = _padded(scenes)
        around = 2 * u["frames"] - 1
        padded["frames"][..., [0, 1, 4]] += around[..., [0, 1, 4]] * _f32(0.06, 0.06, 0.15)
        padded["frames"][..., 2:4] *= 1 + 0.15 * around[..., 2:4]
        padded["radii"] *= 1 + 0.07 * (2 * u["radii"] - 1)
        limits = [CROWDED if count > 1 else ALONE for count in counts for _ in range(count)]
        low = _f32(*([-0.2, least, -shift, -shift] for least, _, shift in limits))
        high = _f32(*([0.2, largest, shift, shift] for _, largest, shift in limits))
        style = np.searchsorted(_STYLE, u["style"][:, :1], side="right")
        values = {
            **padded,
            "outlined": np.where(style == 2, u["style"][:, 1:] < 0.5, style == 0),
            "pose": low + u["pose"] * (high - low),
            "width": side * _f32(0.01875) * _f32(6) ** u["width"],
            "mono": np.searchsorted(_MONO, u["mono"], side="right"),
            "shade": np.where(u["shaded"][:, None, None] < 0.4, 0.8 * u["shade"] - 0.4, _f32(0)),
            "plain": u["plain"] < 0.6,
            "edged": u["edged"] < 0.3,
            **{name: u[name] for name in ("colours", "noise")},
        }
        tensors = {name: torch.from_numpy(value) for name, value in values.items()}
        return cls(tuple(counts), tuple(map(len, scenes)), **tensors)

    def to(self, device: torch.device) -> Draws:
        """Return them on a device."""
        counts, contours, *tensors = self
        return Draws(counts, contours, *(moved(value, device) for value in tensors))


_RANDOM: dict[str, tuple[int, ...]] = {  # U(0, 1) of a scene, in the order in which they are drawn
    "frames": (MOST, 5),
    "radii": (MOST, MOST_CORNERS),
    "pose": (4,),
    "style": (1 + MOST,),
    "width": (),
    "mono": (),
    "colours": (MOST + 1, 3),
    "shade": (MOST, 2),
    "shaded": (),
    "noise": (3, 4, 4),
    "plain": (),
    "edged": (),
}


def _f32(*values: float | Sequence[float]) -> np.ndarray:
    return np.array(values, np.float32)


def _padded(scenes: Sequence[Sequence[Contour]]) -> dict[str, np.ndarray]:
    """Return what `Draws` has of some scenes, of four contours each, the last ones of which may not be theirs."""
    shape = (len(scenes), MOST)
    frames, corners = np.ones((*shape, 5), np.float32), np.full(shape, 3)
    radii = np.ones((*shape, MOST_CORNERS), np.float32)
    smooth, cut = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, scene in enumerate(scenes):
        for place, one in enumerate(scene):
            at = row, place
            frames[at] = one.x, one.y, one.size, one.aspect, one.turn
            corners[at], smooth[at], cut[at] = len(one.radii), one.smooth, one.cut
            radii[row, place, : len(one.radii)] = one.radii
    return {"frames": frames, "corners": corners, "radii": radii, "smooth": smooth, "cut": cut}


def outlines(corners: Tensor, radii: Tensor, smooth: Tensor) -> Tensor:
    """Return the radii of contours at even angles from the left on, once around, ``(..., angles)``; see `Draws`."""
    angles = (torch.arange(_ANGLES + 1, device=radii.device) + _ANGLES // 2) % _ANGLES
    along = angles / _ANGLES * corners[..., None]
    first = along.long()
    part = along - first
    here, there = radii.gather(-1, first), radii.gather(-1, (first + 1) % corners[..., None])
    between = 2 * torch.pi / corners[..., None]  # of two corners, in radians
    chord = here * there * torch.sin(between)
    chord = chord / (there * torch.sin(between * (1 - part)) + here * torch.sin(between * part))
    wave = torch.lerp(here, there, (1 - torch.cos(torch.pi * part)) / 2)
    return torch.where(smooth[..., None], wave, chord)


def render(draws: Draws, side: int) -> Tensor:
    """Return pictures, ``(len(counts), 3, side, side)`` in [0, 1], on the draws' device.

    Each contour is drawn over those before it, each scene of a picture over those before it, on the first one's ground;
    in colour if the first one is.
    """
    device = draws.frames.device
    axis = (torch.arange(side, device=device) + 0.5) * (2 / side) - 1
    down, right = (part[None] for part in torch.meshgrid(axis, axis, indexing="ij"))
    tables = outlines(draws.corners, draws.radii, draws.smooth)
    start = np.cumsum([0, *draws.counts[:-1]])
    below = moved(torch.from_numpy(start), device)
    mono = draws.mono[below][:, None, None, None]
    noise = F.interpolate(draws.noise[below], size=(side, side), mode="bilinear", align_corners=True)
    ground = torch.where(draws.plain[below][:, None, None, None], draws.colours[below, MOST, :, None, None], noise)
    ground = torch.where(mono == 0, ground, (2 - mono).float())
    picture = ground.clone()
    contours = np.array(draws.contours)
    for nth, place in product(range(max(draws.counts)), range(MOST)):
        several = np.flatnonzero(np.greater(draws.counts, nth))
        shown = several[contours[start[several] + nth] > place]
        has, scene = (moved(torch.from_numpy(index), device) for index in (shown, start[shown] + nth))
        inside = _pixels_inside(right, down, draws.pose[scene], draws.frames[scene, place], tables[scene, place])
        filled = (inside + 0.5).clamp(0, 1)
        line = (draws.width[scene, None, None] / 2 - inside.abs() + 0.5).clamp(0, 1)
        outlined, cut = (flags[scene, place, None, None] for flags in (draws.outlined, draws.cut))
        coloured = mono[has] == 0
        colour = torch.where(coloured, draws.colours[scene, place, :, None, None], (mono[has] - 1).float())
        shade = draws.shade[scene, place, :, None, None] * coloured
        colour = (colour + (shade[:, :1] * right + shade[:, 1:] * down)).clamp(0, 1)
        colour = torch.where((cut & ~outlined)[:, None], ground[has], colour)
        drawn = torch.lerp(picture[has], colour, torch.where(outlined, line, filled)[:, None])
        edged = draws.edged[scene, None, None] & ~outlined & coloured[:, 0]
        picture[has] = drawn * (1 - edged * line)[:, None]
    return picture


def _pixels_inside(right: Tensor, down: Tensor, pose: Tensor, frame: Tensor, outline: Tensor) -> Tensor:
    """Return how many pixels inside a contour each pixel is, below zero outside, ``(B, side, side)``.

    To first order: near the middle of a star it is too small, so that a wide line may reach there.

    Args:
        right: Where each column is, ``(1, side, side)``.
        down: Where each row is, likewise.
        pose: See `Draws`, ``(B, 4)``.
        frame: Likewise, ``(B, 5)``.
        outline: See `outlines`, ``(B, angles)``.
    """
    turn, scale, *shift = (value[:, None, None] for value in pose.unbind(1))
    x, y, size, aspect, own_turn = (value[:, None, None] for value in frame.unbind(1))
    cos, sin, own_cos, own_sin = (turn + own_turn).cos(), (turn + own_turn).sin(), own_turn.cos(), own_turn.sin()
    right, down = right - shift[0], down - shift[1]
    across = ((cos * right + sin * down) / scale - (own_cos * x + own_sin * y)) / size
    along = ((cos * down - sin * right) / scale - (own_cos * y - own_sin * x)) / (size * aspect)
    place = (torch.atan2(along, across).flatten(1) + torch.pi) * (_ANGLES / (2 * torch.pi))
    first = place.long().clamp(max=_ANGLES - 1)
    radius = torch.lerp(outline.gather(1, first), outline.gather(1, first + 1), place - first)
    inside = radius.view_as(across) - torch.hypot(across, along)
    steep = torch.hypot(*torch.gradient(inside, dim=(1, 2)))  # which a large contour is less, and not in its middle
    return inside / steep.clamp(min=1.28 / inside.shape[-1])
