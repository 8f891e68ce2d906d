"""Make the tables of classes that `glattn pretrain` draws, from their seeds, and a picture of the first of each.

python scripts/make_formulas.py       # glattn/training/{fractals,contours}1k.csv.gz, docs/{fractals,contours}.png
"""

import argparse
import sys
from multiprocessing import Pool
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torchvision.utils import make_grid

from glattn.figures import save_figure
from glattn.files import replacing
from glattn.training.pretrain import FORMULAS, FormulaSource

ROOT = Path(__file__).resolve().parents[1]
ROWS, COLUMNS = 5, 12  # columns: one class each; rows: pictures of it


def sheet(dataset: str, path: Path) -> None:
    """Draw several pictures of each of the first classes."""
    classes = FORMULAS[dataset].CLASSES
    source = FormulaSource.of(dataset, classes * ROWS, fixed=True, side=64)
    places = [(row * classes + column, 0) for row in range(ROWS) for column in range(COLUMNS)]
    grid = make_grid(source.draw(places, 64), nrow=COLUMNS, padding=4, pad_value=1.0)
    figure = Figure(figsize=(grid.shape[2] / 100, grid.shape[1] / 100))
    figure.figimage(grid.permute(1, 2, 0).numpy())
    save_figure(figure, path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--datasets", nargs="+", choices=list(FORMULAS), default=list(FORMULAS))
    parser.add_argument("--tables", type=Path, default=ROOT / "glattn" / "training", help="folder of the tables")
    parser.add_argument("--sheets", type=Path, default=ROOT / "docs", help="folder of the pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        for dataset in args.datasets:
            formula = FORMULAS[dataset]
            with Pool() as pool:
                table = pool.map(formula.make_class, range(formula.CLASSES), chunksize=25)
            with replacing(args.tables / formula.TABLE) as temporary:
                temporary.write_bytes(formula.pack(table))
            sheet(dataset, args.sheets / f"{dataset}.png")
    except OSError as error:
        print(f"make_formulas: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
