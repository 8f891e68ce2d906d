"""Feature maps of a timm body, in NCHW whatever the body works in: Swin's come in NHWC."""

from timm.layers import Format, nhwc_to
from torch import Tensor, nn


def feature_maps(body: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the ``(B, C, H, W)`` maps, the finest first, of a timm model made with ``features_only=True``."""
    maps: list[Tensor] = body(x)
    nhwc = getattr(body, "output_fmt", None) == Format.NHWC
    return [nhwc_to(each, Format.NCHW) for each in maps] if nhwc else maps
