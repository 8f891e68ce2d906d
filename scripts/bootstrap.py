"""Paired bootstrap over authors: is one model better than another on drawings by hands that it has not seen?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """Accuracy of one model less that of another, in points, with its 95% interval.

    Args:
        points: On the test images themselves.
        low: 2.5% of resampled tests are below.
        high: 2.5% are above.
        authors: That were resampled.
    """

    points: float
    low: float
    high: float
    authors: int

    @property
    def verdict(self) -> str:
        """better or worse, where the interval excludes zero."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not told apart"


def compare(
    mine: Sequence[Mapping[str, bool]],
    theirs: Sequence[Mapping[str, bool]],
    authors: Mapping[str, str],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Compare two models on the same images.

    Args:
        mine: For each seed, image -> whether it was named rightly; seeds are averaged.
        theirs: The other model's.
        authors: Image -> author; all images of an author are drawn together, as one designer's icons are alike.

    Raises:
        ValueError: They were not tested on the same images.
    """
    images = sorted(authors)
    for runs in (mine, theirs):
        if not runs or any(sorted(run) != images for run in runs):
            raise ValueError("two models can be compared on the same images only: test both anew")
    gains = np.array([np.mean([run[i] for run in mine]) - np.mean([run[i] for run in theirs]) for i in images])
    names, author_of = np.unique([authors[i] for i in images], return_inverse=True)
    sums, counts = np.bincount(author_of, weights=gains), np.bincount(author_of)
    drawn = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    resampled = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Difference(100 * float(gains.mean()), 100 * float(low), 100 * float(high), len(names))
