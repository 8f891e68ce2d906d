"""Make Paths: are the two marked ends joined by one curve, among curves that lead elsewhere?

Every image has four curves of one length that never touch, and two marks: where the answer is yes, on the ends of one
curve; where it is no, on ends of two. Lengths differ from image to image, for the short ones are learnt first. Only
curves are taken of which both could be marked: two ends of one and two of others, as far apart along both axes and as
far from the border. So neither ink nor loose ends tell the answer, and the marks alone hardly.

Train on whole images, for a crop may lose a mark:
    run_proxies.py --data data/paths64 --models MODELS -- crop_scale=1 crop_ratio=1 hflip=0.5 vflip=0.5
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from glattn.files import new_folder

SPLITS = {"train": 40000, "val": 1000, "test": 2000}
CURVES = 4  # in an image: the pair that may be marked, and distractors
LENGTHS = 0.25, 0.75  # of the curves of an image, in sides of the grid: shortest, longest
SCALE = 4  # drawn so many times as large
FAR = 3  # cells from the border: what is nearer has less room
Curve = list[tuple[int, int]]
Ends = tuple[tuple[int, int], tuple[int, int]]


def walk(rng: np.random.Generator, free: np.ndarray, steps: int) -> Curve | None:
    """Return cells of a random walk that keeps clear of what is taken and of itself; None if it gets stuck.

    Args:
        free: ``(side, side)``, cells that no other curve is on or beside.
        steps: Length of the walk, cells.
    """
    side = len(free)
    mine = np.zeros((side + 2, side + 2), bool)  # with a border
    y, x = rng.integers(0, side, 2)
    if not free[y, x]:
        return None
    cells = [(int(y), int(x))]
    mine[y + 1, x + 1] = True
    moves = [(-1, 0), (1, 0), (0, -1), (0, 1)]
    heading = moves[rng.integers(4)]
    while len(cells) < steps:
        y, x = cells[-1]
        for move in sorted(moves, key=lambda m: rng.random() - (1.0 if m == heading else 0.0) * 0.5):
            a, b = y + move[0], x + move[1]
            if not (0 <= a < side and 0 <= b < side and free[a, b] and not mine[a + 1, b + 1]):
                continue
            around = mine[a : a + 3, b : b + 3].copy()
            around[1 - move[0], 1 - move[1]] = False  # the cell that it comes from
            back = cells[-2] if len(cells) > 1 else None
            if back is not None and abs(back[0] - a) <= 1 and abs(back[1] - b) <= 1:
                around[back[0] - a + 1, back[1] - b + 1] = False  # a corner touches the cell before
            if not around.any():
                cells.append((a, b))
                mine[a + 1, b + 1] = True
                heading = move
                break
        else:
            return None
    return cells


def curves(rng: np.random.Generator, side: int, steps: int) -> list[Curve]:
    """Return curves of one length that keep a cell's distance from each other."""
    while True:
        free, found = np.ones((side, side), bool), []
        for _ in range(400):
            cells = walk(rng, free, steps)
            if cells is None:
                continue
            found.append(cells)
            for y, x in cells:
                free[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = False
            if len(found) == CURVES:
                return found


def apart(ends: Ends) -> tuple[int, ...]:
    """Return how far two cells are apart along both axes, the shorter way first."""
    (y, x), (b, a) = ends
    return tuple(sorted((abs(y - b), abs(x - a))))


def from_border(ends: Ends, side: int) -> tuple[int, ...]:
    """Return how far two cells are from the border, the nearer first; from `FAR` on it is all one."""
    return tuple(sorted(min(FAR, y, x, side - 1 - y, side - 1 - x) for y, x in ends))


def markable(rng: np.random.Generator, side: int) -> tuple[list[Curve], Ends, Ends]:
    """Return curves, the ends of one of them, and ends of two that are placed alike.

    A walk's last cell may look otherwise than its first, being where it had to go: of two curves, too, one of each.
    """
    steps = int(rng.integers(round(LENGTHS[0] * side), round(LENGTHS[1] * side), endpoint=True))
    while True:
        drawn = curves(rng, side, steps)
        of_one = [(curve[0], curve[-1]) for curve in drawn]
        of_two = [(one[0], two[-1]) for one in drawn for two in drawn if one is not two]
        alike = [
            (ends, others)
            for ends in of_one
            for others in of_two
            if apart(ends) == apart(others) and from_border(ends, side) == from_border(others, side)
        ]
        if alike:
            return drawn, *alike[rng.integers(len(alike))]


def image(rng: np.random.Generator, joined: bool, pixels: int) -> Image.Image:
    """Return one image: grey curves on white, a black disc at each marked end."""
    side = pixels // 4  # a curve is a pixel wide, and three from the next
    drawn, of_one, of_two = markable(rng, side)
    ends = of_one if joined else of_two
    size = pixels * SCALE
    cell = size / side
    canvas = Image.new("L", (size, size), 255)
    pen = ImageDraw.Draw(canvas)

    def place(at: tuple[int, int]) -> tuple[float, float]:
        return (at[1] + 0.5) * cell, (at[0] + 0.5) * cell

    for cells in drawn:
        pen.line([place(at) for at in cells], fill=110, width=round(0.3 * cell), joint="curve")
    for at in ends:
        x, y = place(at)
        pen.ellipse((x - 0.42 * cell, y - 0.42 * cell, x + 0.42 * cell, y + 0.42 * cell), fill=0)
    return canvas.resize((pixels, pixels), Image.Resampling.BOX)


def build(folder: Path, *, pixels: int, seed: int, counts: dict[str, int]) -> None:
    """Write train/, val/ and test/, half of each joined; moved into place when all are there.

    Raises:
        ValueError: The folder exists, or the images are too small for curves.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it, or give another --out")
    if pixels < 48:
        raise ValueError(f"{pixels} pixels are too few for {CURVES} curves: give 48 or more")
    with new_folder(folder) as root:
        for number, (split, count) in enumerate(counts.items()):
            for label in ("apart", "joined"):
                (root / split / label).mkdir(parents=True)
            for index in tqdm(range(count), desc=f"drawing {split}", leave=False, disable=None):
                rng = np.random.default_rng([seed, number, index])  # each image by itself: any count, the same images
                label = "joined" if index % 2 else "apart"
                image(rng, label == "joined", pixels).save(root / split / label / f"{seed}-{index:06d}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder to make (data/paths64)")
    parser.add_argument("--pixels", type=int, default=64, help="side of the images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts", type=int, nargs=3, default=list(SPLITS.values()), metavar=("TRAIN", "VAL", "TEST"))
    args = parser.parse_args()
    folder = args.out or Path(f"data/paths{args.pixels}")
    try:
        build(folder, pixels=args.pixels, seed=args.seed, counts=dict(zip(SPLITS, args.counts, strict=True)))
    except (ValueError, OSError) as error:
        print(f"make_paths: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {', '.join(f'{count} {split}' for split, count in zip(SPLITS, args.counts, strict=True))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
