"""``glattn pretrain``: train a model on pictures made by formula, drawn as they are asked for.

See `fractals` and `contours`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glattn.training import command, contours, fractals
from glattn.training.batches import make_transform
from glattn.training.config import TrainConfig
from glattn.training.source import Source

# over the defaults of `TrainConfig`, under a recipe's file; the batch divides an epoch, which drops what is left over
RECIPE = {"dataset": "fractals", "image_size": 64, "epochs": 40, "batch_size": 125, "lr": 0.002}
_AT_ONCE = 1000  # figures of 64 x 64 pixels that an accelerator renders at once, if batches are smaller
HELD_OUT = 2_000  # validation images: two a class, the same every time
FORMULAS = {"fractals": fractals, "contours": contours}  # by dataset, see `DRAWN`


@dataclass(frozen=True)
class FormulaSource(Source):
    """Pictures of a table's classes in turn, each drawn when it is asked for.

    Args:
        kind: Of pictures, one of `FORMULAS`.
        table: What it draws of each class.
        fixed: Draw picture ``i`` always the same, as for validation, and not by the seed that comes with it.
        instances: Fractals, or scenes, in a picture at most.
        side: Side of the pictures that `read` gives, in pixels.
    """

    kind: str
    table: tuple[Any, ...]
    fixed: bool
    instances: int
    side: int

    @classmethod
    def of(cls, kind: str, count: int, *, fixed: bool, side: int, instances: int = 1) -> FormulaSource:
        """Return this many pictures."""
        table = tuple(FORMULAS[kind].read_table())
        numbers = np.arange(count)
        names = tuple(f"{kind.removesuffix('s')}{number:04d}" for number in range(len(table)))
        return cls(None, numbers, numbers % len(table), names, kind, table, fixed, instances, side)

    @property
    def formula(self) -> ModuleType:
        """The module that draws them."""
        return FORMULAS[self.kind]

    def draws(self, places: Sequence[tuple[int, int]], side: int) -> Any:
        """Return what is random of the pictures of some (index, seed) pairs."""
        shown = [self.classes(*place) for place in places]
        seeds = [
            [*([1, i] if self.fixed else [0, i, seed]), number]  # a seed is the same with zeros behind it
            for (i, seed), classes in zip(places, shown, strict=True)
            for number in range(len(classes))
        ]
        rows = [self.table[number] for classes in shown for number in classes]
        return self.formula.Draws.of(rows, seeds, [len(classes) for classes in shown], side=side)

    def draw(self, places: Sequence[tuple[int, int]], side: int) -> Tensor:
        """Return the pictures of some (index, seed) pairs, ``(B, 3, side, side)`` in [0, 1]."""
        pictures: Tensor = self.formula.render(self.draws(places, side), side)
        return pictures

    def numbers(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """Return [class, asked, given, further classes or -1] of some (index, seed) pairs."""
        numbers = torch.full((len(places), 2 + self.instances), -1)
        for row, (i, seed) in zip(numbers, places, strict=True):
            own, *others = self.classes(i, seed)
            row[: 3 + len(others)] = torch.tensor([own, i, i, *others])
        return numbers

    def classes(self, index: int, seed: int) -> list[int]:
        """Return the classes that a picture shows: its own, and 0 to `instances` - 1 others."""
        own = int(self.targets[index])
        if self.instances == 1:
            return [own]
        rng = np.random.default_rng([2, index, 0 if self.fixed else seed])
        others = rng.choice(len(self.table) - 1, rng.integers(self.instances), replace=False)
        return [own, *(int(number + (number >= own)) for number in others)]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return picture number `index`, and its class."""
        picture = self.draw([(index, 0)], self.side)[0]
        return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()), int(self.targets[index])

    def loader(
        self,
        batches: Iterable[list[tuple[int, int]]],
        data_config: dict[str, Any],
        **options: Any,
    ) -> FormulaLoader:
        """Return a loader that renders on the device; there is nothing to read, to replace or to augment."""
        shared = {key: options.pop(key) for key in ("workers", "device")}
        options.pop("replace", None)
        make_transform(data_config, **options)  # what is unknown is refused all the same
        return FormulaLoader(self, batches, data_config, **shared)


@dataclass(frozen=True)
class _DrawnBatches(Dataset[tuple[list[int], Any, Tensor]]):
    """What is random of some batches together, and how many pictures each has, by their (index, seed) pairs."""

    source: FormulaSource
    side: int

    def __getitem__(self, batches: list[list[tuple[int, int]]]) -> tuple[list[int], Any, Tensor]:
        places = [place for batch in batches for place in batch]
        return [len(batch) for batch in batches], self.source.draws(places, self.side), self.source.numbers(places)


class FormulaLoader:
    """Normalised (pictures, [class, asked, given, further classes or -1]), a batch at a time.

    An accelerator renders several batches at once: drawing is many small steps, of which one batch would leave it idle.

    Args:
        source: What to draw.
        batches: Which pictures, with which seeds.
        data_config: ``input_size``, ``mean`` and ``std`` are read here.
        workers: Processes that draw random numbers, for an accelerator alone: a CPU that renders has no time to spare.
        device: Where it is rendered.
    """

    def __init__(
        self,
        source: FormulaSource,
        batches: Iterable[list[tuple[int, int]]],
        data_config: dict[str, Any],
        *,
        workers: int,
        device: torch.device,
    ) -> None:
        self.formula, self.side, self.device = source.formula, int(data_config["input_size"][-1]), device
        at_once = _AT_ONCE * 64**2 // (self.side**2 * source.instances)
        if device.type == "cpu":
            workers, at_once = 0, 1
        self.draws = DataLoader(
            _DrawnBatches(source, self.side),
            batch_size=None,
            sampler=_Groups(batches, at_once),
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )
        self.mean, self.std = (torch.tensor(data_config[k], device=device).view(1, 3, 1, 1) for k in ("mean", "std"))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for sizes, draws, numbers in self.draws:
            pictures = (self.formula.render(draws.to(self.device), self.side) - self.mean) / self.std
            yield from zip(pictures.split(sizes), fractals.moved(numbers, self.device).split(sizes), strict=True)


@dataclass(frozen=True)
class _Groups:
    """Batches by groups of at least so many pictures, but for the last."""

    batches: Iterable[list[tuple[int, int]]]
    pictures: int

    def __iter__(self) -> Iterator[list[list[tuple[int, int]]]]:
        group: list[list[tuple[int, int]]] = []
        for batch in self.batches:
            group.append(batch)
            if sum(map(len, group)) >= self.pictures:
                yield group
                group = []
        if group:
            yield group


def open_formula(config: TrainConfig) -> tuple[FormulaSource, FormulaSource]:
    """Return an epoch's training pictures, new ones in every epoch, and those to validate on, always the same.

    Raises:
        ValueError: Images are given too, or no size; or a loss or mixing that takes one class a picture.
    """
    if config.data:
        raise ValueError(
            f"data={config.data!r} with dataset={config.dataset}: they are drawn, not read; leave data out"
        )
    if config.image_size is None:
        raise ValueError(f"dataset={config.dataset} needs a size to draw at, such as image_size=64")
    if config.instances > 1 and (config.loss != "cross_entropy" or config.mixup or config.cutmix):
        raise ValueError(f"instances={config.instances} needs loss=cross_entropy, mixup=0 and cutmix=0")
    epoch = config.epoch_samples
    return (
        FormulaSource.of(config.dataset, epoch, fixed=False, side=config.image_size, instances=config.instances),
        FormulaSource.of(config.dataset, HELD_OUT, fixed=True, side=config.image_size),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: those of ``glattn train``, and how long."""
    command.add_arguments(parser)
    text = (
        "pictures to train on, a multiple of epoch_samples (2000000, or the recipe's epochs); an epoch leaves out what"
        " fills no batch"
    )
    parser.add_argument("--samples", type=int, help=text)
    recipe = " ".join(f"{key}={value}" for key, value in RECIPE.items())
    parser.epilog = f"defaults here, over those below: {recipe}\n\n{parser.epilog}"


def run(args: argparse.Namespace) -> int:
    """Pretrain."""
    config = command.resolve(args, RECIPE)
    if config.dataset not in FORMULAS:
        kinds = " or ".join(FORMULAS)
        raise ValueError(
            f"dataset={config.dataset!r}: glattn pretrain draws {kinds}; `glattn train` takes other images"
        )
    if args.samples is None:
        return command.run(args, RECIPE)
    if args.samples < 1 or args.samples % config.epoch_samples:
        raise ValueError(f"--samples {args.samples}: give a multiple of epoch_samples={config.epoch_samples}")
    if args.epochs is not None or any(text.startswith("epochs=") for text in args.overrides):
        raise ValueError("--samples and epochs both say how long; give one of them")
    args.epochs = str(args.samples // config.epoch_samples)
    return command.run(args, RECIPE)
