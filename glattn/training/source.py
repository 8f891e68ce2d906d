"""The images of one split."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Sampler

from glattn.files import one_line
from glattn.training.batches import make_loader
from glattn.training.images import BadImageError, read_image

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

    def close(self) -> None:
        """Close the .tar that reading opened, if any: open, it can be neither shared with a process nor sent."""
        state = getattr(getattr(self.dataset, "reader", None), "tar_state", None)
        if state is not None:
            for each in (state, *state.children.values()):  # of a .tar of .tar files, theirs too
                each.reset()

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
            paths = (os.path.normpath(path if root is None else within(path, root)) for path in paths)
            images = sorted(zip((path.replace(os.sep, "/") for path in paths), images, strict=True))
        return hashlib.sha256(json.dumps(images).encode()).hexdigest()

    def loader(self, batches: Sampler[list[tuple[int, int]]], data_config: dict[str, Any], **options: Any) -> Any:
        """Return the batches' images, see `make_loader`."""
        return make_loader(self, batches, data_config, **options)

    def class_counts(self) -> np.ndarray:
        """Return the number of images of each class."""
        return np.bincount(self.targets, minlength=len(self.class_names))


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


def within(path: str, root: str | Path) -> str:
    """Return what of a path is behind its root."""
    return path[len(os.path.join(root, "")) :]
