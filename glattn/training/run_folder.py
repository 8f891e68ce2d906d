"""What a run leaves behind for a person to read: configuration, environment, metrics, curves, samples."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from glattn.figures import save_figure
from glattn.files import plain, user_path, write_text
from glattn.provenance import commit
from glattn.training.config import TrainConfig
from glattn.training.data import check_run_folder
from glattn.training.source import Source
from glattn.training.validation import Predictions

if sys.platform != "win32":
    import fcntl

_PATIENCE = 10.0  # seconds, in which the workers of a run that was killed are gone


def choose_folder(config: TrainConfig) -> Path:
    """Return the run's folder: the one asked for, or runs/MODEL-DATA, numbered where that exists.

    Raises:
        ValueError: The folder asked for holds another run, or has a name that safetensors cannot take.
    """
    if config.run:
        folder = user_path(config.run)
        if plain(config.run) != config.run:
            raise ValueError(f"run={plain(config.run)}: the name is no UTF-8, under which no weights can be read")
        if not config.resume and (folder / "config.yaml").exists():
            raise ValueError(f"{folder} holds a run already; --resume auto goes on with it, or give another run=FOLDER")
        return folder
    data = Path(config.data).resolve().name if config.data else ""
    name = re.sub(r"[^\w.]+", "-", f"{config.model.rpartition('/')[2]}-{data or config.dataset}").strip("-")
    number, last = 1, Path("runs") / name
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not (folder / "config.yaml").exists():
            return last if config.resume and number > 1 else folder
        number, last = number + 1, folder


def claim(config: TrainConfig, claimed: contextlib.ExitStack) -> Path:
    """Choose a run's folder, and keep it from other processes until the stack is closed.

    Raises:
        ValueError: The folder asked for holds another run or lies among the classes, or another process trains there.
    """
    while True:
        folder = choose_folder(config)
        check_run_folder(config, folder)
        claimed.enter_context(_locked(folder))
        if config.resume or choose_folder(config) == folder:  # no other run has come and gone there meanwhile
            return folder
        claimed.close()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, which ends with this process at the latest; Windows has none such."""
    if folder.is_file():
        raise ValueError(f"run={str(folder)!r} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(
                        f"another process trains in {folder}; give another run=FOLDER, or wait for it"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # one that was refused leaves nothing
            folder.rmdir()


def describe_environment(device: str, processes: int) -> dict[str, Any]:
    """Return the versions, commit, machine and command of this run."""
    import accelerate
    import timm
    import torch
    import torchvision

    import glattn

    versions = {m.__name__: m.__version__ for m in (glattn, torch, torchvision, timm, accelerate, np)}
    return {
        "command": [Path(sys.argv[0]).name.replace("__main__.py", "glattn"), *sys.argv[1:]],  # python -m glattn
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(40) or None,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


def write_start(folder: Path, config: TrainConfig, environment: dict[str, Any]) -> None:
    """Write config.yaml and environment.json."""
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    write_text(folder / "config.yaml", config.to_yaml())


def write_metrics(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write metrics.csv, one row an epoch, and curve.png."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "metrics.csv", text.getvalue())
    draw_curve(folder / "curve.png", rows)


def draw_curve(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw losses and accuracies over the epochs, side by side."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    plot_losses(losses, rows)
    plot_accuracies(accuracies, rows)
    save_figure(figure, path)


def plot_losses(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Plot the losses of training and validation over the epochs."""
    _plot(axes, rows, {"training": "train_loss", "validation": "val_loss"})
    axes.set_title("loss, nats", fontsize=10)


def plot_accuracies(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Plot the accuracies of validation over the epochs."""
    _plot(axes, rows, {"top-1": "top1", "top-5": "top5"})
    best = max(rows, key=lambda row: row["top1"])
    axes.axhline(best["top1"], color="grey", linewidth=0.6)
    axes.set_title(f"best top-1 {best['top1']:.2f}% (epoch {best['epoch']:g})", fontsize=10)
    axes.set_ylabel("validation accuracy, %")


def _plot(axes: Any, rows: Sequence[dict[str, Any]], lines: dict[str, str]) -> None:
    style = {"marker": "."} if len(rows) < 40 else {}
    for label, key in lines.items():
        axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], label=label, **style)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.xaxis.get_major_locator().set_params(integer=True)


def thumbnail(image: Image.Image, side: int = 96) -> Image.Image:
    """Return an image at most `side` pixels wide and high; small ones are enlarged without smoothing."""
    scale = side / max(image.size)
    width, height = (max(1, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def draw_samples(path: Path, source: Source, predictions: Predictions, *, seed: int, count: int = 32) -> None:
    """Draw random validation images with what was predicted of them: green if right, red (and the truth) if not."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(predictions.index))[:count])
    columns = 8
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(columns * 1.25, lines * 1.6), layout="constrained")
    for place, axes in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        axes.set_axis_off()
        if place >= len(chosen):
            continue
        entry = chosen[place]
        image, _ = source.read(int(predictions.index[entry]))
        right = predictions.predicted[entry] == predictions.target[entry]
        title = f"{source.class_names[predictions.predicted[entry]][:16]} {predictions.confidence[entry]:.0%}"
        if not right:
            title += f"\nis {source.class_names[predictions.target[entry]][:16]}"
        axes.imshow(thumbnail(image))
        axes.set_title(plain(title), fontsize=8, color="#15803d" if right else "#b91c1c", parse_math=False)
    save_figure(figure, path)
