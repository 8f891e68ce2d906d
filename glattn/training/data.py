"""The images of a run: sources with classes that agree."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import Sampler

from glattn.files import one_line, user_path
from glattn.training.batches import make_loader
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
        try:
            image, target = self.dataset.reader[inner][:2] if hasattr(self.dataset, "reader") else self.dataset[inner]
        except OSError:
            raise
        except Exception as error:  # torchvision's and datasets' have decoded it there
            raise BadImageError(one_line(error)) from None
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
        if not config.data and config.dataset.partition("/")[0].lower() != "hfds":
            raise ValueError(f"dataset={config.dataset!r} needs data=FOLDER, where its files are")
        place = str(root) if config.data else ""
        train = _open_named(config.dataset, place, config.train_split)
        val = _open_named(config.dataset, place, config.val_split)
    _check_classes(train, val, partial=config.partial_val)
    return train, val


def check_run_folder(config: TrainConfig, run: Path) -> None:
    """Refuse a run folder that holds the folders of the classes, or lies among them and would be one.

    Raises:
        ValueError: It does.
    """
    if config.dataset in ("", "digits") and config.data:
        root = user_path(config.data)
        train, val = find_split(root, config.train_split), find_split(root, config.val_split)
        for classes in (train or root, val):
            if classes and classes.resolve() in (run.resolve(), *run.resolve().parents):
                raise ValueError(
                    f"run={run} is, or lies in, {classes}, where each folder is a class; give another run=FOLDER"
                )


def open_split(data: str, split: str, class_names: tuple[str, ...] | None = None) -> Source:
    """Open one split of a folder for validation, its classes in the order of a model's `class_names`."""
    root = user_path(data)
    if not root.exists():
        raise FileNotFoundError(f"no folder {data!r}")
    folder = find_split(root, split) or root
    source = open_folder(folder)
    if class_names is None or class_names == source.class_names:
        return source
    unknown = sorted(set(source.class_names) - set(class_names))
    if unknown:
        raise ValueError(f"{root} holds classes that the model does not know: {_some(unknown)}")
    return open_folder(folder, class_map={name: class_names.index(name) for name in source.class_names})


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
            raise _loose(root, loose)
    empty = ValueError(f"no images in {root}; it should hold one folder a class, with {', '.join(EXTENSIONS)}")
    try:
        arguments: dict[str, Any] = {"class_map": class_map} if class_map else {}
        with _image_extensions():
            dataset = create_dataset("", root=str(root), search_split=False, **arguments)
        if is_folder:
            _leave_hidden_out(dataset.reader, root)
    except RuntimeError:
        raise empty from None
    except (tarfile.TarError, AssertionError, TypeError, OSError, ValueError) as error:
        if str(error).startswith("not enough values to unpack"):  # what timm makes of a .tar without any
            raise empty from None
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
        homes = [os.path.dirname(_within(path, root)) for path, _ in reader.samples]
        _check_none_empty(homes, root)
    else:
        reader.class_name_to_idx, reader.targets = mapping, np.array(targets)
        homes = [_home(member, archive) for member, _, archive in reader.samples]
        if "." in homes:
            raise _loose(root, reader.samples[homes.index(".")][0].name)
    _check_homes(homes, targets, root)
    names = [""] * (max(mapping.values()) + 1)
    for name, index in mapping.items():
        names[index] = name
    return Source(dataset, np.arange(len(targets)), np.array(targets, dtype=np.int64), tuple(names))


@contextmanager
def _image_extensions() -> Iterator[None]:
    """Have timm's readers take what this package takes for images; one has no argument for it."""
    before = img_extensions.get_img_extensions()
    img_extensions.set_img_extensions(EXTENSIONS)
    try:
        yield
    finally:
        img_extensions.set_img_extensions(before)


def _loose(root: Path, name: str) -> ValueError:
    return ValueError(f"{root} holds images of no class ({name}, ...); each belongs into a folder of its class")


def _home(member: tarfile.TarInfo, archive: tarfile.TarInfo | None) -> str:
    """Return the folder of a .tar's member, in the .tar within that if it is of one; "." where there is none."""
    above = "" if archive is None else os.path.splitext(os.path.basename(archive.name))[0]
    return os.path.normpath(os.path.join(above, os.path.dirname(member.path)))


def _check_none_empty(homes: Iterable[str], root: Path) -> None:
    """Refuse a class without images."""
    # a class is a folder that holds something: sub-folders of one without images are not classes of their own
    holding = {home.partition(os.sep)[0] for home in homes}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name not in holding:
            raise ValueError(f"class {folder.name!r} is empty: no images in {folder}; add some or remove the folder")


def _check_homes(homes: Sequence[str], targets: Sequence[int], root: Path) -> None:
    """Refuse a class of two folders, and one within another."""
    of_class: dict[int, str] = {}  # timm names a class by the last folder alone
    for home, target in zip(homes, targets, strict=True):
        if of_class.setdefault(target, home) != home:
            name, both = os.path.basename(home), sorted((of_class[target], home))
            raise ValueError(
                f"class {name!r} has two folders in {root}, {' and '.join(both)}; give each class one folder, of a"
                " name of its own"
            )
    folders = {Path(home) for home in of_class.values()}
    for folder in sorted(folders):
        if above := folders.intersection(folder.parents):
            raise ValueError(
                f"{root / above.pop()} holds images, and so does {folder.name} in it, which would be a class of its"
                " own; give each class one folder"
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
        raise ValueError(f"dataset={name!r}, split {split!r}: {one_line(error)}") from None
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
