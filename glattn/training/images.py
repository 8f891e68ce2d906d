"""Reading images of any kind as 8-bit RGB, and finding those that cannot be read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps
from timm.data import auto_augment

from glattn.files import one_line

IMAGES_A_PROCESS = 2000  # starting one takes as long as reading some hundreds


class BadImageError(ValueError):
    """An image that cannot be decoded."""


def read_image(source: str | Path | IO[bytes] | Image.Image) -> Image.Image:
    """Read one image as 8-bit RGB.

    16-bit and float images are scaled, not clipped, and pixels that are no finite number are black; what is
    transparent shows white; of an animation, the first frame is taken. Truncated files are bad.

    Raises:
        BadImageError: It cannot be decoded; the message says why, in one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on metadata are of no use at epoch 37
            if isinstance(source, Image.Image):
                return _to_rgb(source)
            with Image.open(source) as image:
                return _to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise BadImageError(one_line(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        values = np.where(np.isfinite(values), values, 0.0)
        # without a declared range, the usual ones: 0..1, 8 bits, 16 bits
        top = 65535.0 if image.mode.startswith("I;16") else next(
            (t for t in (1.0, 255.0, 65535.0) if values.max(initial=0) <= t), float(values.max(initial=1)))  # fmt: skip
        if image.mode == "I":
            top = max(top, 65535.0 if image.format == "PNG" else 255.0)
        image = Image.fromarray(np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the first bits of each channel, as timm's policies ask; none leaves black.

    RandAugment's magnitude 10, which rand-m9 with its noise reaches now and then, keeps none: Pillow from 13 on
    refuses that, in the middle of an epoch.
    """
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


auto_augment.NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), posterize))


def explain_bad(path: str) -> str | None:
    """Return why an image cannot be read, or None."""
    try:
        read_image(path)
    except BadImageError as error:
        return str(error)
    return None


def find_bad(paths: list[str], *, workers: int | None = None, progress: Any = iter) -> Iterator[tuple[str, str]]:
    """Yield (path, reason) for every image of `paths` that cannot be read, in order.

    Args:
        paths: Image files.
        workers: Processes; None for one a core.
        progress: Wraps the iterator over the results, one a path (tqdm, say).
    """
    workers = min(workers if workers is not None else os.cpu_count() or 1, max(1, len(paths) // IMAGES_A_PROCESS))
    if workers <= 1:
        reasons: Any = map(explain_bad, paths)
        yield from ((path, reason) for path, reason in zip(paths, progress(reasons), strict=True) if reason)
        return
    import multiprocessing

    # spawn: the caller may already have threads, which a fork would leave half-copied
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        reasons = pool.map(explain_bad, paths, chunksize=32)
        yield from ((path, reason) for path, reason in zip(paths, progress(reasons), strict=True) if reason)
