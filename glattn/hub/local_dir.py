"""The config.json beside weights, in a folder that timm and transformers load a model from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import nn


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
