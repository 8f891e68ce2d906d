"""Stem and stages of the backbone: what `GLAttn` strings together, each owning all that happens to its map."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from glattn.config import GLAttnConfig
from glattn.layers.absolute_position import AbsolutePosition
from glattn.layers.block import GlobalLocalAttention, GlobalLocalBlock, Mlp
from glattn.layers.conv import ConvNorm, activate_in_place, activation


def ceil_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return the size of a map behind convolutions of this stride in all: each halves, rounding up."""
    height, width = (-(-side // stride) for side in size)
    return height, width


class Stem(nn.Sequential):
    """Two 3x3 `ConvNorm`: ``(B, in_chans, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))``.

    A sequence, so that timm's feature wrappers can take the map behind ``act``, at stride 2.

    Args:
        in_chans: Channels of the image.
        dim: Channels out.
        stride: 4, or 2.
        map_size: The output's height and width at the nominal image size.
        config: ``act_layer`` and ``abs_pos`` are read here.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        stride: int,
        map_size: tuple[int, int],
        config: GLAttnConfig,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.inner_dim = max(dim // 2, 1)
        self.conv1 = ConvNorm(in_chans, self.inner_dim, kernel_size=3, stride=2, **factory)
        self.act = activation(config.act_layer, **factory)
        self.conv2 = ConvNorm(self.inner_dim, dim, kernel_size=3, stride=stride // 2, **factory)
        self.pos_embed = AbsolutePosition(dim, map_size, **factory) if config.abs_pos == "stem" else nn.Identity()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Activate in place."""
        activate_in_place(self.act)


class Stage(nn.Module):
    """A strided `ConvNorm` (but in the first stage), then blocks: ``(B, in, H, W) -> (B, C, H / stride, W / stride)``.

    Args:
        in_channels: Channels in.
        index: Which of the four stages: its part of the config.
        stride: 1, or 2 to halve the map, rounding up.
        dilation: Dilation of the strided convolution and of the blocks' local branches, in cells.
        total_stride: Stride of the stage's map, in pixels.
        map_size: The map's height and width at the nominal image size.
        drop_path_rates: One rate a block.
        config: The network's options.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        index: int,
        stride: int,
        dilation: tuple[int, int],
        total_stride: int,
        map_size: tuple[int, int],
        drop_path_rates: Sequence[float],
        config: GLAttnConfig,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        dim = config.dims[index]
        self.downsample: nn.Module = nn.Identity()
        if index > 0:
            self.downsample = ConvNorm(in_channels, dim, kernel_size=3, stride=stride, dilation=dilation[0], **factory)
        self.pos_embed = AbsolutePosition(dim, map_size, **factory) if config.abs_pos == "stages" else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                GlobalLocalBlock(
                    GlobalLocalAttention(
                        dim,
                        config=config.mixer[index],
                        map_size=map_size,
                        stride=total_stride,
                        dilation=dilation[1],
                        **factory,
                    ),
                    Mlp(dim, hidden_dim=int(dim * config.mlp_ratio[index]), act_layer=config.act_layer, **factory),
                    dim=dim,
                    layer_scale=config.layer_scale,
                    drop_path=rate,
                    **factory,
                )
                for rate in drop_path_rates
            )
        )

    @torch.jit.ignore
    def set_map_size(self, map_size: tuple[int, int]) -> None:
        """Resize what was made for the nominal map size."""
        for module in self.modules():
            if module is not self and hasattr(module, "set_map_size"):
                module.set_map_size(map_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's map."""
        x = self.pos_embed(self.downsample(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = checkpoint(block, x)
            return x
        return self.blocks(x)
