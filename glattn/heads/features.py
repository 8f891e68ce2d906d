"""Feature maps of a timm body, in NCHW whatever the body works in: Swin's come in NHWC."""

from collections.abc import Mapping
from typing import Any

from timm.layers import Format
from torch import Tensor, nn


def feature_maps(body: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the ``(B, C, H, W)`` maps, the finest first, of a timm model made with ``features_only=True``."""
    out: list[Tensor] | dict[str, Tensor] = body(x)
    maps = list(out.values()) if isinstance(out, dict) else out  # of feature_cls="dict"
    return in_nchw(maps, is_nhwc(body))


def is_nhwc(body: nn.Module) -> bool:
    """Tell whether a timm model made with ``features_only=True`` gives its maps as ``(B, H, W, C)``."""
    return getattr(body, "output_fmt", None) == Format.NHWC


def in_nchw(maps: list[Tensor], nhwc: bool) -> list[Tensor]:
    """Return maps in NCHW, in TorchScript too; ``nhwc`` tells whether they are in NHWC."""
    return [each.permute(0, 3, 1, 2) for each in maps] if nhwc else maps


def placement(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return where ``timm.create_model`` puts a model by its keywords, for the head to be put there too."""
    return {name: options[name] for name in ("device", "dtype") if options.get(name) is not None}
