"""The local branch: multi-scale convolution with a channel gate (SE: arXiv:1709.01507; ECA: arXiv:1910.03151).

UNetFormer's local branch (arXiv:2109.08937) sums a 1x1 and a 3x3 convolution; here any set of sizes, depthwise by
default, and a gate behind them.
"""

from collections.abc import Callable
from typing import Any

from timm.layers import EcaModule, SqueezeExcite
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.augmented import AugmentedConv
from glattn.layers.conv import MultiScaleConv, num_groups
from glattn.layers.conv2d import Pointwise
from glattn.layers.layout import LAYOUTS


def _identity(dim: int, **factory: Any) -> nn.Module:
    return nn.Identity()


def _squeeze_excite(dim: int, **factory: Any) -> nn.Module:
    gate = SqueezeExcite(dim, rd_ratio=1 / 16, **factory)
    for conv in (gate.fc1, gate.fc2):
        conv.__class__ = Pointwise  # the same, computed faster on its single cell
    gate.act.inplace = False  # TorchScript's autograd refuses that behind Pointwise's view
    return gate


GATES: dict[str, Callable[..., nn.Module]] = {"se": _squeeze_excite, "eca": EcaModule, "none": _identity}


class ImprovedLocalAttention(nn.Module):
    """``gate(sum_k BatchNorm(conv_k(x)))``: ``(B, C, H, W) -> (B, C, H, W)``.

    Cost a cell: `MultiScaleConv`'s, and one product for the gate.

    Args:
        dim: Channels in and out.
        config: ``kernel_sizes``, ``local_groups`` and ``local_gate`` are read here.
        dilation: Dilation of the convolutions, in cells.

    Raises:
        ValueError: ``local_groups`` does not divide ``dim``.
    """

    def __init__(self, dim: int, *, config: MixerConfig | None = None, dilation: int = 1, **factory: Any) -> None:
        super().__init__()
        config = config or MixerConfig()
        self.conv = MultiScaleConv(
            dim,
            dim,
            kernel_sizes=config.kernel_sizes,
            groups=num_groups(dim, config.local_groups),
            dilation=dilation,
            **factory,
        )
        self.gate = GATES[config.local_gate](dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated sum of the convolutions."""
        return self.gate(self.conv(x))


class AugmentedLocalAttention(nn.Module):
    """`ImprovedLocalAttention` whose convolution is an `AugmentedConv`: ``(B, C, H, W) -> (B, C, H, W)``.

    Args:
        dim: Channels in and out.
        config: What `ImprovedLocalAttention` reads, and ``augment_ratio``, ``head_dim`` and ``pool_stride``.
        dilation: Dilation of the convolutions, in cells.

    Raises:
        ValueError: ``local_groups`` does not divide the convolution's channels, or there are none.
    """

    def __init__(self, dim: int, *, config: MixerConfig | None = None, dilation: int = 1, **factory: Any) -> None:
        super().__init__()
        config = config or MixerConfig()
        attn_dim = round(dim * config.augment_ratio / 8) * 8
        num_heads = max(attn_dim // config.head_dim, 1)
        self.conv = AugmentedConv(
            dim,
            attn_dim=attn_dim - attn_dim % num_heads,
            num_heads=num_heads,
            kernel_sizes=config.kernel_sizes,
            groups=config.local_groups,
            stride=config.pool_stride if LAYOUTS[config.layout].pooled else 1,
            dilation=dilation,
            **factory,
        )
        self.gate = GATES[config.local_gate](dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated augmented convolution."""
        return self.gate(self.conv(x))


LOCALS: dict[str, type[nn.Module]] = {"conv": ImprovedLocalAttention, "augmented": AugmentedLocalAttention}
