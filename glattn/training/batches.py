"""Batches of a run, whose every draw is a function of its place.

Which image stands where in an epoch, and the seed of its augmentation, follow from the run's seed and the epoch
alone: not from the number of workers or processes, nor from where a run was interrupted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from glattn.training.images import BadImageError

if TYPE_CHECKING:
    from glattn.training.source import Source


def seed_everything(*place: int) -> None:
    """Seed Python, NumPy and torch from a place: (seed, epoch, batch, ...)."""
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeededImages(Dataset[tuple[torch.Tensor, np.ndarray]]):
    """Transformed images of a source: (uint8 image, [class, number asked for, number given]).

    An image that cannot be read is replaced by the next that can (while training), or given as class -1, so
    that the caller learns of it and a metric leaves it out.
    """

    def __init__(self, source: Source, transform: Any, *, replace: bool, size: tuple[int, int]) -> None:
        self.source, self.transform, self.replace, self.size = source, transform, replace, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, np.ndarray]:
        """Return the image of an (index, seed of its augmentation)."""
        asked, seed = item
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which queues work for every device
        for step in range(len(self) if self.replace else 1):
            given = (asked + step) % len(self)
            try:
                image, target = self.source.read(given)
            except (BadImageError, OSError):
                continue
            return self.transform(image), np.array([target, asked, given])
        if self.replace:
            raise ValueError("none of the training images can be read")
        return torch.zeros(3, *self.size, dtype=torch.uint8), np.array([-1, asked, -1])


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The batches of this process: (index, seed) pairs, from batch `start` of `epoch` on.

    A global batch takes the next `batch_size` places of the epoch's order; process `rank` has every
    `world`-th of them, in `parts` steps of accumulation. An incomplete last batch is left out.
    """

    def __init__(
        self, count: int, batch_size: int, *, seed: int, rank: int = 0, world: int = 1, parts: int = 1
    ) -> None:
        share = world * parts
        if batch_size % share:
            raise ValueError(
                f"batch_size={batch_size} does not divide among {world} process(es) with accumulate={parts}"
            )
        if count < share:
            raise ValueError(f"{count} training images are too few for {world} process(es) with accumulate={parts}")
        self.count, self.seed, self.rank, self.world, self.parts = count, seed, rank, world, parts
        self.batch_size = min(batch_size, count // share * share)
        self.epoch, self.start = 0, 0

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch."""
        return self.count // self.batch_size

    def __len__(self) -> int:
        return (self.steps - self.start) * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order, seeds = rng.permutation(self.count), rng.integers(2**31, size=self.count)
        for step in range(self.start, self.steps):
            places = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
            for part in range(self.parts):
                yield [(int(order[place]), int(seeds[place])) for place in places[part :: self.parts]]


class ValidationBatches(Sampler[list[tuple[int, int]]]):
    """Every image exactly once, process `rank` having every `world`-th."""

    def __init__(self, count: int, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self.places, self.batch_size = range(rank, count, world), batch_size

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.places), self.batch_size):
            yield [(place, 0) for place in self.places[first : first + self.batch_size]]


def open_again(worker: int) -> None:
    """Give a worker a .tar of its own: one that it was forked with shares its file position with the others."""
    info = get_worker_info()
    assert info is not None
    info.dataset.source.close()  # type: ignore[attr-defined]


def make_transform(data_config: dict[str, Any], **augmentation: Any) -> Any:
    """Return timm's transform of an image, but for normalising.

    Raises:
        ValueError: timm does not know the resize filter or the policy of augmentation.
    """
    asked = {**data_config, **augmentation}
    try:
        return create_transform(**asked, use_prefetcher=True)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        policy = f"auto_augment={asked['auto_augment']!r} or " if asked.get("auto_augment") else ""
        raise ValueError(f"{policy}interpolation={asked['interpolation']!r} is unknown to timm: {error!r}") from None


def make_loader(
    source: Source,
    batches: Sampler[list[tuple[int, int]]],
    data_config: dict[str, Any],
    *,
    workers: int,
    device: torch.device,
    replace: bool = False,
    **augmentation: Any,
) -> PrefetchLoader:
    """Make a loader of normalised (images, [class, asked, given]) on `device`, prefetching.

    Args:
        source: The images.
        batches: Which of them when, and with which seeds.
        data_config: timm's: input_size, mean, std, interpolation, crop_pct, crop_mode.
        workers: Processes that read and transform.
        device: Where the batches go.
        replace: Replace images that cannot be read, or give them as class -1.
        augmentation: Further keywords of `timm.data.create_transform`.
    """
    mean, std = data_config["mean"], data_config["std"]
    images = SeededImages(
        source, make_transform(data_config, **augmentation), replace=replace, size=data_config["input_size"][-2:]
    )
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=open_again,
    )
    return PrefetchLoader(loader, mean=mean, std=std, channels=data_config["input_size"][0], device=device)
