"""Make Paths: are the two marked ends joined by one curve, among curves that lead elsewhere?

Curves come in pairs that are joined crosswise, one way or the other, in a square of 3 x 3 cells: four arms leave its
corners, and it joins them upright, ``||``, or across, ``=``. The marks are on the ends of two arms of one pair, of
neighbouring corners, and the answer alone says how the square joins them. So nothing but the square tells joined from
apart, neither marks nor ink nor which way a curve leaves a mark, and the square tells it only to who has followed the
arms to the marks. Other pairs distract. Lengths differ from image to image, for the short ones are learnt first.

Train on whole images, for a crop may lose a mark:
    run_proxies.py --data data/paths64 --models MODELS -- crop_scale=1 crop_ratio=1 hflip=0.5 vflip=0.5
"""

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from glattn.files import new_folder

SPLITS = {"train": 40000, "val": 1000, "test": 2000}
PAIRS = 2  # of curves in an image: the one that is marked, and a distractor
ARMS = 0.375  # length of the longest arms, in sides of the grid; the shortest have none
CELL = 4  # pixels: a curve is one wide, and three from the next
LABELS = "apart", "joined"
SCALE = 4  # drawn so many times as large
MOVES = (-1, 0), (1, 0), (0, -1), (0, 1)
CORNERS = (0, 0), (0, 2), (2, 2), (2, 0)  # of the square, each beside the next
Cells = list[tuple[int, int]]


def beside(free: np.ndarray, cells: Cells) -> np.ndarray:
    """Return which cells are still free where these are taken, and those around them."""
    left = free.copy()
    for y, x in cells:
        left[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = False
    return left


def walk(rng: np.random.Generator, free: np.ndarray, begun: Cells, steps: int) -> Cells | None:
    """Return cells of a random walk that keeps clear of what is taken and of itself; None if it gets stuck.

    Args:
        free: ``(side, side)``, cells that nothing else is on or beside.
        begun: Its first cells, wherever they are; two or more, if there are to be others.
        steps: Length of the walk, cells.
    """
    side, cells = len(free), list(begun)
    while len(cells) < steps:
        (y, x), (b, a) = cells[-1], cells[-2]
        heading = y - b, x - a
        for move in sorted(MOVES, key=lambda m: rng.random() - (0.5 if m == heading else 0.0)):
            at = y + move[0], x + move[1]
            if not (min(at) >= 0 and max(at) < side and free[at]):
                continue
            # the cell that it comes from, and at a corner the one before, may be near
            if all(max(abs(at[0] - v), abs(at[1] - u)) > 1 for v, u in cells[:-2]) and at != cells[-2]:
                cells.append(at)
                break
        else:
            return None
    return cells


def arms(rng: np.random.Generator, free: np.ndarray, steps: int) -> list[Cells] | None:
    """Return the arms that leave the corners of a square, corners first; None if they do not find room."""
    side = len(free)
    top, left = (int(place) for place in rng.integers(0, side - 2, 2))
    square = [(top + y, left + x) for y in range(3) for x in range(3)]
    if not all(free[cell] for cell in square):
        return None
    begun = []
    for y, x in CORNERS:
        away = ((y - 1, 0), (0, x - 1))[rng.integers(2)]
        # straight away from the square first
        begun.append([(top + y + n * away[0], left + x + n * away[1]) for n in range(min(steps, 2) + 1)])
    if not all(min(cell) >= 0 and max(cell) < side and free[cell] for first in begun for cell in first):
        return None
    grown = list(begun)
    for number, first in enumerate(begun):
        others = [cell for other, cells in enumerate(grown) if other != number for cell in cells]
        arm = walk(rng, beside(free, square + others), first, steps + 1)
        if arm is None:
            return None
        grown[number] = arm
    return grown


def generator(seed: int, split: str, index: int) -> np.random.Generator:
    """Return what draws an image, each by itself: of any count, the same images, but for those drawn once more."""
    return np.random.default_rng([seed, list(SPLITS).index(split), index])


def arm_length(rng: np.random.Generator, pixels: int) -> int:
    """Return the length of the arms of an image, in cells: the first thing that is drawn."""
    return int(rng.integers(0, round(ARMS * (pixels // CELL)), endpoint=True))


def name(seed: int, index: int) -> str:
    """Return where an image lies within its split."""
    return f"{LABELS[index % 2]}/s{seed}-{index:06d}.png"


def pairs(rng: np.random.Generator, side: int, steps: int) -> list[list[Cells]]:
    """Return the arms of each pair of curves; all are of one length and keep a cell's distance from each other's."""
    while True:
        free, found = np.ones((side, side), bool), []
        for _ in range(400):
            pair = arms(rng, free, steps)
            if pair is None:
                continue
            found.append(pair)
            # the middles of the square's sides are taken as well: its curves may be joined either way
            free = beside(free, [cell for arm in pair for cell in arm])
            if len(found) == PAIRS:
                return found


def image(rng: np.random.Generator, joined: bool, pixels: int, steps: int | None = None) -> Image.Image:
    """Return one image: grey curves on white, a black disc at each marked end.

    Args:
        rng: What it is drawn by.
        joined: The answer.
        pixels: Its side.
        steps: Length of the arms, in cells; drawn, too, if it is not given.
    """
    drawn = pairs(rng, pixels // CELL, arm_length(rng, pixels) if steps is None else steps)
    size = pixels * SCALE
    cell = size / (pixels // CELL)
    canvas = Image.new("L", (size, size), 255)
    pen = ImageDraw.Draw(canvas)

    def place(at: tuple[int, int]) -> tuple[float, float]:
        return (at[1] + 0.5) * cell, (at[0] + 0.5) * cell

    first = int(rng.integers(4))  # marked arms: this and the next
    for number, pair in enumerate(drawn):
        with_next = first if joined else first + 1  # an arm that its square joins with the next
        if number:
            with_next = int(rng.integers(2))
        for one in (with_next, with_next + 2):
            cells = [*reversed(pair[one % 4]), *pair[(one + 1) % 4]]
            pen.line([place(at) for at in cells], fill=110, width=round(0.3 * cell), joint="curve")
    for arm in (drawn[0][first], drawn[0][(first + 1) % 4]):
        x, y = place(arm[-1])
        pen.ellipse((x - 0.42 * cell, y - 0.42 * cell, x + 0.42 * cell, y + 0.42 * cell), fill=0)
    return canvas.resize((pixels, pixels), Image.Resampling.BOX)


def build(folder: Path, *, pixels: int, seed: int, counts: dict[str, int]) -> None:
    """Write train/, val/ and test/, half of each joined; moved into place when all are there.

    An image that a split before has is drawn once more, of as long arms.

    Raises:
        ValueError: The folder exists, or the images are too small for curves.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it, or give another --out")
    if pixels < 48:
        raise ValueError(f"{pixels} pixels are too few for {2 * PAIRS} curves: give 48 or more")
    if min(counts.values()) < 2:
        raise ValueError(f"{min(counts.values())} images are too few for two classes: give 2 or more")
    before: set[bytes] = set()
    with new_folder(folder) as root:
        for split, count in counts.items():
            for label in LABELS:
                (root / split / label).mkdir(parents=True)
            mine: set[bytes] = set()
            for index in tqdm(range(count), desc=f"drawing {split}", leave=False, disable=None):
                rng, joined = generator(seed, split, index), bool(index % 2)
                drawn = image(rng, joined, pixels)
                while (digest := hashlib.sha256(drawn.tobytes()).digest()) in before:
                    drawn = image(rng, joined, pixels, arm_length(generator(seed, split, index), pixels))
                mine.add(digest)
                drawn.save(root / split / name(seed, index))
            before |= mine


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
