"""Manifests of data sets of drawings: which drawing is in which split under which label; and folders made by them."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from iconify import IconSet, Package, copies, digest, draw, open_package
from tqdm import tqdm

from glattn.files import gzipped, new_folder, replacing

FOLDER = Path(__file__).resolve().parents[1] / "data_manifests"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, order=True)
class Entry:
    """One drawing of a data set.

    Args:
        split: train, val or test.
        label: Its class.
        set: The package's name of its set.
        icon: The set's name of it.
        author: Of the set: no author is in two splits of icons, and tests resample authors.
        licence: SPDX name.
        hash: Of its SVG, see `iconify.digest`.
    """

    split: str
    label: str
    set: str
    icon: str
    author: str
    licence: str
    hash: str

    @property
    def file(self) -> str:
        """Where its picture is in the data set's folder."""
        return f"{self.split}/{self.label}/{self.set}--{self.icon}.png"


def read(path: Path) -> list[Entry]:
    """Return a manifest's entries."""
    with gzip.open(path, "rt", newline="") as file:
        return [Entry(**row) for row in csv.DictReader(file)]


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write a manifest, sorted and without a date: the same entries make the same bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Entry)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(entry) for entry in sorted(entries))
    with replacing(path) as temporary:
        temporary.write_bytes(gzipped(text.getvalue()))


def without_copies(looks: Mapping[Entry, np.ndarray]) -> list[Entry]:
    """Return the entries but for those that are nearly drawn in a split before theirs, or drawn under two labels.

    Args:
        looks: Each entry's, see `iconify.looks`.
    """
    labels: dict[str, set[str]] = {}
    for entry in looks:
        labels.setdefault(entry.hash, set()).add(entry.label)
    clear = [entry for entry in looks if len(labels[entry.hash]) == 1]
    print(f"{len(looks) - len(clear)} drawings are there under two labels: dropped")
    kept: list[Entry] = []
    for split in SPLITS:
        mine = [entry for entry in clear if entry.split == split]
        if mine and kept:
            found = copies(np.stack([looks[entry] for entry in mine]), np.stack([looks[entry] for entry in kept]))
            print(f"{split}: {found.sum()} of {len(mine)} are near-copies of images before it: dropped")
            mine = [entry for entry, copy in zip(mine, found, strict=True) if not copy]
        kept += mine
    return sorted(kept)


def build(entries: Sequence[Entry], package: Package, folder: Path, *, pixels: int, grey: bool) -> None:
    """Draw a manifest's entries as train/, val/ and test/, one folder a class; moved into place when all are there.

    Raises:
        ValueError: The folder exists, the pixels are too few or too many, or a drawing is not the manifest's.
    """
    if not 8 <= pixels <= 1024:
        raise ValueError(f"{pixels} pixels a side: give 8 to 1024")
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it, or give another --out")
    sets = {drawings.name: drawings for drawings in package.sets(sorted({entry.set for entry in entries}))}
    with new_folder(folder) as root:
        for entry in tqdm(entries, desc=f"drawing {folder.name}", unit=" images", leave=False, disable=None):
            svg = _svg(sets[entry.set], entry)
            target = root / entry.file
            target.parent.mkdir(parents=True, exist_ok=True)
            draw(svg, pixels, grey=grey).save(target)


def _svg(drawings: IconSet, entry: Entry) -> str:
    svg = drawings.svg(entry.icon) if entry.icon in drawings.data["icons"] else ""
    if digest(svg) != entry.hash:
        raise ValueError(
            f"{entry.set}:{entry.icon} is not the drawing of the manifest: another version of the package?"
        )
    return svg


def summary(entries: Sequence[Entry]) -> str:
    """Return what a manifest holds, in one line."""
    classes = Counter(entry.label for entry in entries)
    parts = []
    for split in SPLITS:
        mine = [entry for entry in entries if entry.split == split]
        parts.append(f"{len(mine)} {split} by {len({entry.author for entry in mine})} authors")
    return (
        f"{len(entries)} images, {len(classes)} classes of {min(classes.values())} to {max(classes.values())}, "
        f"{len({entry.author for entry in entries})} authors: {', '.join(parts)}"
    )


def read_arguments(parser: argparse.ArgumentParser, path: Path, *, folder: str) -> argparse.Namespace:
    """Read what a data set's script is told: its own arguments, and where its manifest and its folder are."""
    parser.add_argument(
        "--package", type=Path, help="folder or .tgz of the package (default: from the registry, by npm)"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("data/iconify-json"), help="where it is unpacked (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path(folder), help="folder to make (%(default)s)")
    parser.add_argument("--pixels", type=int, default=64, help="side of the images (%(default)s)")
    parser.add_argument("--choose", action="store_true", help="make the manifest anew, instead of by it the folder")
    parser.add_argument("--manifest", type=Path, default=path, help="another one than the repository's, .csv.gz")
    return parser.parse_args()


def run(args: argparse.Namespace, choose: Callable[[Package], list[Entry]], *, grey: bool) -> int:
    """Make the manifest, or by it the folder; return the script's exit status."""
    try:
        package = open_package(args.package, args.cache)
        if args.choose:
            write(args.manifest, choose(package))
        entries = read(args.manifest)
        if not args.choose:
            build(entries, package, args.out, pixels=args.pixels, grey=grey)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    print(f"{args.manifest.name if args.choose else args.out}: {summary(entries)}")
    return 0
