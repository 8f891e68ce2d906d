"""scikit-learn's 1,797 handwritten digits as an image folder: ``python -m glattn.training.digits FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from glattn.files import new_folder


def write_digits(folder: str | Path) -> Path:
    """Write train/ and val/, one folder a digit, 8x8 grey PNGs; a stratified, fixed fifth is held out.

    The folder is moved into place when it is whole; one that exists is left as it is.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install scikit-learn") from None
    try:
        with new_folder(folder) as root:
            _write(root, load_digits())
    except FileExistsError:  # another process was faster
        if not folder.is_dir():
            raise
    return folder


def _write(root: Path, digits: Any) -> None:
    order = np.random.default_rng(0).permutation(len(digits.target))
    for digit in range(10):
        members = order[digits.target[order] == digit]
        held_out = round(len(members) / 5)
        for split, chosen in (("val", members[:held_out]), ("train", members[held_out:])):
            target = root / split / str(digit)
            target.mkdir(parents=True)
            for index in chosen:
                values = np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)
                Image.fromarray(values).save(target / f"{index:04d}.png")


if __name__ == "__main__":
    print(write_digits(sys.argv[1] if len(sys.argv) > 1 else "data/digits"))
