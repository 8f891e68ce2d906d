"""Paths: labels against a flood fill, balance, no shortcut past the curves, and the same images from the same seed."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_paths


def components(ink):
    """Return how many connected parts there are, and each pixel's part, by flooding (eight neighbours)."""
    part = np.zeros(ink.shape, int)
    count = 0
    for start in zip(*np.nonzero(ink), strict=True):
        if part[start]:
            continue
        count += 1
        stack = [start]
        part[start] = count
        while stack:
            y, x = stack.pop()
            for b, a in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if 0 <= b < ink.shape[0] and 0 <= a < ink.shape[1] and ink[b, a] and not part[b, a]:
                    part[b, a] = count
                    stack.append((b, a))
    return count, part


def marks(values):
    """Return the centre of each black disc."""
    count, part = components(values < 40)
    assert count == 2
    return [np.argwhere(part == n + 1).mean(0) for n in range(2)]


@pytest.mark.parametrize("pixels", [64, 128])
def test_labels_are_what_a_flood_fill_says(pixels):
    for index in range(60):
        joined = bool(index % 2)
        values = np.asarray(make_paths.image(np.random.default_rng(index), joined, pixels))
        count, part = components(values < 245)
        assert count == 2 * make_paths.PAIRS, "curves touch, or one is broken"
        first, second = (part[tuple(np.rint(at).astype(int))] for at in marks(values))
        assert first
        assert second
        assert (first == second) == joined


@pytest.mark.parametrize("pixels", [64, 128])
def test_the_answer_changes_how_one_square_joins_its_arms_and_nothing_else(pixels):
    """So no fact about marks, ink or the ways that curves leave the marks can tell it."""
    for seed in range(40):
        joined, apart = (
            np.asarray(make_paths.image(np.random.default_rng(seed), answer, pixels), float) for answer in (True, False)
        )
        changed = np.argwhere(joined != apart)
        assert (np.ptp(changed, axis=0) < 3 * 4).all()  # three cells of four pixels
        assert np.abs((joined - apart).sum()) < 0.05 * (255 - joined).sum()


def test_either_way_of_joining_has_either_answer():
    """Whether the marked square joins upright or across, told by its twin, says nothing."""
    upright = {True: 0, False: 0}
    for seed in range(400):
        images = {answer: np.asarray(make_paths.image(np.random.default_rng(seed), answer, 64)) for answer in upright}
        inked = images[True] < images[False]  # what the joined one has and its twin has not
        rows, columns = np.ptp(np.argwhere(inked), axis=0)
        upright[bool(rows > columns)] += 1
    assert 150 < upright[True] < 250, upright


def test_folders_are_balanced_whole_and_the_same_from_the_same_seed(tmp_path):
    counts = {"train": 6, "val": 2, "test": 4}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_paths.build(tmp_path / name, pixels=64, seed=seed, counts=counts)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 12
    for split, count in counts.items():
        for label in ("joined", "apart"):
            assert len(list((tmp_path / "a" / split / label).iterdir())) == count // 2
    images = {name: [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.png"))] for name in "abc"}
    assert not set(files) & {path.relative_to(tmp_path / "c") for path in (tmp_path / "c").rglob("*.png")}
    assert images["a"] == images["b"]
    assert not set(images["a"]) & set(images["c"])
    assert len(set(images["a"])) == 12
    with Image.open(tmp_path / "a" / files[0]) as first:
        assert first.size == (64, 64)
    with pytest.raises(ValueError, match="exists already"):
        make_paths.build(tmp_path / "a", pixels=64, seed=0, counts=counts)
    with pytest.raises(ValueError, match="too few"):
        make_paths.build(tmp_path / "d", pixels=16, seed=0, counts=counts)
    with pytest.raises(ValueError, match="-4 images are too few"):
        make_paths.build(tmp_path / "d", pixels=64, seed=0, counts={**counts, "train": -4})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_no_image_is_in_two_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(make_paths, "PAIRS", 1)
    monkeypatch.setattr(make_paths, "ARMS", 0)  # so few images that many would be drawn twice
    make_paths.build(tmp_path / "paths", pixels=48, seed=0, counts={"train": 300, "val": 40, "test": 40})
    folders = (tmp_path / "paths" / split for split in make_paths.SPLITS)
    train, val, test = ({path.read_bytes() for path in folder.rglob("*.png")} for folder in folders)
    assert len(train) < 300
    assert not train & val
    assert not test & (train | val)
