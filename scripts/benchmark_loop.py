"""What the training loop costs over bare forward, backward and step on the same batches.

Both train the same model with the same optimiser; they take turns, epoch by epoch, and medians are compared. The
bare loop's batches lie in memory, made beforehand; ours are read, augmented and handed over while it computes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from glattn.training.config import TrainConfig
from glattn.training.digits import write_digits
from glattn.training.loop import Trainer


def bare_epoch(trainer: Trainer, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    model, optimizer = trainer.model, trainer.optimizer
    begun = time.perf_counter()
    for images, targets in batches:
        loss = torch.nn.functional.cross_entropy(model(images), targets, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - begun


def our_epoch(trainer: Trainer, epoch: int) -> float:
    trainer.progress.epoch, trainer.progress.step, trainer.progress.loss_sum = epoch, 0, 0.0
    begun = time.perf_counter()
    trainer.train_epoch()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="glattn_atto")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6, help="batches a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data", help="image folder (default: the digits)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or str(write_digits(Path(folder) / "digits"))
        trainer = Trainer(
            TrainConfig(
                data=data,
                run=str(Path(folder) / "run"),
                model=args.model,
                image_size=args.image_size,
                batch_size=args.batch_size,
                workers=args.workers,
                hflip=0.0,
                tracker="none",
                checkpoint_minutes=1e9,
            )
        )
        trainer.batches.count = min(trainer.batches.count, args.batches * args.batch_size)
        batches = [
            (images.to(memory_format=torch.channels_last), places[:, 0].clone())
            for images, places in trainer.train_loader
        ]
        trainer.model.train()
        bare_epoch(trainer, batches)
        our_epoch(trainer, 0)
        bare, ours = [], []
        for number in range(1, args.rounds + 1):
            bare.append(bare_epoch(trainer, batches))
            ours.append(our_epoch(trainer, number))
    images = sum(len(images) for images, _ in batches)
    ratio = statistics.median(ours) / statistics.median(bare)
    for name, seconds in (("bare", bare), ("loop", ours)):
        print(
            f"{name}: {images / statistics.median(seconds):7.1f} img/s"
            f"  (from {images / max(seconds):.1f} to {images / min(seconds):.1f})"
        )
    print(f"loop / bare: {ratio:.3f}  ({args.model} at {args.image_size}, {torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
