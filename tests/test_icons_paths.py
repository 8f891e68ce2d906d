"""Paths: labels against a flood fill, balance, no shortcut by marks or ink, and the same images from the same seed."""

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
        assert count == make_paths.CURVES, "curves touch, or one is broken"
        first, second = (part[tuple(np.rint(at).astype(int))] for at in marks(values))
        assert first
        assert second
        assert (first == second) == joined


@pytest.mark.parametrize("side", [16, 32])
def test_both_answers_have_marks_placed_alike(side):
    for seed in range(20):
        drawn, (first, last), (one, two) = make_paths.markable(np.random.default_rng(seed), side)
        curve_of = {cell: number for number, cells in enumerate(drawn) for cell in (cells[0], cells[-1])}
        assert curve_of[first] == curve_of[last]
        assert curve_of[one] != curve_of[two]
        moved = [np.abs(np.subtract(*ends)) for ends in ((first, last), (one, two))]
        assert set(moved[0]) == set(moved[1])
        near = [sorted(min(3, *cell, *(side - 1 - np.array(cell))) for cell in e) for e in ((first, last), (one, two))]
        assert near[0] == near[1]


def test_neither_ink_nor_the_marks_tell_the_answer():
    facts = {True: [], False: []}
    for index in range(300):
        joined = bool(index % 2)
        values = np.asarray(make_paths.image(np.random.default_rng(1000 + index), joined, 64))
        moved = np.subtract(*marks(values))
        odd = np.abs(moved / 4).round().sum() % 2  # cells of four pixels
        facts[joined].append((np.linalg.norm(moved), odd, (255 - values).mean()))
    for yes, no in zip(np.transpose(facts[True]), np.transpose(facts[False]), strict=True):
        # the best threshold on the fact alone, in either direction
        both, truth = np.concatenate([yes, no]), np.repeat([True, False], 150)
        best = max(((both > t) == truth).mean() for t in both)
        assert max(best, 1 - min(((both > t) == truth).mean() for t in both)) < 0.62


def test_a_model_of_the_marks_places_alone_learns_nothing():
    ends = [make_paths.markable(np.random.default_rng([7, index]), 16)[1 + index % 2] for index in range(2000)]
    (y, x), (b, a) = np.transpose([sorted(pair) for pair in ends], (1, 2, 0))
    facts = np.stack([y, x, b, a, abs(y - b), abs(x - a)], axis=1)
    answers = np.arange(2000) % 2
    forest = pytest.importorskip("sklearn.ensemble").RandomForestClassifier
    trees = forest(min_samples_leaf=8, random_state=0).fit(facts[:1500], answers[:1500])
    assert trees.score(facts[1500:], answers[1500:]) < 0.58


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
