"""A run folder and its source without training: enough for a report."""

import json

import numpy as np
import torch
from image_folders import noisy

from glattn.training.config import TrainConfig
from glattn.training.image_folder import open_folder
from glattn.training.run_folder import write_metrics, write_start
from glattn.training.validation import Predictions

NASTY = ["<script>alert(1)</script>", 'a "quoted" & one', "it's", "naïve 猫 🐈", "$x_1$ %d {0}", "plain"]


def make_source(root, names, images=2):
    """Write `images` noisy images of each class in numbered folders, and open them under its name."""
    for number, _ in enumerate(names):
        folder = root / f"{number:04d}"
        folder.mkdir(parents=True)
        for image in range(images):
            noisy((50, 100, 150), seed=100 * number + image, side=8).save(folder / f"<{image}>.png")
    source = open_folder(root)
    return type(source)(source.dataset, source.indices, source.targets, tuple(names))


def make_predictions(source, seed=0):
    """Return predictions of random logits that lean towards the truth."""
    classes = len(source.class_names)
    logits = torch.randn(len(source), classes, generator=torch.Generator().manual_seed(seed))
    target = torch.as_tensor(source.targets)
    logits[torch.arange(len(target)), target] += 1.5
    return predictions_of(logits, target)


def predictions_of(logits, target):
    """Return the predictions that logits stand for."""
    confidence, predicted = logits.softmax(1).max(1)
    return Predictions(
        index=np.arange(len(target)),
        target=target.numpy(),
        predicted=predicted.numpy(),
        confidence=confidence.numpy(),
        loss=torch.nn.functional.cross_entropy(logits, target, reduction="none").numpy(),
        rank=(logits > logits.gather(1, target[:, None])).sum(1).numpy(),
        bad=np.zeros(0, int),
    )


def make_run(folder, predictions, epochs=3):
    """Write what a training of a few epochs leaves, without a model."""
    folder.mkdir()
    environment = {
        "command": ["glattn", "train", "--data", "my images/<b>"],
        "python": "3.11",
        "versions": {"torch": "2.6"},
        "commit": None,
        "device": "cpu",
        "processes": 1,
        "cores": 2,
    }
    write_start(folder, TrainConfig(data="my images/<b>", model="test_glattn"), environment)
    metrics = {"epoch": epochs, **predictions.metrics()}
    rows = [
        {"epoch": n + 1, "lr": 1e-3, "train_loss": 2 / (n + 1), "val_loss": 2.5 / (n + 1),
         "top1": metrics["top1"] + 1 + n - epochs, "top5": metrics["top5"], "ece": 1.0, "images_per_second": 100.0 + n}
        for n in range(epochs)
    ]  # fmt: skip
    write_metrics(folder, rows)
    (folder / "best").mkdir()
    (folder / "best" / "metrics.json").write_text(json.dumps(metrics))
    return folder
