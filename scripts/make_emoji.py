"""Make emoji, some 1,500 identities drawn by five hands of which one is seen in the test alone, from @iconify/json.

Identities of few drawings have none in val/: train with partial_val=true.
"""

import argparse
import re
import sys
from collections import defaultdict

import manifest
import numpy as np
from iconify import PERMISSIVE, IconSet, Package, digest, draw, looks
from make_icons import order
from manifest import Entry
from tqdm import tqdm

MANIFEST = manifest.FOLDER / "emoji.csv.gz"
SETS = ("noto", "noto-v1", "fxemoji", "twemoji", "emojione", "fluent-emoji-flat")
HELD_OUT = "fluent-emoji-flat"
LEAST, LEAST_FOR_VAL = 2, 4  # training drawings of an identity; and of one that gives a drawing to validation
_TONE = re.compile(r"-(light|medium|dark)(-|$)|skin-tone")


def letters(name: str) -> str:
    """Return a name as all sets write it: one of them writes no hyphens."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def identities(sets: list[IconSet]) -> dict[str, dict[str, str]]:
    """Return each identity's icon in each set: icons of one name, or of names that some set has for one drawing.

    Where a set has two icons for what another takes for one, the one whose name says it is taken.
    """
    by_key: dict[str, dict[str, str]] = defaultdict(dict)
    other: dict[str, str] = {}
    for drawings in sets:
        names = drawings.icons
        for icon in names:
            if not _TONE.search(icon):
                by_key[letters(icon)].setdefault(drawings.name, icon)
        for name, parent in drawings.other_names.items():
            if parent in names:
                other.setdefault(letters(name), letters(parent))
    for name, parent in sorted(other.items()):
        if name in by_key and parent in by_key and name != parent:
            for set_name, icon in by_key.pop(name).items():
                by_key[parent].setdefault(set_name, icon)
    return by_key


def choose(package: Package, held_out: str = HELD_OUT) -> list[Entry]:
    """Return the data set's entries: what the held-out set and enough of the others draw, without near-copies.

    Other sets of its author are left out, as are identities that then have no drawing to train on, or none to test on.
    """
    sets = {drawings.name: drawings for drawings in package.sets(list(SETS))}
    sets = {name: of for name, of in sets.items() if name == held_out or of.author != sets[held_out].author}
    forbidden = [name for name, drawings in sets.items() if drawings.licence not in PERMISSIVE]
    if forbidden:
        raise ValueError(f"these sets are not under a permissive licence: {', '.join(forbidden)}")
    pictures: dict[Entry, np.ndarray] = {}
    for _, icons in tqdm(sorted(identities(list(sets.values())).items()), desc="choosing", leave=False, disable=None):
        training = sorted((name for name in icons if name != held_out), key=lambda name: order(name, icons[name]))
        if held_out not in icons or len(training) < LEAST:
            continue
        label = icons[held_out]
        val = training[0] if len(training) >= LEAST_FOR_VAL else None
        for name, icon in icons.items():
            split = "test" if name == held_out else "val" if name == val else "train"
            drawings, svg = sets[name], sets[name].svg(icon)
            entry = Entry(split, label, name, icon, drawings.author, drawings.licence, digest(svg))
            pictures[entry] = looks(draw(svg, 64, grey=False))
    kept = manifest.without_copies(pictures)
    whole = set.intersection(*({e.label for e in kept if e.split == split} for split in ("train", "test")))
    return [entry for entry in kept if entry.label in whole]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--held-out", choices=SETS, default=HELD_OUT,
        help="set that is the test (%(default)s); of another, --choose a --manifest first",
    )  # fmt: skip
    args = manifest.read_arguments(parser, MANIFEST, folder="data/emoji")
    if args.held_out != HELD_OUT and args.manifest == MANIFEST:
        parser.error(f"the repository's manifest holds {HELD_OUT} out: give --manifest FILE for {args.held_out}")
    return manifest.run(args, lambda package: choose(package, args.held_out), grey=False)


if __name__ == "__main__":
    sys.exit(main())
