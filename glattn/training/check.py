"""``glattn check-data``: is a folder fit to train on?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glattn.training.source import Source


def find_bad_images(source: Source, *, workers: int | None = None, progress: Any = iter) -> list[tuple[str, str]]:
    """Return (path, reason) for every image of a source that cannot be read."""
    from glattn.training.images import BadImageError, find_bad

    if Path(source.name(0)).is_file():  # not those in a .tar
        return list(find_bad([source.name(n) for n in range(len(source))], workers=workers, progress=progress))
    bad = []
    for index in progress(range(len(source))):
        try:
            source.read(index)
        except (BadImageError, OSError) as error:
            bad.append((source.name(index), str(error)))
    return bad


def refuse_bad(*sources: Source) -> None:
    """Raise if any image of `sources` cannot be read, after reading them all."""
    bad = [found for source in sources for found in find_bad_images(source)]
    if bad:
        raise ValueError(
            f"{len(bad)} image(s) cannot be read, e.g. {bad[0][0]} ({bad[0][1]}); "
            "`glattn check-data` lists them, bad_images=skip leaves them out"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("data", help="folder with train/ and val/, or with one folder a class")
    parser.add_argument("--workers", type=int, help="processes that read images (default: one a core)")


def run(args: argparse.Namespace) -> int:
    """Check classes and read every image; 0 if all is well."""
    from tqdm import tqdm

    from glattn.training.config import TrainConfig
    from glattn.training.data import open_sources

    sources = open_sources(TrainConfig(data=args.data))
    found = 0
    for split, source in zip(("training", "validation"), sources, strict=True):
        counts = source.class_counts()
        print(
            f"{split}: {len(source)} images, {len(counts)} classes of {counts.min()} to {counts.max()} images",
            flush=True,
        )

        def watched(items: Any, split: str = split, total: int = len(source)) -> Any:
            return tqdm(items, desc=f"reading {split}", total=total, disable=not sys.stderr.isatty(), leave=False)

        for path, reason in find_bad_images(source, workers=args.workers, progress=watched):
            print(f"  cannot be read: {path}: {reason}")
            found += 1
    print(f"{found} image(s) cannot be read" if found else "every image can be read")
    return 1 if found else 0
