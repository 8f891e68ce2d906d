"""Print the top-1 of training runs after each epoch side by side, and how to load the first: RUN RUN."""

import argparse
import csv
import sys
from itertools import zip_longest
from pathlib import Path


def curve(run: Path) -> list[str]:
    """Return a run's top-1 after each epoch."""
    with (run / "metrics.csv").open(newline="") as file:
        return [f"{float(row['top1']):.2f}%" for row in csv.DictReader(file)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of `glattn train`")
    args = parser.parse_args()
    try:
        curves = [curve(run) for run in args.runs]
    except (OSError, KeyError, ValueError) as error:
        print(f"compare_runs: no run of `glattn train`: {error}", file=sys.stderr)
        return 1
    names = [str(run) for run in args.runs]
    widths = [max(len(name), 7) for name in names]
    for epoch, cells in enumerate([names, *zip_longest(*curves, fillvalue="")]):
        shown = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"{epoch or 'epoch':>5}  {shown}")
    print(f'load it: import timm, glattn; model = timm.create_model("local-dir:{names[0]}/best", pretrained=True)')
    return 0


if __name__ == "__main__":
    sys.exit(main())
