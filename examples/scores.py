"""How good detections and masks are: mean average precision at one overlap, mean intersection over union."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou


def average_precisions(
    found: Sequence[Mapping[str, Tensor]], wanted: Sequence[Mapping[str, Tensor]], *, overlap: float = 0.5
) -> dict[int, float]:
    """Return the average precision of each class in ``wanted``: the area under its precision-recall curve.

    Over all images and by falling score, a box is right if it overlaps one of its class that no box before it took;
    precision is made to fall with recall, as in PASCAL VOC since 2010.

    Args:
        found: ``boxes``, ``labels`` and ``scores`` of each image.
        wanted: ``boxes`` and ``labels`` of each image.
        overlap: Least intersection over union of boxes that are the same.
    """
    result = {}
    for label in sorted({int(v) for target in wanted for v in target["labels"]}):
        rights, scores, count = [], [], 0
        for guess, target in zip(found, wanted, strict=True):
            truth = target["boxes"][target["labels"] == label]
            mine = guess["labels"] == label
            order = guess["scores"][mine].argsort(descending=True)
            ious = box_iou(guess["boxes"][mine][order], truth)
            count += len(truth)
            for row in ious:
                best, at = row.max(0) if len(truth) else (torch.tensor(-1.0), 0)
                rights.append(bool(best >= overlap))
                if best >= overlap:
                    ious[:, at] = -1  # taken
            scores.extend(guess["scores"][mine][order].tolist())
        right = np.array(rights, bool)[np.argsort(-np.array(scores), kind="stable")]
        hits = np.cumsum(right)
        precision = np.maximum.accumulate((hits / np.arange(1, len(right) + 1))[::-1])[::-1]
        result[label] = float(precision[right].sum() / count)
    return result


def confusion(found: Tensor, wanted: Tensor, *, classes: int) -> Tensor:
    """Return how many pixels of each class (rows) were given each class (columns): ``(classes, classes)``."""
    return torch.bincount(wanted.flatten() * classes + found.flatten(), minlength=classes**2).view(classes, classes)


def intersections_over_unions(pixels: Tensor) -> Tensor:
    """Return each class's intersection over union from a confusion matrix; NaN for classes that are nowhere."""
    hit = pixels.diagonal().double()
    return hit / (pixels.sum(0) + pixels.sum(1) - hit)
