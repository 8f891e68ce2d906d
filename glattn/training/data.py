"""The images of a run: sources with classes that agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from timm.data import create_dataset

from glattn.files import one_line, user_path
from glattn.training.config import DRAWN, TrainConfig
from glattn.training.digits import write_digits
from glattn.training.image_folder import open_folder
from glattn.training.source import SPLITS, Source, split_source


def open_sources(config: TrainConfig) -> tuple[Source, Source]:
    """Open the training and the validation images, and check that they are fit to train on.

    Raises:
        ValueError: One class only, an empty class, or classes that differ between the splits.
        FileNotFoundError: There is no such folder.
    """
    if config.dataset in DRAWN:
        from glattn.training.pretrain import open_formula

        return open_formula(config)
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
        columns = reader.dataset.features
        if key not in columns:
            raise ValueError(f"dataset={name!r} has no column {key!r} of classes; it has {_some(list(columns))}")
        names = getattr(columns[key], "names", None)
        targets = np.array([*reader.dataset[key]])
        if targets.ndim != 1 or targets.dtype.kind not in "iu" or targets.min() < 0:
            raise ValueError(f"dataset={name!r}, split {split!r}: column {key!r} does not hold classes' numbers")
    else:
        targets = np.asarray(getattr(dataset, "targets", []), dtype=np.int64)
        names = getattr(dataset, "classes", None)
    if len(targets) != len(dataset):
        raise ValueError(f"dataset={name!r} does not tell its classes without reading every image")
    if names is None:
        names = [str(number) for number in range(int(targets.max()) + 1)]
    return Source(dataset, np.arange(len(targets)), targets, tuple(str(n) for n in names))


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
