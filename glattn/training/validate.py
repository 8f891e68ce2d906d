"""``glattn validate``: how good and how fast a checkpoint is on a folder of images."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glattn.files import user_path
from glattn.training.predict import MODEL_HELP, add_input_arguments, open_classifier

if TYPE_CHECKING:
    from glattn.training.classifier import Classifier
    from glattn.training.source import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "--data", required=True, metavar="FOLDER", help="folder with one folder a class, or with val/ of that kind"
    )
    parser.add_argument("--split", default="val", help="which folder of --data, where it holds several (%(default)s)")
    add_input_arguments(parser)
    parser.add_argument(
        "--present-only",
        action="store_true",
        help="choose among the folder's classes only, as is usual for ImageNet-A and -R (default: among the model's)",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read images (%(default)s)")
    parser.add_argument("--output", metavar="FILE.json", help="write the numbers, and each class's accuracy, here too")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write JSON if asked."""
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
    output = user_path(args.output) if args.output else None
    if output is not None and not Path(os.path.realpath(output)).parent.is_dir():
        raise FileNotFoundError(f"--output {output}: its folder is not there")
    if output is not None and output.exists() and (not output.is_file() or output.parent == Path("/dev")):
        raise ValueError(f"--output {output}: {'is a folder' if output.is_dir() else 'is no plain file'}")
    folder = find_images(args.data, args.split)
    classifier = open_classifier(args)
    source = open_images(folder, classifier, args.model)
    found = measure(
        classifier,
        source,
        batch_size=args.batch_size,
        workers=args.workers,
        present_only=args.present_only,
    )
    found = {"model": args.model, "checkpoint": args.checkpoint, "data": str(folder), **found}
    print(table(found))
    if output is not None:
        from glattn.files import write_text

        write_text(output, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        print(f"written: {output}")
    return 0


def find_images(data: str, split: str) -> Path:
    """Return the folder (or .tar) of the split, or `data` itself where it has no splits."""
    from glattn.training.data import find_split
    from glattn.training.source import SPLITS

    root = user_path(data)
    if not root.exists():
        raise FileNotFoundError(f"no folder {data!r}")
    if not root.is_dir():
        return root
    found = find_split(root, split)
    if found is not None:
        return found
    # else the images of all splits would be taken for one
    others = [other for names in SPLITS.values() if (other := find_split(root, names[0])) is not None]
    if others:
        raise ValueError(
            f"{root} has no split {split!r}; it has {', '.join(path.name for path in others)}: --split NAME"
        )
    return root


def open_images(folder: Path, classifier: Classifier, model: str) -> Source:
    """Open a folder of images, its classes numbered as the model numbers them.

    Raises:
        ValueError: The folder has a class that the model does not know, or does not tell which is which.
    """
    from glattn.training.data import open_split
    from glattn.training.image_folder import open_folder

    names = classifier.class_names
    if names is None:
        source = open_folder(folder)
        if len(source.class_names) != len(classifier.descriptions):
            raise ValueError(
                f"{model} has {len(classifier.descriptions)} classes without names, {folder} has"
                f" {len(source.class_names)}: which is which? Give a checkpoint whose config.json has label_names"
            )
        return source
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{model}: its config.json gives {len(twice)} name(s) to several classes, e.g. {twice[0]!r}")
    return open_split(str(folder), "", names)


class Stopwatch:
    """Images and seconds of a loader's batches: of work on them, and of that with waiting for them.

    The first batch is left out of both: it pays for starting workers and for warming up. So is the last of the second:
    a loader that reads ahead has nothing left to read then.
    """

    def __init__(self) -> None:
        self.worked, self.working = 0, 0.0
        self.read, self.reading = 0, 0.0

    def __call__(self, loader: Any) -> Iterator[Any]:
        """Yield the loader's batches."""
        batches, number, images, seconds = iter(loader), 0, 0, 0.0
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            got = time.perf_counter()
            if batch is None:
                return
            if number > 1:  # the batch before was not the last
                self.read += images
                self.reading += seconds
            yield batch
            done = time.perf_counter()
            images, seconds = len(batch[0]), done - begun
            if number > 0:
                self.worked += images
                self.working += done - got
            number += 1

    def speeds(self) -> dict[str, float | None]:
        """Return images a second, with reading and of the model alone; None where there were too few batches."""
        return {
            "images_per_second": round(self.read / self.reading, 1) if self.read else None,
            "model_images_per_second": round(self.worked / self.working, 1) if self.worked else None,
        }


def measure(
    classifier: Classifier, source: Source, *, batch_size: int = 64, workers: int = 2, present_only: bool = False
) -> dict[str, Any]:
    """Return the accuracies, loss, calibration error and speed of a classifier on a source, ready for JSON.

    Args:
        classifier: The model and what its images go through.
        source: The images, its classes numbered as the model's.
        batch_size: Images at a time; of no influence on anything but speed.
        workers: Processes that read images.
        present_only: Let the model choose among the source's classes only.

    Raises:
        ValueError: No image can be read, or the model's answers are not finite.
    """
    import numpy as np
    from tqdm import tqdm

    from glattn.training.validation import AmongClasses, predict_source

    device = next(classifier.model.parameters()).device
    present = np.unique(source.targets)
    model = AmongClasses(classifier.model, present, len(classifier.descriptions)) if present_only else classifier.model
    watch = Stopwatch()

    def watched(loader: Any) -> Any:
        return tqdm(watch(loader), total=len(loader), unit="batch", disable=not sys.stderr.isatty(), leave=False)

    predictions = predict_source(
        model, source, classifier.data_config, batch_size=batch_size, workers=workers, device=device, progress=watched
    )
    metrics = predictions.metrics()
    if not math.isfinite(metrics["loss"]):
        broken = int((~np.isfinite(predictions.loss)).sum())
        raise ValueError(f"the model's answers to {broken} of {len(predictions.index)} images are not finite")
    names = classifier.class_names or source.class_names
    share = predictions.class_accuracy(len(names))
    config = classifier.data_config
    return {
        **metrics,
        "unreadable": [source.name(int(index)) for index in predictions.bad],
        "classes": len(names),
        "classes_present": len(present),
        "present_only": present_only,
        "size": list(config["input_size"][-2:]),
        **{key: config[key] for key in ("crop_pct", "crop_mode", "interpolation")},
        **watch.speeds(),
        "batch_size": batch_size,
        "device": str(device),
        "class_top1": {names[n]: round(100 * float(share[n]), 2) for n in present if np.isfinite(share[n])},
    }


def table(found: dict[str, Any]) -> str:
    """Return what was measured, a line each."""
    speed, model_speed = found["images_per_second"], found["model_images_per_second"]
    seen = f"{found['classes_present']} of {found['classes']}" + (", chosen among" if found["present_only"] else "")
    rows = [
        ("model", found["model"]),
        ("images", f"{found['images']} in {found['data']}"),
        ("classes", seen),
        ("input", "{}x{}, crop {} {:g}, {}".format(
            *found["size"], found["crop_mode"], found["crop_pct"], found["interpolation"])),
        ("top-1", f"{found['top1']:.2f}%"),
        ("top-5", f"{found['top5']:.2f}%"),
        ("loss", f"{found['loss']:.4f} nats"),
        ("ECE", f"{found['ece']:.2f}%"),
        ("speed", f"{speed} img/s with reading, {model_speed} img/s the model alone ({found['device']})"
         if speed else "not measured: fewer than three batches"),
    ]  # fmt: skip
    lines = [f"{name:<8} {value}" for name, value in rows]
    if found["unreadable"]:
        lines.append(f"{len(found['unreadable'])} image(s) could not be read and were left out:")
        lines += [f"  {name}" for name in found["unreadable"][:10]]
        if len(found["unreadable"]) > 10:
            lines.append(f"  and {len(found['unreadable']) - 10} more; --output lists them all")
    return "\n".join(lines)
