"""Scenes composed of scikit-learn's handwritten digits: images, boxes and masks to train detectors and segmenters on.

A fifth of the digits is held out: scenes to measure on are made of digits that no scene to train on has.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

CLASSES = tuple("0123456789")


@dataclass(frozen=True)
class Scene:
    """One image and what is in it.

    Args:
        image: ``(H, W, 3)``, bytes.
        boxes: ``(n, 4)``, left, top, right, bottom of each digit's ink in pixels.
        labels: ``(n,)``, which digit each is.
        mask: ``(H, W)``, 0 for the background, digit + 1 for its ink.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


class Digits:
    """Composes scenes from one side of the split.

    Args:
        train: Take the four fifths to train on, or the fifth held out.
        digit_side: Smallest and largest side of a digit's 8x8 cells in a scene, in pixels.
        image_side: Smallest and largest side of a scene, in pixels; height and width are drawn apart.
        most: Most digits a scene.

    Raises:
        ValueError: scikit-learn is missing, or the largest digit does not fit the smallest scene.
    """

    def __init__(
        self,
        *,
        train: bool,
        digit_side: tuple[int, int] = (24, 56),
        image_side: tuple[int, int] = (96, 192),
        most: int = 6,
    ) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ValueError("the digits come with scikit-learn: pip install 'glattn[examples]'") from None
        if digit_side[1] * 1.2 > image_side[0]:
            raise ValueError(
                f"digits of up to {digit_side[1]} pixels do not fit scenes of {image_side[0]}; give smaller digits or"
                " larger scenes"
            )
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        held_out = len(order) // 5
        chosen = order[held_out:] if train else order[:held_out]
        self.indices, self.images, self.labels = chosen, digits.images[chosen] / 16, digits.target[chosen]
        self.digit_side, self.image_side, self.most = digit_side, image_side, most

    def size(self, rng: np.random.Generator) -> tuple[int, int]:
        """Draw a height and a width."""
        height, width = rng.integers(*self.image_side, size=2, endpoint=True)
        return int(height), int(width)

    def scene(self, seed: int | tuple[int, ...], size: tuple[int, int] | None = None) -> Scene:
        """Return the scene of this seed, of this height and width or of some of its own."""
        rng = np.random.default_rng(seed)
        height, width = size or self.size(rng)
        canvas = _background(rng, height, width)
        mask = np.zeros((height, width), np.uint8)
        taken = np.zeros((height, width), bool)
        boxes, labels = [], []
        for index in rng.integers(len(self.labels), size=rng.integers(1, self.most, endpoint=True)):
            ink = _drawn(rng, self.images[index], rng.uniform(*self.digit_side))
            solid = ink > 0.5
            rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
            for _ in range(20):  # places that are free, or the digit is left out
                top, left = rng.integers(height - ink.shape[0] + 1), rng.integers(width - ink.shape[1] + 1)
                place = (slice(top, top + ink.shape[0]), slice(left, left + ink.shape[1]))
                if not taken[place].any():
                    break
            else:
                continue
            colour = rng.uniform(0.55, 1.0, size=3)
            canvas[place] = canvas[place] * (1 - ink[..., None]) + colour * ink[..., None]
            mask[place][solid] = self.labels[index] + 1
            taken[place] = True
            boxes.append((left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1))
            labels.append(self.labels[index])
        canvas += rng.normal(scale=0.03, size=canvas.shape)
        image = np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)
        return Scene(image, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), mask)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a dark slope of some colour, with a few bars across it that are no digits."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    angle = rng.uniform(0, 2 * math.pi)
    slope = (math.cos(angle) * x + math.sin(angle) * y) * 0.15
    canvas = (slope[..., None] + rng.uniform(0.1, 0.25, size=3)).clip(0, 0.4)
    for _ in range(rng.integers(0, 4)):
        top, left = rng.integers(height), rng.integers(width)
        canvas[top : top + rng.integers(2, 12), left : left + rng.integers(2, 60)] += rng.uniform(0.05, 0.2, size=3)
    return canvas


def _drawn(rng: np.random.Generator, cells: np.ndarray, side: float) -> np.ndarray:
    """Return 8x8 cells of ink at about this side in pixels, turned and stretched a little, cut to what has ink."""
    size = (max(round(side * rng.uniform(0.85, 1.15)), 8), max(round(side * rng.uniform(0.85, 1.15)), 8))
    image = Image.fromarray((np.pad(cells, 1) * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    ink = np.asarray(image.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC), np.float64) / 255
    ink = ((ink - 0.375) * 4).clip(0, 1)  # firm strokes, so that what is ink is no matter of taste
    rows, columns = np.flatnonzero((ink > 0).any(1)), np.flatnonzero((ink > 0).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
