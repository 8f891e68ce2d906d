"""Feature pyramids for torchvision's detectors: torchvision's own FPN (arXiv:1612.03144) on timm's features."""

from collections.abc import Callable, Sequence
from typing import Any

import timm
from timm.layers import freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from glattn.config import check_choice
from glattn.heads.features import feature_maps, is_nhwc, placement


def _pool(in_channels: int, out_channels: int) -> ExtraFPNBlock:
    return LastLevelMaxPool()


# name -> (the levels behind the last stage's, made from its channels and the pyramid's; the features it starts from,
# counted from the last: the stem's, where a body has one, comes first)
EXTRAS: dict[str, tuple[Callable[[int, int], ExtraFPNBlock], tuple[int, ...]]] = {
    "pool": (_pool, (-4, -3, -2, -1)),
    "p6p7": (LastLevelP6P7, (-3, -2, -1)),
}


class FPNBackbone(nn.Module):
    """``fpn(body(x))``: ``(B, in_chans, H, W) -> {"0": (B, out_channels, H / 4, W / 4), "1": ..., "pool": ...}``.

    What torchvision's detectors take as ``backbone``. Any H and W; sizes round up.

    Args:
        body: A timm model made with ``features_only=True``.
        out_channels: Channels of every level.
        extra: Levels behind the last: ``pool`` (every second cell of the last, Faster R-CNN's) or ``p6p7`` (two
            strided convolutions, RetinaNet's).
        frozen_stages: Parts that neither train nor update statistics: -1 none, 0 the stem, n the stem and n stages.
        frozen_bn: Turn every BatchNorm of the body into a fixed scale and shift, for batches of few images.
        norm_layer: Norm behind the pyramid's convolutions; none by default.

    Raises:
        ValueError: ``extra`` is unknown, or the body has fewer stages than ``frozen_stages`` or hides them in one part.
    """

    def __init__(
        self,
        body: nn.Module,
        *,
        out_channels: int = 256,
        extra: str = "pool",
        frozen_stages: int = -1,
        frozen_bn: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_choice("extra", extra, EXTRAS)
        info: FeatureInfo = body.feature_info  # type: ignore[assignment]
        channels = info.channels()
        self.body = freeze_batch_norm_2d(body) if frozen_bn else body
        self.nhwc = is_nhwc(body)
        self.fpn = FeaturePyramidNetwork(
            channels, out_channels, EXTRAS[extra][0](channels[-1], out_channels), norm_layer
        )
        self.out_channels = out_channels
        self.frozen = _first_parts(body, info, frozen_stages)
        for name in self.frozen:
            self.body.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "FPNBackbone":
        """Set the mode of all but the frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            self.body.get_submodule(name).eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels, the finest first."""
        named: dict[str, Tensor] = {}  # no comprehension: TorchScript
        for i, feature in enumerate(feature_maps(self.body(x), self.nhwc)):
            named[str(i)] = feature
        return self.fpn(named)


def fpn_backbone(
    name: str,
    *,
    out_channels: int = 256,
    extra: str = "pool",
    out_indices: int | Sequence[int] | None = None,
    frozen_stages: int = -1,
    frozen_bn: bool = False,
    norm_layer: Callable[..., nn.Module] | None = None,
    **kwargs: Any,
) -> FPNBackbone:
    """Return a pyramid on a model by timm's name, ready for torchvision's detectors.

    Args:
        name: Name of the model, such as ``glattn_small``.
        out_channels: Channels of every level.
        extra: ``pool`` for Faster R-CNN, ``p6p7`` for RetinaNet.
        out_indices: The body's features that the pyramid starts from, or how many of the last; the last four for
            ``pool``, the last three for ``p6p7``.
        frozen_stages: See `FPNBackbone`.
        frozen_bn: See `FPNBackbone`.
        norm_layer: See `FPNBackbone`.
        kwargs: Keywords of ``timm.create_model``: ``pretrained``, ``in_chans``, ``drop_path_rate`` and so on.

    Raises:
        ValueError: See `FPNBackbone`; or ``out_indices`` are in another order than the features.
    """
    check_choice("extra", extra, EXTRAS)
    indices = EXTRAS[extra][1] if out_indices is None else out_indices
    if not isinstance(indices, int):
        one_way = len({index < 0 for index in indices}) == 1  # all counted from the first, or from the last
        if one_way and list(indices) != sorted(indices):
            raise ValueError(f"out_indices={indices!r}: give them from the finest to the coarsest")
    body = timm.create_model(name, features_only=True, out_indices=indices, **kwargs)
    pyramid = FPNBackbone(
        body,
        out_channels=out_channels,
        extra=extra,
        frozen_stages=frozen_stages,
        frozen_bn=frozen_bn,
        norm_layer=norm_layer,
    )
    return pyramid.to(**placement(kwargs))


def _first_parts(body: nn.Module, info: FeatureInfo, frozen_stages: int) -> list[str]:
    """Return the names of the stem's parts and of as many stages: all in front of the first stage that trains."""
    if frozen_stages == -1:
        return []
    names = [name for name, _ in body.named_children()]
    if not {name.replace(".", "_") for name in info.module_name()} <= set(names):
        raise ValueError(
            f"frozen_stages={frozen_stages}: a {type(body).__name__} holds its stages inside one part, where they"
            " cannot be told from the stem; give -1, or a body whose features are its own parts (timm's FeatureListNet)"
        )
    modules = [part["module"].replace(".", "_") for part in info.info]
    # a feature of the stem's is no stage; a pyramid from the first stages alone has no later ones
    present = [name for name in modules if name in names and not name.startswith("stem")]
    if not -1 <= frozen_stages <= len(present):
        raise ValueError(
            f"frozen_stages={frozen_stages}; give -1 to train all, 0 to freeze the stem, up to {len(present)} to freeze"
            " as many stages with it"
        )
    end = len(names) if frozen_stages == len(present) else names.index(present[frozen_stages])
    return names[:end]
