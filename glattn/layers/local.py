"""The local branch: multi-scale convolution with a channel gate (SE: arXiv:1709.01507; ECA: arXiv:1910.03151).

UNetFormer's local branch (arXiv:2109.08937) sums a 1x1 and a 3x3 convolution; here any set of sizes, depthwise by
default, and a gate behind them.
"""

from collections.abc import Callable
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.augmented import AugmentedConv
from glattn.layers.conv import MultiScaleConv, is_watched, num_groups
from glattn.layers.conv2d import Pointwise
from glattn.layers.layout import LAYOUTS


def _identity(dim: int, **factory: Any) -> nn.Module:
    return nn.Identity()


class SqueezeExcite(timm.layers.SqueezeExcite):
    """timm's: ``x sigmoid(fc2(relu(fc1(mean(x)))))``, ``(B, C, H, W) -> (B, C, H, W)``.

    Args:
        dim: Channels in and out.
    """

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__(dim, rd_ratio=1 / 16, **factory)
        for conv in (self.fc1, self.fc2):
            conv.__class__ = Pointwise  # the same, computed faster on its single cell
        self.act.inplace = False  # TorchScript's autograd refuses that behind Pointwise's view

    @torch.jit.ignore
    def can_add(self) -> bool:
        """Tell whether `add` is what ``forward`` and a sum are: as made, and nothing looks on."""
        parts = self._modules.values()
        return [type(part) for part in parts] == _PARTS and not is_watched(self, *parts)

    @torch.jit.ignore
    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """Return the sum of the gated map with another, in one pass; backwards that takes a pass more than two."""
        hidden = F.relu(F.linear(x.mean((2, 3)), self.fc1.weight.flatten(1), self.fc1.bias))
        gate = F.linear(hidden, self.fc2.weight.flatten(1), self.fc2.bias).sigmoid()
        return torch.addcmul(other, x, gate[:, :, None, None])


class EcaModule(timm.layers.EcaModule):
    """timm's: ``x sigmoid(conv(mean(x)))``, the convolution over channels, ``(B, C, H, W) -> (B, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated map; timm's own takes no batch of 0."""
        y = self.conv(x.mean((2, 3)).unsqueeze(1))
        return x * self.gate(y).transpose(1, 2).unsqueeze(3)


_PARTS = [Pointwise, nn.Identity, nn.ReLU, Pointwise, timm.layers.Sigmoid]  # fc1, bn, act, fc2, gate


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
