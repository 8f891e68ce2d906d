"""What is done to training images: each, as keywords of timm's transform, and whole batches on their device."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from glattn.training.config import TrainConfig


def augmentation_of(config: TrainConfig) -> dict[str, Any]:
    """Return the keywords of `timm.data.create_transform` for training."""
    return {
        "is_training": True,
        "scale": (config.crop_scale, 1.0),
        "ratio": (config.crop_ratio, 1 / config.crop_ratio),
        "hflip": config.hflip,
        "vflip": config.vflip,
        "color_jitter": config.color_jitter or None,
        "auto_augment": config.auto_augment or None,
    }


def even_shares(classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return one distribution an image, ``(B, num_classes)``: even over its classes ``(B, n)``, -1 being none."""
    shares = torch.zeros(len(classes), num_classes + 1, device=classes.device)
    shares = shares.scatter_(1, classes % (num_classes + 1), 1.0)[:, :num_classes]  # none: the last
    return shares / shares.sum(1, keepdim=True)


class BatchAugment:
    """What is done to a whole batch on its device: random erasing, mixup, cutmix."""

    def __init__(self, config: TrainConfig, num_classes: int, device: torch.device) -> None:
        self.erase = RandomErasing(config.random_erase, mode="pixel", device=device) if config.random_erase else None
        self.off_epoch, self.num_classes = config.mixup_off_epoch, num_classes
        self.mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mixup_prob,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: torch.Tensor, classes: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the augmented images and their targets.

        Args:
            images: ``(B, C, H, W)``.
            classes: Of each image, ``(B, n)``; -1: no further one.
            epoch: Epochs done.

        Returns:
            Images; classes ``(B,)``, or ``(B, num_classes)`` shares when mixing, or where images have several.
        """
        if self.erase is not None:
            images = self.erase(images)
        if classes.shape[1] > 1:
            return images, even_shares(classes, self.num_classes)
        return self.mix(images, classes[:, 0], epoch)

    def mix(self, images: torch.Tensor, targets: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mixed images and their shares of classes, or what was given."""
        if self.mixup is None:
            return images, targets
        self.mixup.mixup_enabled = self.off_epoch is None or epoch < self.off_epoch
        if len(images) % 2:  # an odd one out is mixed with none
            mixed, soft = self.mix(torch.cat([images, images[-1:]]), torch.cat([targets, targets[-1:]]), epoch)
            return mixed[:-1], soft[:-1]
        return self.mixup(images, targets)
