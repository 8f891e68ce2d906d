"""A folder that timm and transformers load a model from: config.json and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import nn

from glattn.models.weights import CONFIG, WEIGHTS, save_weights


def by_index(names: Any, count: int) -> tuple[str, ...]:
    """Return the names of this many classes of a ``pretrained_cfg``: a list of them, or each under its index."""
    if isinstance(names, Mapping):  # the index as text where it came from JSON
        names = [names.get(index, names.get(str(index), "")) for index in range(count)]
    return tuple(str(name) for name in names)


def all_names(names: Any, count: int) -> tuple[str, ...] | None:
    """Return the names of this many classes, of a list or under their indices; None where they are not of all."""
    if isinstance(names, Mapping) and {str(index) for index in names} != {str(index) for index in range(count)}:
        return None
    return by_index(names, count) if names and len(names) == count else None


def model_folder(path: Path) -> Path:
    """Return the folder that holds a model: a training run's ``best``, or the one given.

    Raises:
        FileNotFoundError: Neither holds a config.json.
    """
    for folder in (path / "best", path):
        if (folder / CONFIG).is_file():
            return folder
    raise FileNotFoundError(f"{path}: no model here: neither best/{CONFIG} nor {CONFIG}; no checkpoint yet?")


def save_model(model: nn.Module, folder: Path, **described: Any) -> dict[str, Any]:
    """Write a model's weights and config.json, of which ``described`` is `save_config`'s; return what that holds.

    Raises:
        ValueError: A weight is not finite.
    """
    save_weights(model, folder / WEIGHTS)
    return save_config(model, folder / CONFIG, **described)


def save_config(
    model: nn.Module,
    path: Path,
    *,
    label_names: Iterable[str] | None = None,
    data_config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model's config.json and return what it holds.

    Args:
        model: The model.
        path: The file.
        label_names: The classes' names.
        data_config: Size, normalisation, crop and interpolation of the images, if not those of the model's own cfg.
    """
    described = {"label_names": list(label_names)} if label_names is not None else {}
    save_config_for_hf(model, str(path), model_config=described, data_config=data_config)
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # the first is said at the root already: transformers' wrapper gives it beside the model_args, and would give it
    # twice; the other was about what the model was started from, and these weights are to be whole
    for name in ("num_classes", "pretrained_strict"):
        config.get("model_args", {}).pop(name, None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return config
