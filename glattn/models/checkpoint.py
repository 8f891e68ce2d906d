"""A checkpoint against the model that it is to fill: resized where that is right, else refused in one line.

timm reads the file and adapts classifier and first convolution; what is here stands between the two, so that
nothing is loaded in part, in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from glattn.config import GLAttnConfig
from glattn.layers.conv2d import FoldedConv
from glattn.models.variants import VARIANTS
from glattn.models.weights import CONFIG, check_digest, check_finite, unwrap, weights_file

# Which options a tensor's shape hangs on, for checkpoints that do not say how they were made.
_OPTIONS = (
    (r"^head\.fc\.", "num_classes"),
    (r"^stem\.conv1\.conv\.", "in_chans or dims"),
    (r"^stem\.", "dims"),
    (r"\.mlp\.", "mlp_ratio or dims"),
    (r"\.local\.", "local, kernel_sizes, local_groups, local_gate or dims"),
    (r"\.attn\.", "layout, pool_stride, window_size, position, mechanism, num_heads, head_dim or dims"),
    (r"\.blocks\.(\d+)\.", "depths"),
)


def checkpoint_filter_fn(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    *,
    named: bool = False,
    features_only: bool = False,
    strict: bool = True,
    cache_dir: str | Path | None = None,
) -> dict[str, Tensor]:
    """Return the checkpoint's tensors, ready for timm to adapt and load, or say in one line why they are not.

    Containers and wrappers' prefixes go, tables are resized to the model's image size and windows, and what
    the weights themselves say about classes and channels overrules a ``pretrained_cfg`` that differs.

    Args:
        state_dict: What the file holds.
        model: The model to be filled, whole: timm cuts it down for ``features_only`` after loading.
        named: The file is the one that the model's ``pretrained_cfg`` names; its digest is checked.
        features_only: The classifier is not wanted, so its shape does not matter.
        strict: Refuse keys that are missing or unexpected (``pretrained_strict``); timm warns of them otherwise.
        cache_dir: Where the Hub's files are kept, if not in the Hub's own cache.

    Raises:
        ValueError: A key is missing, unexpected, of another shape or type, not finite, or damaged.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    path, source = weights_file(cfg, cache_dir) if named else (None, "checkpoint")
    tensors = unwrap(state_dict, source)
    check_finite(tensors, source)
    if path is not None:
        check_digest(tensors, path)
    for name, module in model.named_modules():
        if hasattr(module, "resize_state"):
            module.resize_state(tensors, f"{name}." if name else "")
    adapted = _take_source_sizes(tensors, model, cfg, features_only)
    _check_against(tensors, model, source, adapted, _difference(model, cfg, path), named=named, strict=strict)
    return tensors


def _take_source_sizes(
    tensors: Mapping[str, Tensor], model: nn.Module, cfg: dict[str, Any], features_only: bool
) -> set[str]:
    """Let the weights tell timm their classes and channels; return the keys that timm then drops or adapts.

    Only where the user asked for other sizes than the ``pretrained_cfg``'s, or for the weights' own: a
    checkpoint of other sizes than both is refused.
    """
    adapted: set[str] = set()
    classes, channels = getattr(model, "num_classes", None), getattr(model, "in_chans", None)
    for name in _names(cfg.get("classifier")):
        weight = tensors.get(f"{name}.weight")
        if weight is not None and weight.shape[0] == classes and not features_only:
            cfg["num_classes"] = classes
        if features_only or classes != cfg.get("num_classes"):
            adapted |= {f"{name}.weight", f"{name}.bias"}
    for name in _names(cfg.get("first_conv")):
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.ndim != 4 or not cfg.get("input_size"):
            continue
        asked = channels != cfg["input_size"][0]
        if asked or weight.shape[1] == channels:
            cfg["input_size"] = (weight.shape[1], *cfg["input_size"][1:])
        if asked and weight.shape[1] != channels:
            adapted.add(f"{name}.weight")
    return adapted


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _check_against(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    source: str,
    adapted: set[str],
    difference: str,
    *,
    named: bool,
    strict: bool,
) -> None:
    """Raise a ``ValueError`` unless keys (if ``strict``), shapes and kinds are the model's, but for ``adapted``."""
    expected = model.state_dict()

    def refuse(key: str, what: str, cure: str = "") -> ValueError:
        why = difference and difference + cure
        return ValueError(f"{source}: {key} {what}; {_remedy(key, tensors, model) or why or _guess(key)}")

    missing = [
        # torch fills in the counter of batches, which older checkpoints have not
        key
        for key in expected
        if key not in tensors and key not in adapted and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in tensors if key not in expected and key not in adapted]
    for what, keys in (("missing", missing), ("not in this model", unexpected)) if strict else ():
        if keys:
            others = f"and {len(keys) - 1} more keys are" if len(keys) > 1 else "is"
            shared = expected.keys() & tensors.keys() - adapted
            fit = named and all(tensors[key].shape == expected[key].shape for key in shared)
            cure = "; pretrained_strict=False loads what they share" if fit else ""
            raise refuse(keys[0], f"{others} {what}", cure)
    for key, want in expected.items():
        if key in adapted or key not in tensors:
            continue
        value = tensors[key]
        if value.shape != want.shape:
            shapes = f"{tuple(value.shape)} in the checkpoint and {tuple(want.shape)} in the model"
            raise refuse(key, f"has shape {shapes}")
        if value.is_floating_point() != want.is_floating_point() or value.is_complex():
            raise refuse(key, f"is {value.dtype} in the checkpoint and {want.dtype} in the model")


def _remedy(key: str, tensors: Mapping[str, Tensor], model: nn.Module) -> str:
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name, value = key.rpartition(".")[0], tensors.get(key)
    if value is None and f"{name.removesuffix('.conv')}.weight" in tensors and name.endswith(".conv"):
        return "the checkpoint is of a folded model: save the one that it was folded from"
    if name in _names(cfg.get("classifier")):
        if value is None:
            return "it has no classifier: add num_classes=0 to pretrained_cfg_overlay to start a new one"
        if value.shape[0] == getattr(model, "num_classes", 0):
            return f"its classifier reads {value.shape[1]} channels: take its global_pool, or another num_classes"
        return f"create the model with num_classes={value.shape[0]}"
    first = name in _names(cfg.get("first_conv")) and value is not None and value.ndim == 4
    if first and value is not None and value.shape[1] != getattr(model, "in_chans", 0):
        return f"create the model with in_chans={value.shape[1]}"
    return ""


def is_folded(model: nn.Module) -> bool:
    """Tell whether any part of a model is folded, so that its weights fit none that can be created."""
    return any(isinstance(part, FoldedConv) for part in model.modules())


def _guess(key: str) -> str:
    options = next((options for pattern, options in _OPTIONS if re.search(pattern, key)), "dims or depths")
    return f"another variant, or made with another {options}? Create the model as the checkpoint was made"


def _difference(model: nn.Module, cfg: Mapping[str, Any], path: Path | None) -> str:
    """Return which options the checkpoint was made with and the model was not, if a config.json says."""
    config, architecture = getattr(model, "cfg", None), cfg.get("architecture")
    if not isinstance(config, GLAttnConfig) or architecture not in VARIANTS:
        return ""
    made: Mapping[str, Any] = getattr(model, "pretrained_model_args", None) or {}
    try:
        if not made and path is not None and (path.parent / CONFIG).is_file():
            described = json.loads((path.parent / CONFIG).read_text(encoding="utf-8"))
            if described["architecture"] != architecture:
                return f"the checkpoint is a {described['architecture']}, the model a {architecture}"
            made = described.get("model_args", {})
        here = config.to_dict()
        there = VARIANTS[architecture].replace(**{k: v for k, v in made.items() if k in here}).to_dict()
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""  # a hint, from a file that may itself be broken
    changed = [name for name in here if here[name] != there[name]]
    if not changed:
        return ""
    was = ", ".join(f"{name}={_short(there[name])}" for name in changed)
    now = ", ".join(f"{name}={_short(here[name])}" for name in changed)
    return f"the checkpoint was made with {was}, the model with {now}"


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 1 and all(v == value[0] for v in value):
        value = value[0]
    return repr(value)
