"""Training checkpoints that are whole or absent, and the exported model beside them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from glattn.files import one_line, sync
from glattn.hub.local_dir import save_model

_logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{9})\.([0-9a-f]{16})\.pt")


# what a run writes aside and moves into place, in its folder or among its checkpoints
_WRITTEN = "|".join(re.escape(name) for name in (
    "config.yaml", "environment.json", "metrics.csv", "curve.png", "skipped.txt", "samples.png", "report.html", "best",
    "state",
))  # fmt: skip


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written, and nothing else: the folder may hold other things."""
    for path in folder.glob(".*-*"):
        if re.fullmatch(rf"\.({_WRITTEN})-[a-z0-9_]{{8}}", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_state(folder: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Write a training state as ``step-NUMBER.DIGEST.pt`` and drop all but the last `keep`.

    The digest in the name tells a damaged file from a whole one. What claims to be of this step or a later
    one was passed over as damaged when the run was resumed, and goes too.
    """
    with tempfile.TemporaryDirectory(prefix=".state-", dir=_made(folder)) as temporary:
        written = Path(temporary) / "state.pt"
        try:
            with written.open("wb") as file:  # not by name: torch's own writer hides why it failed
                torch.save(state, file)
        except (RuntimeError, OSError) as error:
            raise OSError(f"cannot write a checkpoint in {folder}: {_reason(error)}") from None
        sync(written)
        path = folder / f"step-{step:09d}.{_digest(written)}.pt"
        os.replace(written, path)
    sync(folder)
    for other in folder.glob(f"step-{step:09d}.*.pt"):
        if other != path:
            other.unlink()
    prune(folder, step=step, keep=keep)
    return path


def prune(folder: Path, *, step: int, keep: int) -> None:
    """Leave the last `keep` states up to a step."""
    states = list_states(folder)
    kept = [path for path in states if int(path.name[5:14]) <= step][-keep:]
    for path in set(states) - set(kept):
        path.unlink()


def _reason(error: BaseException) -> str:
    """Return what the system said when a file could not be written; torch wraps it in words of its own."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__context__
    return one_line(error)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def list_states(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))


def load_state(folder: Path, say: Callable[[str], None] = _logger.warning) -> dict[str, Any] | None:
    """Return the newest state that is whole, or None; what is damaged is named and passed over.

    Raises:
        ValueError: There are states, and all of them are damaged.
    """
    states = list_states(folder)
    for path in reversed(states):
        match = _NAME.fullmatch(path.name)
        try:
            if match is None or _digest(path) != match.group(2):
                raise ValueError("its content does not match its digest")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except Exception as error:  # whatever is wrong with it, the one before may be whole
            say(f"{path} is damaged ({one_line(error)[:120]}); trying the one before")
    if states:
        raise ValueError(f"every checkpoint in {folder} is damaged; remove that folder to start anew")
    return None


def export(
    model: nn.Module,
    folder: Path,
    *,
    class_names: tuple[str, ...],
    data_config: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write a model as timm's local-dir, with the metrics it was measured to have.

    Each file is replaced whole, and the weights alone differ from one export of a run to the next, so at
    every instant the folder loads.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        try:
            save_model(model, made, label_names=class_names, data_config=data_config)
        except SafetensorError as error:
            raise OSError(f"cannot write {folder}: {error}") from None
        (made / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        for path in made.iterdir():
            sync(path)
        if folder.exists():
            for name in ("config.json", "model.safetensors", "metrics.json"):
                os.replace(made / name, folder / name)
            sync(folder)
        else:
            os.replace(made, folder)
    sync(folder.parent)
