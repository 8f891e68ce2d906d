"""The global branch: multi-head self-attention over a map, its layout, position and mechanism free to choose.

After UNetFormer's global branch (arXiv:2109.08937), which is a relative-bias window attention.
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.conv import ConvNorm
from glattn.layers.cross_window import CROSS_WINDOWS
from glattn.layers.layout import LAYOUTS, pad_to_multiple, unpool
from glattn.layers.mechanism import MECHANISMS
from glattn.layers.position import POSITIONS

# torch.fx looks for wrapped functions by the file that calls them
torch.fx.wrap("pad_to_multiple")
torch.fx.wrap("unpool")


class HeadGroup(nn.Module):
    """Heads that share one layout: ``(B, heads * head_dim, H, W)`` queries, keys and values to outputs of that shape.

    Args:
        num_heads: Heads of the group.
        head_dim: Channels a head.
        layout: Which cells see which.
        map_size: The attended map's height and width at the nominal image size.
        config: ``position``, ``mechanism`` and ``cross_window`` are read here.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        layout: nn.Module,
        map_size: tuple[int, int],
        config: MixerConfig,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.layout = layout
        self.position = POSITIONS[config.position].group(num_heads, head_dim, layout.reach(*map_size), **factory)
        self.inner_attn = MECHANISMS[config.mechanism](
            num_heads, head_dim, self.num_keys(map_size), config=config, **factory
        )
        self.cross_window = CROSS_WINDOWS[config.cross_window]()

    @torch.jit.ignore
    def num_keys(self, map_size: tuple[int, int]) -> int:
        """Return how many keys a query has on a map of this size, those beyond its border counted."""
        height, width, halo = self.layout.span(*map_size)
        return (height + 2 * halo) * (width + 2 * halo)

    def heads(self, tokens: Tensor) -> Tensor:
        """Return ``(groups, tokens, heads * head_dim)`` as ``(groups, heads, tokens, head_dim)``."""
        return tokens.reshape(tokens.shape[0], tokens.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attended values' map."""
        height, width = q.shape[2], q.shape[3]
        q, k = self.position.encode(q, k)
        span = self.layout.span(height, width)
        bias = self.position.bias(q, span, self.layout.reach(height, width))
        batch = q.shape[0]
        q, k, v, mask = self.layout.group(q, k, v)
        out = self.inner_attn(self.heads(q), self.heads(k), self.heads(v), bias, mask)
        out = self.layout.restore(out.transpose(1, 2).flatten(2), batch, height, width)
        return self.cross_window(out, span[0], span[1])


class MultiHeadGlobalAttention(nn.Module):
    """``proj(softmax(q k' / sqrt(head_dim) + bias) v)``, q, k and v from one 1x1 convolution.

    ``(B, C, H, W) -> (B, C, H, W)``. Cost a cell: ``4 C^2`` and twice the width of a cell's keys; with
    ``layout="pooled"`` all of it on a map ``pool_stride^2`` times smaller, which is brought back bilinearly.

    Args:
        dim: Channels in and out.
        config: Every option that does not concern the local branch or the fusion is read here or below.
        map_size: The map's height and width at the nominal image size; any other works.
        stride: Stride of the map, in pixels, for windows sized by the image.
        project: Have the 1x1 convolution behind the heads; a mixer that projects behind its fusion does without.

    Raises:
        ValueError: ``dim`` does not divide into the heads, or the heads into the layout's groups.
    """

    def __init__(
        self,
        dim: int,
        *,
        config: MixerConfig | None = None,
        map_size: tuple[int, int] = (14, 14),
        stride: int = 16,
        project: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        config = config or MixerConfig()
        self.num_heads, self.head_dim = split_heads(dim, config)
        self.dim, self.stride = dim, stride
        kind = LAYOUTS[config.layout]
        image_size = (map_size[0] * stride, map_size[1] * stride)
        self.pool_stride = config.pool_stride if kind.pooled else 1
        self.pool: nn.Module = nn.Identity()
        if self.pool_stride > 1:
            # over stride x stride cells, where bilinear resizing places them; an odd kernel takes one row, column more
            before = 1 - self.pool_stride % 2
            self.pool = ConvNorm(
                dim,
                dim,
                kernel_size=self.pool_stride + before,
                stride=self.pool_stride,
                groups=dim,
                padding=before,
                **factory,
            )
        self.embed = POSITIONS[config.position].embed(dim, **factory)
        shared = MECHANISMS[config.mechanism].shares_qk
        self.qkv = ConvNorm(dim, (2 if shared else 3) * dim, **factory)
        self.groups = nn.ModuleList()
        for heads, layout in self.share_heads(kind.build(config, image_size), config):
            self.groups.append(
                HeadGroup(heads, self.head_dim, layout=layout, map_size=self.pooled(map_size), config=config, **factory)
            )
        # channels of each group's queries, keys (unless they are the queries) and values
        self.widths = [group.num_heads * group.head_dim for group in self.groups] * (2 if shared else 3)
        self.proj = ConvNorm(dim, dim, **factory) if project else nn.Identity()

    @torch.jit.ignore
    def pooled(self, map_size: tuple[int, int]) -> tuple[int, int]:
        """Return the size of the map that is attended, from the size of the map that comes in."""
        height, width = (-(-side // self.pool_stride) for side in map_size)
        return height, width

    @torch.jit.ignore
    def share_heads(self, layouts: list[nn.Module], config: MixerConfig) -> list[tuple[int, nn.Module]]:
        """Return the heads of each layout: equal shares."""
        if self.num_heads % len(layouts):
            raise ValueError(
                f"layout={config.layout!r} has {len(layouts)} head groups, which {self.num_heads} heads do not divide"
                f" into; choose num_heads or head_dim for a multiple of {len(layouts)} heads"
            )
        return [(self.num_heads // len(layouts), layout) for layout in layouts]

    @torch.jit.ignore
    def set_map_size(self, map_size: tuple[int, int]) -> None:
        """Resize what was made for the nominal map size: windows, tables of offsets, projections of tokens."""
        size = self.pooled(map_size)
        for group in self.groups:
            for module in group.layout.modules():
                if hasattr(module, "set_image_size"):
                    module.set_image_size((map_size[0] * self.stride, map_size[1] * self.stride))
            if hasattr(group.position, "set_reach"):
                group.position.set_reach(group.layout.reach(*size))
            if hasattr(group.inner_attn, "set_tokens"):
                group.inner_attn.set_tokens(group.num_keys(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended map."""
        pooled = self.pool(pad_to_multiple(x, self.pool_stride)) if self.pool_stride > 1 else x
        qkv = self.qkv(self.embed(pooled)).split(self.widths, dim=1)
        outs: list[Tensor] = []
        for i, group in enumerate(self.groups):
            # counted from the end, so that keys are the queries where a mechanism shares them
            outs.append(group(qkv[i], qkv[i - 2 * len(self.groups)], qkv[i - len(self.groups)]))
        out = self.proj(outs[0] if len(outs) == 1 else torch.cat(outs, dim=1))
        if self.pool_stride > 1:
            out = unpool(out, self.pool_stride, x.shape[2], x.shape[3])
        return out


def split_heads(dim: int, config: MixerConfig) -> tuple[int, int]:
    """Return the number of heads and the channels of each at this width.

    Raises:
        ValueError: ``dim`` does not divide into the heads that ``num_heads`` or ``head_dim`` ask for.
    """
    if config.num_heads is None:
        if dim % config.head_dim:
            raise ValueError(
                f"head_dim={config.head_dim} does not divide the global branch's {dim} channels (dim % head_dim);"
                " choose a divisor, or num_heads"
            )
        return dim // config.head_dim, config.head_dim
    if dim % config.num_heads:
        raise ValueError(
            f"num_heads={config.num_heads} does not divide the global branch's {dim} channels (dim % num_heads);"
            " choose a divisor"
        )
    return config.num_heads, dim // config.num_heads
