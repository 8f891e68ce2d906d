"""A checkpoint as a classifier: its model, the names of its classes, and what an image goes through first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import is_model, load_state_dict
from timm.models._hub import load_model_config_from_path
from torch import nn

from glattn.files import user_path
from glattn.hub.loading import create_model, plain_errors
from glattn.hub.local_dir import by_index, model_folder

_WHAT = "a run folder, a folder with config.json and weights, a file of weights, hf-hub:ORG/NAME, or a timm model"


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A model in eval mode and what goes with it.

    Args:
        model: The model.
        class_names: By class index, as folders are named; None where the checkpoint does not tell.
        descriptions: By class index, for people; the names themselves where there is nothing better.
        data_config: timm's: input_size, mean, std, interpolation, crop_pct, crop_mode.
    """

    model: nn.Module
    class_names: tuple[str, ...] | None
    descriptions: tuple[str, ...]
    data_config: dict[str, Any]


def open_checkpoint(
    checkpoint: str,
    *,
    model_name: str | None = None,
    size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
) -> Classifier:
    """Load a classifier from wherever it lies.

    Args:
        checkpoint: A run folder (its best is taken), a folder with config.json and weights, a file of weights,
            ``hf-hub:ORG/NAME``, ``local-dir:FOLDER``, or the name of a timm model with pretrained weights.
        model_name: The model of a file that has no config.json beside it.
        size: Side of the images, pixels; None for the size the checkpoint is tested at.
        crop_pct: Share of the resized image's side that the model sees; None for the checkpoint's.
        crop_mode: timm's ``center``, ``squash`` or ``border``; None for the checkpoint's.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is damaged, or not of a classifier of colour images.
    """
    model = _load(checkpoint, model_name)
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if size is not None and cfg.get("fixed_input_size") and tuple(cfg["input_size"][-2:]) != (size, size):
        model = _load(checkpoint, model_name, img_size=size)  # its tables of positions are resized on loading
    count = int(getattr(model, "num_classes", 0) or 0)
    if count < 1:
        raise ValueError(f"{checkpoint}: has no classifier (num_classes={count}); train one on it first")
    if model.in_chans != 3:
        raise ValueError(f"{checkpoint}: takes {model.in_chans} channel(s); only RGB models are read here")
    asked = {"img_size": size, "crop_pct": crop_pct, "crop_mode": crop_mode}
    data_config = resolve_model_data_config(model, args=asked, use_test_size=True)
    names, descriptions = _names(cfg, count, checkpoint)
    return Classifier(model=model.eval(), class_names=names, descriptions=descriptions, data_config=data_config)


def _load(checkpoint: str, model_name: str | None, **model_args: Any) -> nn.Module:
    path = user_path(checkpoint)
    if path.is_dir():
        return create_model(f"local-dir:{model_folder(path)}", pretrained=True, **model_args)
    if path.is_file():
        return _load_file(path, model_name, model_args)
    if not checkpoint.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not is_model(checkpoint.partition(".")[0]):
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint; give {_WHAT}")
    return create_model(checkpoint, pretrained=True, **model_args)


def _load_file(path: Path, model_name: str | None, model_args: dict[str, Any]) -> nn.Module:
    if model_name is not None:
        cfg = create_model(model_name, num_classes=1).pretrained_cfg
        classifier = cfg.get("classifier")  # type: ignore[operator, union-attr]
        if not classifier:
            raise ValueError(f"{model_name} has no classifier")
        first = classifier if isinstance(classifier, str) else classifier[0]  # of a distilled model's, say
        model_args["num_classes"] = _count_classes(path, first)
    elif (path.parent / "config.json").is_file():
        with plain_errors(str(path.parent)):
            cfg, model_name, saved = load_model_config_from_path(str(path.parent))
        model_args = {"pretrained_cfg": cfg, "num_classes": cfg["num_classes"], **(saved or {}), **model_args}
    else:
        raise ValueError(
            f"{path}: no config.json beside it tells its model; give the model's name, and the file by --checkpoint"
        )
    return create_model(model_name, checkpoint_path=str(path), **model_args)


def _count_classes(path: Path, classifier: str) -> int:
    """Return the rows of the classifier's weights in a file."""
    with plain_errors(str(path)):
        state = load_state_dict(str(path))
    found = [value for key, value in state.items() if key.endswith(f"{classifier}.weight")]
    if not found:
        raise ValueError(f"{path}: holds no {classifier}.weight; is it of this model?")
    return int(found[0].shape[0])


def _names(cfg: Mapping[str, Any], count: int, checkpoint: str) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    names: Any = cfg.get("label_names")
    described: Any = cfg.get("label_descriptions") or {}
    if not names:
        subset = infer_imagenet_subset({"num_classes": count})
        if subset is None:
            return None, tuple(f"class {index}" for index in range(count))
        info = ImageNetInfo(subset)
        names, described = info.label_names(), info.label_descriptions(as_dict=True)
    names = by_index(names, count)
    if len(names) != count:
        raise ValueError(f"{checkpoint}: its config.json names {len(names)} classes, but the model has {count}")
    return names, tuple(described.get(name, name) for name in names)
