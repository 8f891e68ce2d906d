"""The images of a run: sources with classes that agree, and loaders whose every draw is a function of its place.

Which image stands where in an epoch, and the seed of its augmentation, follow from the run's seed and the epoch
alone: not from the number of workers or processes, nor from where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.utils.misc import natural_key
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from glattn.files import user_path
from glattn.training.config import TrainConfig
from glattn.training.digits import write_digits
from glattn.training.images import BadImageError, read_image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = {"train": ("train", "training"), "validation": ("val", "valid", "validation", "eval", "evaluation")}


@dataclass(frozen=True)
class Source:
    """Images of one split: a timm dataset, or some of it.

    Args:
        dataset: What `timm.data.create_dataset` made.
        indices: The images that belong to the split.
        targets: Their classes, where the source tells without reading them.
        class_names: By class index.
    """

    dataset: Any
    indices: np.ndarray
    targets: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return image number `index` as RGB, and its class."""
        inner = int(self.indices[index])
        image, target = self.dataset.reader[inner][:2] if hasattr(self.dataset, "reader") else self.dataset[inner]
        try:
            return read_image(image), int(target)
        finally:
            if hasattr(image, "close"):
                image.close()

    def name(self, index: int) -> str:
        """Return the path of image number `index`, or its number."""
        inner = int(self.indices[index])
        try:
            return str(self.dataset.filename(inner, absolute=True))
        except (AttributeError, AssertionError, NotImplementedError):
            return f"image {inner}"

    def digest(self) -> str:
        """Return a digest of the images' classes, and of their paths within the split where they have any."""
        images: list[Any] = self.targets.tolist()
        if hasattr(getattr(self.dataset, "reader", None), "samples"):  # a folder or a .tar
            reader = self.dataset.reader
            root = reader.root if hasattr(reader, "class_to_idx") else None  # paths in a .tar are within it
            paths = (str(self.dataset.filename(inner, absolute=True)) for inner in self.indices.tolist())
            within = (os.path.normpath(path if root is None else _within(path, root)) for path in paths)
            images = sorted(zip((path.replace(os.sep, "/") for path in within), images, strict=True))
        return hashlib.sha256(json.dumps(images).encode()).hexdigest()

    def loader(self, batches: Sampler[list[tuple[int, int]]], data_config: dict[str, Any], **options: Any) -> Any:
        """Return the batches' images, see `make_loader`."""
        return make_loader(self, batches, data_config, **options)

    def class_counts(self) -> np.ndarray:
        """Return the number of images of each class."""
        return np.bincount(self.targets, minlength=len(self.class_names))


def open_sources(config: TrainConfig) -> tuple[Source, Source]:
    """Open the training and the validation images, and check that they are fit to train on.

    Raises:
        ValueError: One class only, an empty class, or classes that differ between the splits.
        FileNotFoundError: There is no such folder.
    """
    if config.dataset == "fractals":
        from glattn.training.pretrain import open_fractals

        return open_fractals(config)
    root = user_path(config.data)
    if config.dataset in ("", "digits"):
        if not config.data:
            raise ValueError("no images given: data=FOLDER, with train/CLASS/*.png and val/CLASS/*.png")
        if config.dataset:
            write_digits(root)
        if not root.exists():
            raise FileNotFoundError(f"no folder {config.data!r}; it should hold train/CLASS/*.png and val/CLASS/*.png")
        train_root, val_root = find_split(root, config.train_split), find_split(root, config.val_split)
        if train_root is None and val_root is not None:
            raise ValueError(f"{root} holds {val_root.name} but no {config.train_split} folder")
        train = open_folder(train_root or root)
        if val_root is None:
            if config.val_split not in SPLITS["validation"]:
                raise ValueError(
                    f"val_split={config.val_split!r}: no such folder in {root}; without it a share of train/ is held"
                    " out"
                )
            train, val = split_source(train, config.val_fraction, config.seed)
        else:
            val = open_folder(val_root)
            if config.partial_val and set(val.class_names) < set(train.class_names):
                val = open_folder(val_root, class_map={name: number for number, name in enumerate(train.class_names)})
    else:
        place = str(root) if config.data else ""
        train = _open_named(config.dataset, place, config.train_split)
        val = _open_named(config.dataset, place, config.val_split)
    _check_classes(train, val, partial=config.partial_val)
    return train, val


def open_split(data: str, split: str, class_names: tuple[str, ...] | None = None) -> Source:
    """Open one split of a folder for validation, its classes in the order of a model's `class_names`."""
    root = user_path(data)
    if not root.exists():
        raise FileNotFoundError(f"no folder {data!r}")
    source = open_folder(find_split(root, split) or root)
    if class_names is None or class_names == source.class_names:
        return source
    unknown = sorted(set(source.class_names) - set(class_names))
    if unknown:
        raise ValueError(f"{root} holds classes that the model does not know: {_some(unknown)}")
    order = np.array([class_names.index(name) for name in source.class_names])
    # the reader itself keeps its numbers: the dataset is asked for images only, see `read`
    return open_folder(
        find_split(root, split) or root,
        class_map={name: int(n) for name, n in zip(source.class_names, order, strict=True)},
    )


def find_split(root: Path, split: str) -> Path | None:
    """Return the folder (or .tar) of a split under `root`, by timm's synonyms, or None."""
    names = next((names for names in SPLITS.values() if split in names), (split,))
    for name in (split, *names):
        for candidate in (root / name, root / f"{name}.tar"):
            if candidate.exists():
                return candidate
    return None


def open_folder(root: Path, *, class_map: dict[str, int] | None = None) -> Source:
    """Open a folder with one folder a class, or a .tar of one."""
    is_folder = root.is_dir()
    if is_folder:
        loose = next((p.name for p in root.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS), None)
        if loose:
            raise ValueError(f"{root} holds images of no class ({loose}, ...); each belongs into a folder of its class")
    try:
        arguments: dict[str, Any] = {"input_key": ";".join(EXTENSIONS)} if is_folder else {}
        if class_map:
            arguments["class_map"] = class_map
        dataset = create_dataset("", root=str(root), search_split=False, **arguments)
        if is_folder:
            _leave_hidden_out(dataset.reader, root)
    except RuntimeError:
        raise ValueError(
            f"no images in {root}; it should hold one folder a class, with {', '.join(EXTENSIONS)}"
        ) from None
    except (tarfile.TarError, AssertionError, TypeError, OSError) as error:
        raise ValueError(f"{root} is neither a folder nor a .tar that can be read: {error}") from None
    reader = dataset.reader
    if is_folder:
        reader.samples.sort(key=lambda sample: _order(sample[0]))
        mapping, targets = reader.class_to_idx, [target for _, target in reader.samples]
    else:
        mapping, targets = reader.class_name_to_idx, list(reader.targets)
    if not class_map:
        mapping, targets = _numbered(mapping, targets)
    if is_folder:
        reader.class_to_idx = mapping
        reader.samples = [(path, target) for (path, _), target in zip(reader.samples, targets, strict=True)]
        _check_folders(reader.samples, root)
    else:
        reader.class_name_to_idx, reader.targets = mapping, np.array(targets)
    names = [""] * (max(mapping.values()) + 1)
    for name, index in mapping.items():
        names[index] = name
    return Source(dataset, np.arange(len(targets)), np.array(targets, dtype=np.int64), tuple(names))


def _check_folders(samples: Sequence[tuple[str, int]], root: Path) -> None:
    """Refuse a class without images, one of two folders, and one within another."""
    # a class is a folder that holds something: sub-folders of one without images are not classes of their own
    holding = {_within(path, root).partition(os.sep)[0] for path, _ in samples}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name not in holding:
            raise ValueError(f"class {folder.name!r} is empty: no images in {folder}; add some or remove the folder")
    homes: dict[int, str] = {}  # timm names a class by the last folder alone
    for path, target in samples:
        home = os.path.dirname(path)
        if homes.setdefault(target, home) != home:
            name, both = os.path.basename(home), sorted(os.path.relpath(h, root) for h in (homes[target], home))
            raise ValueError(
                f"class {name!r} has two folders in {root}, {' and '.join(both)}; give each class one folder, of a"
                " name of its own"
            )
    folders = {Path(home) for home in homes.values()}
    for folder in sorted(folders):
        if above := folders.intersection(folder.parents):
            raise ValueError(
                f"{above.pop()} holds images, and so does {folder.name} in it, which would be a class of its own;"
                " give each class one folder"
            )


def _within(path: str, root: str | Path) -> str:
    """Return what of a path is behind its root."""
    return path[len(os.path.join(root, "")) :]


def _leave_hidden_out(reader: Any, root: Path) -> None:
    """Drop images in folders whose names begin with a dot, as .ipynb_checkpoints; timm takes these for classes."""
    reader.samples = [
        sample for sample in reader.samples if f"{os.sep}." not in os.sep + os.path.dirname(_within(sample[0], root))
    ]
    if not reader.samples:
        raise RuntimeError


def _order(name: str) -> tuple[Any, str]:
    """timm's order of names, and of those that it leaves to chance: they differ by case or leading zeros alone."""
    return natural_key(name), name


def _numbered(mapping: dict[str, int], targets: Iterable[int]) -> tuple[dict[str, int], list[int]]:
    """Return the classes that have images, numbered in their order, and each image's number."""
    names = {number: name for name, number in mapping.items()}
    held = [names[target] for target in targets]
    numbers = {name: number for number, name in enumerate(sorted(set(held), key=_order))}
    return numbers, [numbers[name] for name in held]


def _open_named(name: str, root: str, split: str) -> Source:
    """Open any other source of `timm.data.create_dataset`."""
    if name.partition("/")[0].lower() in ("wds", "tfds", "hfids"):
        raise ValueError(f"dataset={name!r} is a stream; a run that can be resumed needs images that have numbers")
    try:
        dataset = create_dataset(name, root=root or None, split=split)
    except (RuntimeError, AssertionError, ImportError, ValueError, KeyError) as error:
        raise ValueError(f"dataset={name!r}, split {split!r}: {' '.join(str(error).split())}") from None
    reader = getattr(dataset, "reader", None)
    if reader is not None and hasattr(reader, "dataset"):  # Hugging Face datasets
        key = getattr(reader, "label_key", "label")
        targets, names = np.asarray(reader.dataset[key], dtype=np.int64), reader.dataset.features[key].names
    else:
        targets = np.asarray(getattr(dataset, "targets", []), dtype=np.int64)
        names = getattr(dataset, "classes", None)
    if len(targets) != len(dataset):
        raise ValueError(f"dataset={name!r} does not tell its classes without reading every image")
    if names is None:
        names = [str(number) for number in range(int(targets.max()) + 1)]
    return Source(dataset, np.arange(len(targets)), targets, tuple(str(n) for n in names))


def split_source(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Hold out a fraction of every class, at least one image of each; the same for the same seed."""
    held_out = np.zeros(len(source), dtype=bool)
    for target, name in enumerate(source.class_names):
        members = np.flatnonzero(source.targets == target)
        if len(members) < 2:
            raise ValueError(f"class {name!r} has {len(members)} image: too few to hold one out; give a val/ folder")
        chosen = np.random.default_rng([seed, target]).permutation(members)
        held_out[chosen[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    parts = [
        Source(source.dataset, source.indices[mask], source.targets[mask], source.class_names)
        for mask in (~held_out, held_out)
    ]
    return parts[0], parts[1]


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_classes(train: Source, val: Source, *, partial: bool) -> None:
    if train.class_names != val.class_names:
        missing = sorted(set(train.class_names) - set(val.class_names))
        unknown = sorted(set(val.class_names) - set(train.class_names))
        raise ValueError(
            "training and validation classes differ"
            + (f"; without validation images (partial_val=true allows it): {_some(missing)}" if missing else "")
            + (f"; without training images: {_some(unknown)}" if unknown else "")
        )
    if len(train.class_names) < 2:
        raise ValueError(f"one class only ({_some(list(train.class_names))}): a classifier needs two or more")
    for split, source in (("training", train), ("validation", val)):
        empty = [source.class_names[n] for n in np.flatnonzero(source.class_counts() == 0)]
        if empty and not (partial and source is val):
            raise ValueError(f"classes without {split} images: {_some(empty)}")


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
    state = getattr(getattr(info.dataset.source.dataset, "reader", None), "tar_state", None)  # type: ignore[attr-defined]
    if state is not None:
        state.reset()


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
