"""The model and the task that a configuration describes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.data import resolve_data_config
from timm.loss import create_classification_loss
from timm.models import group_parameters, load_state_dict
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TrainingTask
from torch import nn
from torch.nn import functional as F

import glattn  # noqa: F401  (registers the family)
from glattn.files import one_line, user_path
from glattn.hub.loading import check_weights, create_model
from glattn.hub.local_dir import by_index
from glattn.training.config import TrainConfig


def build_model(config: TrainConfig, num_classes: int, *, start: bool = True) -> nn.Module:
    """Create the model of a run, with its starting weights and what is frozen of it.

    Args:
        config: The run's.
        num_classes: Of the data.
        start: Take the weights to start from, if any; a run that goes on has its own.

    Raises:
        ValueError: The model or one of its options is unknown, or the weights are of another model.
    """
    arguments = dict(config.model_args)
    if config.drop_path_rate:
        arguments["drop_path_rate"] = config.drop_path_rate
    own = {"pretrained": config.pretrained and start, "num_classes": num_classes, "drop_rate": config.drop_rate}
    if twice := sorted(own.keys() & arguments.keys()):
        raise ValueError(f"model_args.{twice[0]}: take it out; classes are the data's, the others keys of the recipe")
    if "features_only" in arguments:
        raise ValueError("model_args.features_only: take it out; what has no classifier is not trained here")
    arguments |= own
    model = _sized(config.model, config.image_size, arguments)
    if config.checkpoint and start:
        load_weights(model, config.checkpoint)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except AssertionError as error:
            raise ValueError(f"grad_checkpointing: {config.model}: {error}") from None
    _freeze(model, config.freeze)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def _sized(name: str, size: int | None, arguments: dict[str, Any]) -> Any:
    """Create a model; one that takes images of one size alone takes this."""
    model = create(name, **arguments)
    if "img_size" in arguments or _set_size(model, size):
        return model
    return create(name, img_size=size, **arguments)


def _set_size(model: Any, size: int | None) -> bool:
    """Have a model take images of this size, in pixels; tell whether it does."""
    if not size or not model.pretrained_cfg.get("fixed_input_size"):
        return True
    if not hasattr(model, "set_input_size"):
        return False
    model.set_input_size(img_size=(size, size))
    return True


def create(name: str, **arguments: Any) -> Any:
    """Create a model by timm's name or from the Hub, with errors of one line."""
    try:
        return create_model(name, **arguments)
    except (TypeError, AssertionError, KeyError) as error:
        raise ValueError(f"model {name!r}: {one_line(error)[:300]}") from None


def load_weights(model: nn.Module, path: str) -> bool:
    """Fill a model from a file; only a classifier of other sizes is left as it is. Tell whether the file filled it too.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another model, or holds values that are not finite.
    """
    file = user_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {path!r}")
    try:
        read = load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights: {one_line(error)[:200]}") from None
    own, weights = model.state_dict(), dict(read)
    classifier = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    for name in [n for n, value in weights.items() if n in own and n.startswith(heads) and value.shape != own[n].shape]:
        del weights[name]
    missing = sorted(n for n in own.keys() - weights.keys() if not n.startswith(heads) and "num_batches" not in n)
    unknown = sorted(weights.keys() - own.keys())
    other = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has of another size", other)):
        if names:
            raise ValueError(f"{path} is of another model: it {what} {names[0]!r} ({len(names)} in all)")
    check_weights(read, file)
    model.load_state_dict(weights, strict=False)
    return all(name in weights for name in own if name.startswith(heads))


def _freeze(model: Any, what: str) -> None:
    """Freeze by the groups of parameters that timm's models tell: the stem, one a stage, the head."""
    if what == "none":
        return
    if what == "backbone":
        model.requires_grad_(False)
        classifiers = model.get_classifier()
        for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
            classifier.requires_grad_(True)
        return
    groups = group_parameters(model, model.group_matcher(coarse=True), return_values=True)
    last = {"stem": 1, "stages": max(groups) - 2}[what]
    if last >= max(groups):
        raise ValueError(f"freeze={what}: {type(model).__name__} has {len(groups)} groups of layers; use backbone")
    for number in range(last + 1):
        for parameter in groups[number]:
            parameter.requires_grad_(False)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules without a trainable parameter: their BatchNorm statistics must not move either."""
    return [
        module
        for module in model.modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    ]


def build_teacher(config: TrainConfig, class_names: Sequence[str]) -> nn.Module:
    """Create the model that is distilled from.

    Raises:
        ValueError: Its logits are matched, but it comes without a classifier of these classes.
    """
    arguments = {"pretrained": not config.teacher_checkpoint, "num_classes": len(class_names)}
    teacher = _sized(config.teacher, config.image_size, arguments)
    if config.teacher_checkpoint:
        try:
            knows = load_weights(teacher, config.teacher_checkpoint)
        except ValueError:  # weights of the model's own size, it may be
            teacher = create(config.teacher, **arguments)
            knows = load_weights(teacher, config.teacher_checkpoint)
            if not _set_size(teacher, config.image_size):
                raise
        names = _names_beside(config.teacher_checkpoint)
    else:
        cfg = teacher.pretrained_cfg
        names, knows = cfg.get("label_names"), cfg.get("num_classes") == len(class_names)
    names = by_index(names or (), len(class_names))
    # names of which none is the data's may stand for the same: words, and WordNet's numbers as folders
    knows = knows and (names == tuple(class_names) or not set(names) & set(class_names))
    if config.distill == "logits" and not knows:
        raise ValueError(
            f"teacher {config.teacher_checkpoint or config.teacher!r}: its classifier is not of the data's "
            f"{len(class_names)} classes in their order, so its logits say nothing; train it on these images first "
            "(teacher_checkpoint=FILE), or take distill=features"
        )
    return teacher


def _names_beside(checkpoint: str) -> Any:
    """Return the classes' names of the config.json beside a file of weights, if they are there."""
    try:
        config = json.loads((user_path(checkpoint).parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("label_names") if isinstance(config, dict) else None


class _WeightedCrossEntropy(nn.CrossEntropyLoss):
    """torch's, over the number of images, not over their weights: the parts of a batch then add up to its loss."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        total = F.cross_entropy(input, target, self.weight, label_smoothing=self.label_smoothing, reduction="sum")
        return total / len(input)


def build_task(
    config: TrainConfig, model: nn.Module, class_names: Sequence[str], counts: np.ndarray, device: torch.device
) -> TrainingTask:
    """Create timm's task: classification, or distillation from a teacher."""
    weight = None
    if config.class_weights == "balanced":
        weight = torch.tensor(counts.sum() / (len(counts) * counts.clip(min=1)), dtype=torch.float32)
    mixed = config.mixup > 0 or config.cutmix > 0
    smoothing = 0.0 if mixed else config.label_smoothing  # Mixup smooths the targets that it makes
    if config.loss == "bce":
        criterion = create_classification_loss("bce", smoothing=smoothing, soft_targets=mixed, class_weight=weight)
    else:
        kind = nn.CrossEntropyLoss if weight is None else _WeightedCrossEntropy
        criterion = kind(weight, label_smoothing=smoothing)
    if not config.teacher:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    teacher = build_teacher(config, class_names).to(device)
    options: dict[str, Any] = {
        "criterion": criterion,
        "distill_loss_weight": config.distill_weight,
        "task_loss_weight": 1 - config.distill_weight,
        "device": device,
        "verbose": False,
    }
    if config.distill == "features":
        return FeatureDistillationTask(model, teacher, **options)
    return LogitDistillationTask(model, teacher, temperature=config.distill_temperature, **options)


def data_config_of(model: nn.Module, config: TrainConfig) -> dict[str, Any]:
    """Return timm's data configuration: size, normalisation, resize filter and crop of validation."""
    if model.in_chans != 3:
        raise ValueError(f"the model takes {model.in_chans} channel(s); training reads RGB images")
    arguments: dict[str, Any] = {"interpolation": config.interpolation or None, "crop_pct": config.crop_pct}
    if config.image_size:
        arguments["input_size"] = (3, config.image_size, config.image_size)
    resolved: dict[str, Any] = resolve_data_config(arguments, model=model)
    return resolved
