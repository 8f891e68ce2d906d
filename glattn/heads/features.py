"""Feature maps of a timm body, in NCHW whatever the body works in: Swin's come in NHWC."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Format
from torch import Tensor, nn


def is_nhwc(body: nn.Module) -> bool:
    """Tell whether a timm model made with ``features_only=True`` gives its maps as ``(B, H, W, C)``."""
    return getattr(body, "output_fmt", None) == Format.NHWC


def feature_maps(out: list[Tensor], nhwc: bool) -> list[Tensor]:
    """Return the ``(B, C, H, W)`` maps, the finest first, of what such a model returned; see `is_nhwc`."""
    if not torch.jit.is_scripting():
        out = _listed(out)
    return [each.permute(0, 3, 1, 2) for each in out] if nhwc else out


def _listed(out: Any) -> list[Tensor]:
    return list(out.values()) if isinstance(out, dict) else out  # of feature_cls="dict"


def placement(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return where ``timm.create_model`` puts a model by its keywords, for the head to be put there too."""
    return {name: options[name] for name in ("device", "dtype") if options.get(name) is not None}
