"""UNetFormer's decoder (arXiv:2109.08937), where the global-local mixer comes from, made of the backbone's own blocks.

Theirs is tied to maps that halve exactly and normalises in front of each branch; here a map is resized to its
neighbour whatever their sizes, and all norms fold (see `glattn.layers`).
"""

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import SqueezeExcite, create_act_layer
from timm.models import FeatureInfo
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.heads.features import feature_maps, is_nhwc, placement
from glattn.layers import ConvNorm, GlobalLocalAttention, GlobalLocalBlock, Mlp
from glattn.layers.layout import upsample
from glattn.models.glattn import image_size
from glattn.models.stages import ceil_size

torch.fx.wrap("upsample")  # torch.fx looks for wrapped functions by the file that calls them

# The paper's mixer: 1x1 and 3x3 convolutions beside 8x8 windows with a relative bias, joined by strips.
DECODER_MIXER = MixerConfig(
    num_heads=8, kernel_sizes=(1, 3), local_gate="none", layout="window", window_size=8, position="bias",
    cross_window="strip",
)  # fmt: skip


class WeightedFusion(nn.Module):
    """``act(convnorm3x3(w0 conv1x1(skip) + w1 upsample(x)))``, ``w = relu(w) / sum(relu(w))``, two learned numbers.

    ``(B, dim, h, w), (B, skip_channels, H, W) -> (B, dim, H, W)``.

    Args:
        skip_channels: Channels of the backbone's map.
        dim: Channels of the decoder.
        act_layer: Activation, by timm's name.
    """

    def __init__(self, skip_channels: int, *, dim: int, act_layer: str) -> None:
        super().__init__()
        self.skip = ConvNorm(skip_channels, dim)
        self.balance = nn.Parameter(torch.ones(2))
        self.conv = ConvNorm(dim, dim, kernel_size=3)
        self.act = create_act_layer(act_layer, inplace=True)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return the fused map, of the size of ``skip``."""
        share = self.balance.relu()
        share = share / (share.sum() + 1e-6)
        return self.act(self.conv(share[0] * self.skip(skip) + share[1] * upsample(x, skip.shape[2], skip.shape[3])))


class FeatureRefinement(nn.Module):
    """``act(x + project(spatial(x) x + channel(x) x))``: ``(B, dim, H, W) -> (B, dim, H, W)``.

    Args:
        dim: Channels in and out.
        act_layer: Activation, by timm's name.
    """

    def __init__(self, dim: int, *, act_layer: str) -> None:
        super().__init__()
        self.spatial = ConvNorm(dim, dim, kernel_size=3, groups=dim)
        self.channel = SqueezeExcite(dim, rd_ratio=1 / 16)
        self.project = nn.Sequential(ConvNorm(dim, dim, kernel_size=3, groups=dim), ConvNorm(dim, dim))
        self.shortcut = ConvNorm(dim, dim)
        self.act = create_act_layer(act_layer, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined map."""
        refined = self.project(x * self.spatial(x).sigmoid() + self.channel(x))
        return self.act(refined + self.shortcut(x))


class UNetFormerDecoder(nn.Module):
    """Top-down: a `GlobalLocalBlock` a level, fused into the next finer map, refined at the finest; then classes.

    Maps of a backbone, the finest first, to ``(B, num_classes, H, W)`` logits at the finest map's size.

    Args:
        channels: Channels of the backbone's maps, the finest first; two or more.
        num_classes: Classes.
        dim: Channels of the decoder, in all its levels.
        reductions: Strides of those maps, in pixels.
        mixer: Mixer of the blocks; by default the paper's, depthwise.
        mlp_ratio: Hidden width of the blocks' MLP over ``dim``.
        drop_rate: Rate of channels dropped before the classes.
        img_size: Nominal image size in pixels, one side or (height, width), for mixers with tables; any size works.

    Raises:
        ValueError: There are fewer than two maps, or ``dim`` does not divide into the mixer's heads.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        num_classes: int,
        dim: int = 64,
        reductions: Sequence[int] = (4, 8, 16, 32),
        mixer: MixerConfig | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.1,
        img_size: int | Sequence[int] = 224,
    ) -> None:
        super().__init__()
        if len(channels) < 2 or len(channels) != len(reductions):
            raise ValueError(
                f"channels={tuple(channels)} with reductions={tuple(reductions)}; give two or more maps' channels, the"
                " finest first, and a stride for each"
            )
        act_layer, size = "hard_swish", image_size(img_size)
        self.lateral = ConvNorm(channels[-1], dim)
        self.blocks = nn.ModuleList(
            GlobalLocalBlock(
                GlobalLocalAttention(
                    dim, config=mixer or DECODER_MIXER, map_size=ceil_size(size, stride), stride=stride
                ),
                Mlp(dim, hidden_dim=int(dim * mlp_ratio), act_layer=act_layer),
                dim=dim,
                layer_scale=0.0,
                drop_path=0.0,
            )
            for stride in reversed(reductions[1:])
        )
        self.fusions = nn.ModuleList(
            WeightedFusion(skip, dim=dim, act_layer=act_layer) for skip in reversed(channels[:-1])
        )
        self.refine = FeatureRefinement(dim, act_layer=act_layer)
        self.head = nn.Sequential(
            ConvNorm(dim, dim, kernel_size=3), create_act_layer(act_layer, inplace=True), nn.Dropout2d(drop_rate)
        )
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Return the logits at the finest map's size."""
        x = self.lateral(features[-1])
        for i, (block, fusion) in enumerate(zip(self.blocks, self.fusions)):  # noqa: B905 (TorchScript)
            x = fusion(block(x), features[-2 - i])
        return self.classifier(self.head(self.refine(x)))


class UNetFormer(nn.Module):
    """A backbone and a `UNetFormerDecoder`: ``(B, in_chans, H, W) -> (B, num_classes, H, W)``, any H and W.

    ``timm.utils.reparameterize_model`` folds both.

    Args:
        backbone: A timm model made with ``features_only=True``.
        num_classes: Classes.
        options: Keywords of `UNetFormerDecoder`.
    """

    def __init__(self, backbone: nn.Module, *, num_classes: int, **options: Any) -> None:
        super().__init__()
        info: FeatureInfo = backbone.feature_info  # type: ignore[assignment]
        self.backbone = backbone
        self.nhwc = is_nhwc(backbone)
        self.decoder = UNetFormerDecoder(
            info.channels(), num_classes=num_classes, reductions=info.reduction(), **options
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the classes' logits a pixel."""
        logits = self.decoder(feature_maps(self.backbone(x), self.nhwc))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=False)


def unetformer(
    name: str,
    *,
    num_classes: int,
    dim: int = 64,
    mixer: MixerConfig | None = None,
    mlp_ratio: float = 4.0,
    drop_rate: float = 0.1,
    img_size: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> UNetFormer:
    """Return a segmentation network on a model by timm's name.

    Args:
        name: Name of the model, such as ``glattn_small``.
        num_classes: Classes.
        dim: Channels of the decoder.
        mixer: See `UNetFormerDecoder`.
        mlp_ratio: See `UNetFormerDecoder`.
        drop_rate: See `UNetFormerDecoder`.
        img_size: See `UNetFormerDecoder`; if given, a backbone that has one is made for it too.
        kwargs: Keywords of ``timm.create_model``: ``pretrained``, ``in_chans``, ``output_stride`` and so on.
    """
    sized: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        backbone = timm.create_model(name, features_only=True, **sized, **kwargs)
    except TypeError as error:  # a network of convolutions alone
        if not sized or not re.search(r"unexpected keyword argument.*img_size", str(error)):
            raise
        backbone = timm.create_model(name, features_only=True, **kwargs)
    network = UNetFormer(
        backbone,
        num_classes=num_classes,
        dim=dim,
        mixer=mixer,
        mlp_ratio=mlp_ratio,
        drop_rate=drop_rate,
        **sized,
    )
    return network.to(**placement(kwargs))
