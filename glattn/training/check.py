"""``glattn check-data``: is a folder fit to train on?"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glattn.files import one_line

if TYPE_CHECKING:
    from glattn.training.source import Source


def find_bad_images(
    source: Source, *, workers: int | None = None, progress: Any = iter, rank: int = 0, world: int = 1
) -> list[tuple[str, str]]:
    """Return (path, reason) for every image of a source that cannot be read, or of every `world`-th from `rank` on."""
    from glattn.training.images import find_bad

    indices = range(rank, len(source), world)
    if Path(source.name(0)).is_file():  # not those in a .tar
        return list(find_bad([source.name(index) for index in indices], workers=workers, progress=progress))
    reasons = ((source.name(index), reason) for index in progress(indices) if (reason := _why_bad(source, index)))
    try:
        return list(reasons)
    finally:
        source.close()


def _why_bad(source: Source, index: int) -> str:
    """Return why an image cannot be read, or nothing."""
    from glattn.training.images import BadImageError

    try:
        source.read(index)
    except (BadImageError, OSError) as error:
        return one_line(error)
    return ""


def refuse_unreadable(**splits: Source) -> None:
    """Raise if no image of a split can be read; as a rule the first one can."""
    for split, source in splits.items():
        reasons = list(takewhile(bool, (_why_bad(source, index) for index in range(len(source)))))
        source.close()
        if len(reasons) == len(source):
            raise ValueError(
                f"none of the {len(source)} {split} images can be read, e.g. {source.name(0)} ({reasons[0]})"
            )


def refuse_bad(*sources: Source, rank: int = 0, world: int = 1) -> None:
    """Raise if any image of `sources` cannot be read, after reading them all, shared among `world` processes."""
    from accelerate.utils import gather_object

    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # of the processes, on this machine
    workers = max(1, (os.cpu_count() or 1) // here)
    bad = [found for source in sources for found in find_bad_images(source, workers=workers, rank=rank, world=world)]
    bad = gather_object(bad) if world > 1 else bad
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
