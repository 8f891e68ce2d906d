"""The local branch: multi-scale convolution with a channel gate (SE: arXiv:1709.01507; ECA: arXiv:1910.03151).

UNetFormer's local branch (arXiv:2109.08937) sums a 1x1 and a 3x3 convolution; here any set of sizes, depthwise by
default, and a gate behind them.
"""

from collections.abc import Callable
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import EcaModule
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.augmented import AugmentedConv
from glattn.layers.conv import MultiScaleConv, is_watched, num_groups
from glattn.layers.layout import LAYOUTS


def _identity(dim: int, **factory: Any) -> nn.Module:
    return nn.Identity()


class SqueezeExcite(timm.layers.SqueezeExcite):
    """``x sigmoid(fc2(relu(fc1(mean(x)))))``: ``(B, C, H, W) -> (B, C, H, W)``; timm's, its convolutions products.

    Args:
        dim: Channels in and out.
    """

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__(dim, rd_ratio=1 / 16, **factory)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the gated map, or its sum with another if that is given."""
        gate = self.weigh(x.mean((2, 3)))[:, :, None, None]
        return x * gate if added is None else torch.addcmul(added, x, gate)

    def weigh(self, mean: Tensor) -> Tensor:
        """Return each channel's weight from the means of all, ``(B, C) -> (B, C)``."""
        if not torch.jit.is_scripting():
            fc1, fc2 = self.fc1, self.fc2
            if type(fc1) is not nn.Conv2d or type(fc2) is not nn.Conv2d or is_watched(*self._modules.values()):
                return self.gate(fc2(self.act(fc1(mean[:, :, None, None])))).flatten(1)
        hidden = F.relu(F.linear(mean, self.fc1.weight.flatten(1), self.fc1.bias))
        return F.linear(hidden, self.fc2.weight.flatten(1), self.fc2.bias).sigmoid()


GATES: dict[str, Callable[..., nn.Module]] = {"se": SqueezeExcite, "eca": EcaModule, "none": _identity}


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
        self.conv = self.make_conv(dim, config, dilation, **factory)
        self.gate = GATES[config.local_gate](dim, **factory)

    @torch.jit.ignore
    def make_conv(self, dim: int, config: MixerConfig, dilation: int, **factory: Any) -> nn.Module:
        """Return what stands before the gate."""
        groups = num_groups(dim, config.local_groups)
        return MultiScaleConv(dim, dim, kernel_sizes=config.kernel_sizes, groups=groups, dilation=dilation, **factory)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the gated sum of the convolutions, or its sum with another map if that is given."""
        out = self.conv(x)
        if not torch.jit.is_scripting():
            if added is not None and type(self.gate) is SqueezeExcite and not is_watched(self.gate):
                return self.gate(out, added)
        out = self.gate(out)
        return out if added is None else added + out


class AugmentedLocalAttention(ImprovedLocalAttention):
    """`ImprovedLocalAttention` whose convolution is an `AugmentedConv`: ``(B, C, H, W) -> (B, C, H, W)``.

    Args:
        dim: Channels in and out.
        config: What `ImprovedLocalAttention` reads, and ``augment_ratio``, ``head_dim`` and ``pool_stride``.
        dilation: Dilation of the convolutions, in cells.

    Raises:
        ValueError: ``local_groups`` does not divide the convolution's channels, or there are none.
    """

    @torch.jit.ignore
    def make_conv(self, dim: int, config: MixerConfig, dilation: int, **factory: Any) -> nn.Module:
        """Return what stands before the gate."""
        attn_dim = round(dim * config.augment_ratio / 8) * 8
        num_heads = max(attn_dim // config.head_dim, 1)
        return AugmentedConv(
            dim,
            attn_dim=attn_dim - attn_dim % num_heads,
            num_heads=num_heads,
            kernel_sizes=config.kernel_sizes,
            groups=config.local_groups,
            stride=config.pool_stride if LAYOUTS[config.layout].pooled else 1,
            dilation=dilation,
            **factory,
        )


LOCALS: dict[str, type[ImprovedLocalAttention]] = {"conv": ImprovedLocalAttention, "augmented": AugmentedLocalAttention}
