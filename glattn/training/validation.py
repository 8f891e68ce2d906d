"""What a model says of every image of a source, each exactly once, and the numbers that follow."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn import functional as F

from glattn.training.batches import ValidationBatches
from glattn.training.source import Source


@dataclass(frozen=True)
class Predictions:
    """One entry an image, in the source's order; unreadable images are only counted.

    Args:
        index: The image's number.
        target: Its class.
        predicted: The likeliest class.
        confidence: That class's probability.
        loss: Cross-entropy, nats.
        rank: How many classes are likelier than the true one.
        bad: Numbers of the images that could not be read.
    """

    index: np.ndarray
    target: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    rank: np.ndarray
    bad: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether each image is given its class: of an answer of NaNs any is the likeliest, and none right."""
        return np.asarray((self.predicted == self.target) & np.isfinite(self.confidence))

    def metrics(self) -> dict[str, float]:
        """Return top-1 and top-5 in percent, mean loss, and expected calibration error (15 bins, percent)."""
        if not len(self.index):
            raise ValueError("none of the validation images can be read")
        finite, correct = np.isfinite(self.confidence), self.correct
        confidence = np.where(finite, self.confidence, 0).astype(np.float64)
        gap = np.bincount(np.minimum((confidence * 15).astype(int), 14), weights=confidence - correct, minlength=15)
        return {
            "top1": 100 * float(np.mean(correct)),
            "top5": 100 * float(np.mean(correct | ((self.rank < 5) & finite))),
            "loss": float(np.mean(self.loss, dtype=np.float64)),
            "ece": 100 * float(np.abs(gap).sum() / len(self.index)),
            "images": len(self.index),
        }

    def class_accuracy(self, classes: int) -> np.ndarray:
        """Return each class's share of images given its name; NaN for a class without images."""
        totals = np.bincount(self.target, minlength=classes)
        right = np.bincount(self.target[self.correct], minlength=classes)
        return np.where(totals > 0, right / np.maximum(totals, 1), np.nan)

    def confusion(self, classes: int) -> np.ndarray:
        """Return counts, true class x predicted class."""
        counts = np.bincount(self.target * classes + self.predicted, minlength=classes * classes)
        return counts.reshape(classes, classes)


class AmongClasses(nn.Module):
    """A classifier that chooses among some of its classes only: ``(B, C, H, W) -> (B, K)``, -inf for the others.

    Args:
        model: The classifier.
        allowed: Numbers of the classes.
        classes: How many there are.
    """

    def __init__(self, model: nn.Module, allowed: np.ndarray, classes: int) -> None:
        super().__init__()
        self.model = model
        self.refused = torch.ones(classes, dtype=torch.bool)
        self.refused[torch.as_tensor(allowed)] = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits = self.model(x)
        return logits.masked_fill(self.refused.to(logits.device), -torch.inf)


def predict_source(
    model: nn.Module,
    source: Source,
    data_config: dict[str, Any],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    progress: Any = iter,
) -> Predictions:
    """Run `model` over every image of a source once, in this process.

    Args:
        model: The classifier, on `device`.
        source: The images.
        data_config: timm's, of the model.
        batch_size: Images at a time.
        workers: Processes that read images.
        device: Where the model is.
        progress: Wraps the iterator over the batches.
    """
    batches = ValidationBatches(len(source), batch_size)
    loader = source.loader(batches, data_config, workers=workers, device=device)
    return predict_all(model.to(memory_format=torch.channels_last), loader, progress=progress)


@torch.no_grad()
def predict_all(
    model: nn.Module, loader: Any, accelerator: Accelerator | None = None, progress: Any = iter
) -> Predictions:
    """Run `model` over a loader of (images, [class, asked, given]) and gather what all processes saw.

    Every process returns the same, whatever their number; without an accelerator, this process sees all. The model
    must not be wrapped for training: its processes may see different numbers of batches.
    """
    was_training = model.training
    model.eval()
    parts: list[dict[str, np.ndarray]] = []
    bad: list[int] = []
    for images, places in progress(loader):
        with accelerator.autocast() if accelerator else nullcontext():
            logits = model(images.to(memory_format=torch.channels_last)).float()
        keep = places[:, 0] >= 0
        bad += places[~keep, 1].tolist()
        logits, places = logits[keep], places[keep]
        target = places[:, 0]
        confidence, predicted = logits.softmax(1).max(1)
        true_logit = logits.gather(1, target[:, None])
        part = {
            "index": places[:, 1],
            "target": target,
            "predicted": predicted,
            "confidence": confidence,
            "loss": F.cross_entropy(logits, target, reduction="none"),
            # of equal logits (a collapsed model), the true class counts as the last; NaN is never right
            "rank": logits.shape[1] - 1 - (logits < true_logit).sum(1),
        }
        parts.append({name: value.cpu().numpy() for name, value in part.items()})
    model.train(was_training)
    if accelerator and accelerator.num_processes > 1:
        parts, bad = gather_object(parts), gather_object(bad)
    names = [item.name for item in fields(Predictions) if item.name != "bad"]
    if not parts:
        empty = np.zeros(0)
        return Predictions(**dict.fromkeys(names, empty), bad=np.sort(bad))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
    order = np.argsort(columns["index"], kind="stable")
    return Predictions(**{name: column[order] for name, column in columns.items()}, bad=np.sort(np.array(bad, int)))
