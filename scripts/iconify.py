"""Reading and drawing the icon sets of the npm package @iconify/json."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from glattn.files import one_line

PACKAGE = "@iconify/json@2.2.535"
# what may be used by anyone, in anything, without more than a name: neither copyleft nor non-commercial ones
PERMISSIVE = {
    "Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "OFL-1.1", "Unlicense",
}  # fmt: skip


@dataclass(frozen=True)
class IconSet:
    """One designer's set.

    Args:
        name: The package's short name of it.
        data: What the package holds of it.
        about: What the package's list of sets says of it: author, licence, category, palette.
    """

    name: str
    data: dict[str, Any]
    about: dict[str, Any]

    @property
    def author(self) -> str:
        return str(self.about["author"]["name"])

    @property
    def licence(self) -> str:
        return str(self.about["license"].get("spdx", ""))

    @property
    def icons(self) -> list[str]:
        """Names of the set's own icons: neither other names of them nor withdrawn ones."""
        return sorted(name for name, icon in self.data["icons"].items() if not icon.get("hidden"))

    @property
    def other_names(self) -> dict[str, str]:
        """Other names of icons that are drawn the same."""
        aliases = self.data.get("aliases", {})
        return {name: alias["parent"] for name, alias in aliases.items() if set(alias) <= {"parent", "hidden"}}

    def svg(self, icon: str) -> str:
        """Return an icon as a square, black where it has no colour of its own."""
        drawing = self.data["icons"][icon]

        def value(key: str, default: float) -> float:
            return float(drawing.get(key, self.data.get(key, default)))

        left, top, width, height = value("left", 0), value("top", 0), value("width", 16), value("height", 16)
        side = max(width, height)
        box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{side:g}" height="{side:g}" viewBox="{box}" color="#000">{drawing["body"]}</svg>'
        )


class Package:
    """The unpacked package.

    Args:
        folder: With collections.json and json/.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "collections.json").is_file() or not (folder / "json").is_dir():
            raise FileNotFoundError(f"{folder} is not {PACKAGE}: no collections.json and json/ in it")
        self.folder = folder

    @cached_property
    def about(self) -> dict[str, dict[str, Any]]:
        """The list of sets."""
        return dict(json.loads((self.folder / "collections.json").read_text()))

    def sets(self, names: list[str]) -> Iterator[IconSet]:
        """Yield sets by their names."""
        for name in names:
            path = self.folder / "json" / f"{name}.json"
            if name not in self.about or not path.is_file():
                raise FileNotFoundError(f"{self.folder} has no set {name}: is it {PACKAGE}?")
            yield IconSet(name, json.loads(path.read_text()), self.about[name])


def open_package(path: Path | None, cache: Path) -> Package:
    """Return the package: an unpacked folder, its .tgz, or the registry's by npm as the user has set that up.

    Args:
        path: The folder or the .tgz; None: the registry's.
        cache: Where it is unpacked, once; another .tgz beside it.
    """
    if path is not None and path.is_dir():
        return Package(path / "package" if (path / "package").is_dir() else path)
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder")
        cache = cache.with_name(f"{cache.name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}")
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{cache.name}-", dir=cache.parent) as temporary:
            archive = path or _download(Path(temporary))
            out = Path(temporary) / "out"
            try:
                with tarfile.open(archive) as tar:
                    tar.extractall(out, filter="data")
            except (tarfile.TarError, EOFError, zlib.error) as error:
                raise ValueError(f"{archive} is damaged or no .tgz of {PACKAGE}: {one_line(error)}") from None
            if not (out / "package").is_dir():
                raise ValueError(f"{archive} holds no folder package/: is it the .tgz of {PACKAGE}?")
            (out / "package").rename(cache)
    return Package(cache)


def _download(folder: Path) -> Path:
    try:
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"npm is not installed; get {PACKAGE} otherwise and give its path: --package") from None
    except subprocess.CalledProcessError as error:
        raise OSError(f"npm could not get {PACKAGE}: {error.stderr.strip().splitlines()[-1:]}") from None
    return next(folder.glob("*.tgz"))


def digest(svg: str) -> str:
    """Return what tells one drawing from another."""
    return hashlib.sha256(svg.encode()).hexdigest()[:16]


def draw(svg: str, pixels: int, *, grey: bool) -> Image.Image:
    """Return a drawing on white.

    Raises:
        ValueError: It cannot be drawn.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ValueError("drawing needs resvg-py: pip install 'glattn[icons]'") from None
    png = svg_to_bytes(svg_string=svg, width=pixels, height=pixels, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("L" if grey else "RGB")


FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
SHIFTS = ((1, 0), (-1, 0), (0, 1), (0, -1))  # pixels


def looks(image: Image.Image) -> np.ndarray:
    """Return an image as 24 x 24 values in 0..1, flat: by each filter, by the first moved each way. ``(7, values)``.

    What near-copies are found by: more than one look, since a copy may be drawn a pixel aside, and another filter sees
    another difference.
    """
    moved = [ImageChops.offset(image, x, y) for x, y in SHIFTS]
    drawn = [(image, kind) for kind in FILTERS] + [(each, FILTERS[0]) for each in moved]
    small = [np.asarray(each.resize((24, 24), kind), np.float32).reshape(-1) for each, kind in drawn]
    return np.stack(small) / 255


def copies(held_out: np.ndarray, others: np.ndarray, *, below: float = 0.013) -> np.ndarray:
    """Return for each held-out image whether any other one is nearly the same by any look.

    The limit is above the 0.01 that two drawings may be told apart by, since a reader's own filter is none of these;
    filters that do not average, such as nearest-neighbour, find a few more.

    Args:
        held_out: ``(M, 7, values)``, see `looks`.
        others: ``(N, 7, values)``.
    """
    pairs = [(look, look if look < len(FILTERS) else 0) for look in range(held_out.shape[1])]
    return np.any([near_copies(held_out[:, mine], others[:, theirs], below=below) for mine, theirs in pairs], axis=0)


def near_copies(held_out: np.ndarray, others: np.ndarray, *, below: float = 0.01) -> np.ndarray:
    """Return for each held-out image whether its mean absolute difference to any other one is below the limit.

    Two images' means differ by no more than the images do, so only those of about its own mean are compared.

    Args:
        held_out: ``(M, values)``.
        others: ``(N, values)``.
    """
    means = others.mean(1)
    order = np.argsort(means)
    others, means = others[order], means[order]
    found = np.zeros(len(held_out), bool)
    slack = below + 1e-4  # the means are rounded
    for index, image in enumerate(held_out):
        first, last = np.searchsorted(means, [image.mean() - slack, image.mean() + slack])
        found[index] = first < last and np.abs(others[first:last] - image).mean(1).min() < below
    return found
