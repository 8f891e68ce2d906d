"""A folder with one folder a class, or a .tar of one, as a `Source`."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from timm.data import create_dataset
from timm.data.readers import img_extensions
from timm.utils.misc import natural_key

from glattn.training.source import SPLITS, Source, within

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


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
        if root.suffix == ".tar" and not _index_serves(root):
            arguments["cache_tarinfo"] = False
        with _image_extensions():
            dataset = create_dataset("", root=str(root), search_split=False, **arguments)
        if is_folder:
            _leave_hidden_out(dataset.reader, root)
    except RuntimeError:
        raise empty from None
    except (tarfile.TarError, AssertionError, TypeError, OSError, ValueError, EOFError, UnpicklingError) as error:
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
        homes = [os.path.dirname(within(path, root)) for path, _ in reader.samples]
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


def _index_serves(root: Path) -> bool:
    """Tell whether the index that timm leaves beside a .tar above 10 GB is of this one, or can be written."""
    index = root.with_name(f"_{root.stem}_tarinfos.pickle")
    if index.exists():
        return index.stat().st_mtime >= root.stat().st_mtime
    return os.access(root.parent, os.W_OK)


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
    split = any(root.name in names for names in SPLITS.values())
    also = f", and a class named {root.name} is taken for a split" if split else ""
    return ValueError(f"{root} holds images of no class ({name}, ...); each belongs into a folder of its class{also}")


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


def _leave_hidden_out(reader: Any, root: Path) -> None:
    """Drop images in folders whose names begin with a dot, as .ipynb_checkpoints; timm takes these for classes."""
    reader.samples = [
        sample for sample in reader.samples if f"{os.sep}." not in os.sep + os.path.dirname(within(sample[0], root))
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
