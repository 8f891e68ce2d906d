"""Make the table of fractal classes from its seed, and a picture of the first of them.

python scripts/make_fractals.py            # glattn/training/fractals1k.csv.gz, docs/fractals.png
"""

import argparse
import sys
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torchvision.utils import make_grid

import glattn.training
from glattn.figures import save_figure
from glattn.files import replacing
from glattn.training import fractals
from glattn.training.pretrain import FractalSource

ROWS, COLUMNS = 5, 12  # columns: one class each; rows: pictures of it


def sheet(path: Path) -> None:
    """Draw several pictures of each of the first classes."""
    source = FractalSource.of(fractals.CLASSES * ROWS, fixed=True, side=64)
    places = [(row * fractals.CLASSES + column, 0) for row in range(ROWS) for column in range(COLUMNS)]
    grid = make_grid(source.draw(places, 64), nrow=COLUMNS, padding=4, pad_value=1.0)
    figure = Figure(figsize=(grid.shape[2] / 100, grid.shape[1] / 100))
    figure.figimage(grid.permute(1, 2, 0).numpy())
    save_figure(figure, path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, default=Path(glattn.training.__path__[0]) / fractals.TABLE)
    parser.add_argument("--sheet", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "fractals.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with Pool() as pool:
        table: list[np.ndarray] = pool.map(fractals.make_system, range(fractals.CLASSES), chunksize=25)
    try:
        with replacing(args.table) as temporary:
            temporary.write_bytes(fractals.pack(table))
        sheet(args.sheet)
    except OSError as error:
        print(f"make_fractals: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
