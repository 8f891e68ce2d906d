"""Make icons100, 100 kinds of icons by designers of whom 30% are seen in the test alone, from @iconify/json."""

import argparse
import hashlib
import re
import sys
from collections import defaultdict

import manifest
import numpy as np
from iconify import PERMISSIVE, IconSet, Package, digest, draw, looks
from manifest import Entry
from tqdm import tqdm

MANIFEST = manifest.FOLDER / "icons100.csv.gz"
NOT_ICONS = {"Logos", "Flags / Maps", "Emoji", "Programming"}
CLASSES, PER_AUTHOR = 100, 4
TEST, VAL = 0.3, 0.15  # of the authors, and of the training authors
# words of a name that tell how it is drawn, not what
STYLES = {
    "baseline", "bold", "broken", "bulk", "duo", "duotone", "fill", "filled", "light", "line", "linear", "outline",
    "outlined", "regular", "round", "rounded", "sharp", "solid", "stroke", "thin", "tone", "twotone",
}  # fmt: skip
_LOGOS = re.compile(r"brand|logo", re.IGNORECASE)
_SIZE = re.compile(r"\d+(px)?")


def label_of(icon: str) -> str:
    """Return what an icon shows: its name without the words of style, size and number at either end."""
    words = icon.split("-")

    def style(word: str) -> bool:
        return word in STYLES or _SIZE.fullmatch(word) is not None

    while len(words) > 1 and style(words[-1]):
        # "two-tone" is one word of style; "two" alone is a number, "sharp" and "line" go one by one
        words = words[:-2] if words[-2:] == ["two", "tone"] and len(words) > 2 else words[:-1]
    while len(words) > 1 and style(words[0]):
        words = words[1:]
    return "-".join(words)


def order(*names: str) -> str:
    """Return a key that sorts as if by chance, the same everywhere."""
    return hashlib.sha256(":".join(names).encode()).hexdigest()


def usable(drawings: IconSet) -> bool:
    """Tell whether a set is of one colour, free to use, and of icons."""
    about = drawings.about
    # sets of logos that are no longer kept are in another category
    logos = _LOGOS.search(f"{drawings.name} {about.get('name', '')}")
    icons = about.get("category") not in NOT_ICONS and not logos
    return icons and not about.get("palette") and drawings.licence in PERMISSIVE


def choose(package: Package, *, classes: int = CLASSES) -> list[Entry]:
    """Return the data set's entries: commonest names, few variants an author, split by author, near-copies dropped."""
    candidates: dict[str, dict[str, list[tuple[IconSet, str]]]] = defaultdict(lambda: defaultdict(list))
    for drawings in package.sets(sorted(package.about)):
        if usable(drawings):
            for icon in drawings.icons:
                candidates[label_of(icon)][drawings.author].append((drawings, icon))
    counts = {label: sum(min(len(v), PER_AUTHOR) for v in by.values()) for label, by in candidates.items()}
    labels = sorted(counts, key=lambda label: (-counts[label], label))[:classes]
    splits = split_authors({author for label in labels for author in candidates[label]})
    entries: dict[Entry, np.ndarray] = {}
    for label in tqdm(sorted(labels), desc="choosing", unit=" classes", leave=False, disable=None):
        for author, variants in candidates[label].items():
            seen: set[str] = set()
            for drawings, icon in sorted(variants, key=lambda v: order(v[0].name, v[1])):
                svg = drawings.svg(icon)
                if len(seen) == PER_AUTHOR or digest(svg) in seen:
                    continue
                values = looks(draw(svg, 64, grey=True))
                if values[0].min() > 0.9:  # nothing to see: an animation's first frame, or white on white
                    continue
                seen.add(digest(svg))
                entry = Entry(splits[author], label, drawings.name, icon, author, drawings.licence, digest(svg))
                entries[entry] = values
    return manifest.without_copies(entries)


def split_authors(authors: set[str]) -> dict[str, str]:
    """Return each author's split."""
    shuffled = sorted(authors, key=lambda author: order("author", author))
    test = round(TEST * len(shuffled))
    val = test + round(VAL * (len(shuffled) - test))
    return {a: "test" if n < test else "val" if n < val else "train" for n, a in enumerate(shuffled)}


def main() -> int:
    args = manifest.read_arguments(argparse.ArgumentParser(description=__doc__), MANIFEST, folder="data/icons100")
    return manifest.run(args, choose, grey=True)


if __name__ == "__main__":
    sys.exit(main())
