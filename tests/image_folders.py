"""Folders of images made on the spot, for the tests of training."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (30, 40, 220), "green": (30, 200, 60), "red": (220, 40, 30)}


def noisy(colour, seed: int, side: int = 32) -> Image.Image:
    """Return an image of one colour and noise."""
    values = np.random.default_rng(seed).normal(colour, 40, (side, side, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def write_class(folder: Path, colour, count: int, *, seed: int = 0) -> None:
    """Write a class: noisy images of one colour."""
    folder.mkdir(parents=True)
    for number in range(count):
        noisy(colour, seed + number).save(folder / f"{number:03d}.png")


def write_folder(root: Path, *, train: int = 8, val: int = 4, classes=tuple(COLOURS)) -> Path:
    """Write train/ and val/ of the colours; with val=0, one folder a class."""
    for name in classes:
        write_class((root / "train" if val else root) / name, COLOURS[name], train)
        if val:
            write_class(root / "val" / name, COLOURS[name], val, seed=1000)
    return root


def spoil(path: Path, how: str) -> Path:
    """Make an image file unreadable."""
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "zero bytes": b"", "text": b"not an image at all"}[how])
    return path
