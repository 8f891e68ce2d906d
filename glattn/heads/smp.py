"""Encoders for segmentation_models_pytorch that have a map at stride 2, for its U-shaped decoders.

Its own ``tu-glattn_*`` encoders need nothing from here; they hand decoders a map of no channels at stride 2.
"""

from typing import Any

import timm
from segmentation_models_pytorch.encoders import encoders
from segmentation_models_pytorch.encoders._base import EncoderMixin
from timm.models import FeatureInfo
from torch import Tensor, nn

from glattn.heads.features import feature_maps


class StemEncoder(nn.Module, EncoderMixin):
    """``(B, in_chans, H, W) -> [the image, maps at strides 2, 4, 8, 16, 32]``, cut to ``depth`` maps.

    Args:
        name: Name of the model, by timm.
        depth: Maps beside the image, 1 to 5.
        output_stride: Largest stride, in pixels: 32, 16 or 8.
        kwargs: Keywords of ``timm.create_model``.
    """

    def __init__(self, name: str, *, depth: int = 5, output_stride: int = 32, **kwargs: Any) -> None:
        super().__init__()
        if not 1 <= depth <= 5:
            raise ValueError(f"depth={depth}; give 1 to 5 maps")
        self.model = timm.create_model(
            name,
            features_only=True,
            stem_features=True,
            output_stride=output_stride,
            out_indices=range(depth),
            **kwargs,
        )
        info: FeatureInfo = self.model.feature_info  # type: ignore[assignment]
        self._in_channels = kwargs.get("in_chans", 3)
        self._out_channels = [self._in_channels, *info.channels()]
        self._depth, self._output_stride = depth, output_stride
        self._trained = bool(kwargs.get("pretrained") or kwargs.get("checkpoint_path"))

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Give the first convolution other channels: weights that were loaded are adapted as timm does, others new.

        The library itself knows only of weights that ``encoder_weights`` names.
        """
        super().set_in_channels(in_channels, pretrained=pretrained or self._trained)

    def make_dilated(self, output_stride: int) -> None:
        """Do nothing: the model was made with its output stride."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the image and the maps."""
        return [x] + feature_maps(self.model(x), nhwc=False)  # noqa: RUF005 (TorchScript)


def stem_encoder(name: str, **kwargs: Any) -> str:
    """Make a model an encoder of segmentation_models_pytorch; return the name under which its decoders find it.

        smp.UnetPlusPlus(stem_encoder("glattn_small", pretrained=True), encoder_weights=None, classes=3)

    Args:
        name: Name of the model, such as ``glattn_small``.
        kwargs: Keywords of ``timm.create_model``: ``pretrained``, ``drop_path_rate`` and so on. ``in_chans``,
            depth and stride are the decoder's to say. The name that is returned tells them, so that a model made
            again with others does not take its place; to load a saved model, call this with the same ones before.

    Raises:
        ValueError: A keyword is the decoder's to say.
    """
    for key, said in {
        "in_chans": "in_channels",
        "depth": "encoder_depth",
        "output_stride": "encoder_output_stride",
    }.items():
        if key in kwargs:
            raise ValueError(f"{key}={kwargs[key]!r}: leave it out, and give the decoder {said}={kwargs[key]!r}")
    encoder = ",".join([f"{name}+stem", *(f"{key}={kwargs[key]!r}" for key in sorted(kwargs))])
    encoders[encoder] = {"encoder": StemEncoder, "pretrained_settings": {}, "params": {"name": name, **kwargs}}
    return encoder
