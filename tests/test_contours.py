"""Contours: the table from its seed, outlines and pictures against polygons by hand."""

import gzip
from importlib import resources

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Polygon

from glattn.training import contours
from glattn.training.contours import Contour, Draws

SIDE = 96


@pytest.fixture(scope="module")
def table():
    return contours.read_table()


def test_the_file_is_made_from_its_seed_to_the_bit(table):
    file = resources.files("glattn.training").joinpath(contours.TABLE).read_bytes()
    made = [contours.make_class(number) for number in range(contours.CLASSES)]
    assert gzip.decompress(contours.pack(made)) == gzip.decompress(file)
    assert made == table
    assert contours.make_class(0, seed=1) != table[0]


def test_every_scene_is_one_that_is_asked_for(table):
    assert {len(scene) for scene in table} == {2, 3, 4}
    assert len(set(map(tuple, table))) == len(table) == contours.CLASSES
    for first, *others in table:
        assert 0.5 <= first.size <= 0.9
        assert not first.cut
        for one in (first, *others):
            assert 3 <= len(one.radii) <= 12
            assert max(one.radii) == 1
            assert min(one.radii) >= 0.3
            assert 0.1 <= one.aspect <= 1
    every = [one for _, *others in table for one in others]
    assert 0.3 < np.mean([one.cut for one in every]) < 0.4
    assert 0.45 < np.mean([one.smooth for one in every]) < 0.55


def quiet(draws: Draws, **changes: torch.Tensor) -> Draws:
    """Return draws of scenes unposed, black, filled, on white."""
    still = torch.tensor([0.0, 1, 0, 0]).expand(len(draws.contours), 4)
    none, black = torch.zeros_like(draws.outlined), torch.ones_like(draws.mono)
    return draws._replace(**{"pose": still, "outlined": none, "cut": none, "mono": black, **changes})


def corners_of(frame: torch.Tensor, radii: list[float], pose: torch.Tensor, side: int) -> np.ndarray:
    """Return a contour's corners in pixels, by one rotation after another."""
    x, y, size, aspect, own_turn = frame.tolist()
    turn, scale, right, down = pose.tolist()
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array(radii)[:, None] * [size, size * aspect]
    for angle, shift, factor in ((own_turn, (x, y), 1.0), (turn, (0, 0), scale)):
        cos, sin = np.cos(angle), np.sin(angle)
        points = (points @ np.array([[cos, sin], [-sin, cos]]) + shift) * factor
    return (points + [right, down] + 1) * side / 2


@pytest.mark.parametrize("pose", [(0.0, 1.0, 0.0, 0.0), (0.2, 0.7, 0.1, -0.15)])
def test_straight_contours_are_polygons(pose):
    shapes = [(1.0,) * 3, (1.0,) * 4, (1.0, 0.4) * 5, (0.5, 1.0, 0.7, 0.4, 0.9)]
    scenes = [[Contour(0.1, -0.05, 0.7, 0.6, 0.4, False, False, radii)] for radii in shapes]
    draws = Draws.of(scenes, [[1, n] for n in range(4)], [1] * 4, side=SIDE)
    draws = quiet(draws, pose=torch.tensor(pose).expand(4, 4))
    pictures = contours.render(draws, SIDE)
    assert torch.equal(pictures[:, 0], pictures[:, 2])
    centres = np.stack(np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5), -1).reshape(-1, 2)
    for number, radii in enumerate(shapes):
        drawn = draws.radii[number, 0, : len(radii)].tolist()
        corners = corners_of(draws.frames[number, 0], drawn, draws.pose[number], SIDE)
        inside = Polygon(corners).contains_points(centres).reshape(SIDE, SIDE)
        ink = 1 - pictures[number, 0].numpy()
        assert inside.sum() > 300
        assert np.abs(ink - inside).sum() < 0.6 * np.linalg.norm(corners - np.roll(corners, 1, 0), axis=1).sum()
        assert np.mean((ink > 0.5) != inside) < 0.01


def test_smooth_contours_wave_between_their_corners():
    corners, radii = torch.tensor([4]), torch.tensor([[1, 0.4, 0.8, 0.6] + [1.0] * 8])
    smooth, straight = (contours.outlines(corners, radii, torch.tensor([flag]))[0] for flag in (True, False))
    # from the left on, which is the third corner's
    assert smooth[::64].tolist() == pytest.approx([0.8, 0.6, 1, 0.4, 0.8])
    assert straight[::64].tolist() == pytest.approx([0.8, 0.6, 1, 0.4, 0.8])
    assert smooth[32::64].tolist() == pytest.approx([0.7, 0.8, 0.7, 0.6])


@pytest.mark.parametrize("side", [48, 224])
@pytest.mark.parametrize("radius", [0.4, 0.9])
def test_lines_are_as_wide_as_drawn(side, radius):
    circle = [[Contour(0, 0, radius, 1, 0, False, True, (1.0,) * 5)]]
    draws = Draws.of(circle, [[3]], [1], side=side)
    frame = torch.tensor([0.0, 0, radius, 1, 0]).expand_as(draws.frames)
    for width in (2.0, 6.0):
        line = quiet(draws, frames=frame, radii=torch.ones_like(draws.radii), width=torch.tensor([width]),
                     outlined=torch.ones_like(draws.outlined))  # fmt: skip
        ink = float((1 - contours.render(line, side)[0, 0]).sum())
        assert ink == pytest.approx(2 * np.pi * radius * side / 2 * width, rel=0.03)


def test_what_is_cut_shows_the_ground_and_is_a_line_where_it_is_outlined():
    scene = [Contour(0, 0, 0.8, 1, 0, False, True, (1.0,) * 6), Contour(0, 0, 0.4, 1, 0, True, True, (1.0,) * 6)]
    draws = Draws.of([scene], [[5]], [1], side=SIDE)
    middle = SIDE // 2
    cut = torch.tensor([[False, True, False, False]])
    assert contours.render(quiet(draws), SIDE)[0, 0, middle, middle] == 0
    holed = contours.render(quiet(draws, cut=cut), SIDE)[0, 0]
    assert holed[middle, middle] == 1
    assert holed[middle, int(middle * 1.6)] == 0
    lines = torch.ones_like(cut)
    outlined = contours.render(quiet(draws, cut=cut, outlined=lines, width=torch.tensor([2.0])), SIDE)[0, 0]
    assert outlined[middle, middle] == 1
    row = outlined[middle] < 0.5
    assert int((row[1:] & ~row[:-1]).sum()) == 4  # two rings
    coloured = quiet(draws, cut=cut, mono=torch.zeros(1, dtype=torch.int64), plain=torch.tensor([True]))
    picture = contours.render(coloured._replace(edged=torch.tensor([False])), SIDE)[0]
    assert picture[:, middle, middle].tolist() == pytest.approx(draws.colours[0, contours.MOST].tolist())
    edges = contours.render(coloured._replace(edged=torch.tensor([True])), SIDE)[0]
    assert (edges <= picture + 1e-6).all()
    assert (edges.amax(0) < 0.01).sum() > 100


def test_scenes_are_drawn_one_over_the_other(table):
    """On the first one's ground, all without colour if the first has none."""
    two = Draws.of([table[1], table[2]], [[3, 0], [3, 1]], [2], side=SIDE)
    two = two._replace(cut=torch.zeros_like(two.cut), edged=torch.zeros_like(two.edged))
    for mono in range(3):
        picture = contours.render(two._replace(mono=torch.tensor([mono, 0])), SIDE)[0]
        parts = [Draws((1,), two.contours[n : n + 1], *(value[n : n + 1] for value in two[2:])) for n in range(2)]
        first, second = (contours.render(part._replace(mono=torch.tensor([mono])), SIDE)[0] for part in parts)
        figure = contours.render(parts[1]._replace(mono=torch.tensor([2])), SIDE)[0, 0]  # white on black
        assert (figure == 0).any()
        assert (figure == 1).any()
        assert torch.equal(picture[:, figure == 0], first[:, figure == 0])
        torch.testing.assert_close(picture[:, figure == 1], second[:, figure == 1])


def test_pictures_are_of_every_kind(table):
    seeds = [[0, n] for n in range(400)]
    draws = Draws.of([table[n] for n in range(400)], seeds, [1] * 400, side=48)
    pictures = contours.render(draws, 48)
    assert torch.isfinite(pictures).all()
    assert 0 <= pictures.min() < pictures.max() <= 1
    grey = (pictures.amax(1) - pictures.amin(1)).flatten(1).amax(1) < 1e-6
    assert 0.3 < grey.float().mean() < 0.5
    assert torch.equal(grey, draws.mono > 0)
    ink = torch.where((draws.mono == 1)[:, None, None], 1 - pictures[:, 0], pictures[:, 0])[grey]
    share = ink.mean((1, 2))
    assert 0.05 < share.median() < 0.4
    assert (share > 0.003).all()
    for flags, expected in ((draws.plain, 0.6), (draws.edged, 0.3), (draws.outlined, 0.5), (draws.shade != 0, 0.4)):
        assert flags.float().mean() == pytest.approx(expected, abs=0.06)
    low, high = draws.pose.amin(0), draws.pose.amax(0)
    assert low.tolist() == pytest.approx([-0.2, 0.65, -0.15, -0.15], abs=0.01)
    assert high.tolist() == pytest.approx([0.2, 1.15, 0.15, 0.15], abs=0.01)
    assert 48 * 0.018 < draws.width.min() < draws.width.max() < 48 * 0.113
