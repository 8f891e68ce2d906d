"""Attention-augmented convolution: some channels from attention with 2-D relative logits (Bello, arXiv:1904.09925).

There attention's map is average-pooled where it is large; here ``stride`` says so, and the relative embeddings are
interpolated to the map at hand.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import trunc_normal_, use_fused_attn
from torch import Tensor, nn

from glattn.layers.conv import ConvNorm, MultiScaleConv, num_groups
from glattn.layers.layout import unpool
from glattn.layers.position import at_least_two
from glattn.layers.precision import precise
from glattn.layers.tracing import sizes_are_known

torch.fx.wrap("unpool")  # torch.fx looks for wrapped functions by the file that calls them


@torch.fx.wrap
def offset_embedding(table: Tensor, length: int) -> Tensor:
    """Return ``out[query, key] = table[key - query]``, ``(length, length, D)``, from a ``(2 R - 1, D)`` table."""
    rows = 2 * at_least_two(length) - 1
    if not (sizes_are_known() and table.shape[0] == rows):
        wide = table.to(precise(table)).t().unsqueeze(0)
        wide = F.interpolate(wide, size=[rows], mode="linear", align_corners=True)
        table = wide.squeeze(0).t().to(table.dtype)
    place = torch.arange(length, device=table.device)
    offset = (place.unsqueeze(0) - place.unsqueeze(1) + rows // 2).flatten()
    return table.index_select(0, offset).reshape(length, length, -1)


def relative_logits(q: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Return ``q . rows[offset in y] + q . columns[offset in x]`` for every pair: ``(B, heads, N, N)``.

    ``q`` is ``(B, heads, N, D)``, ``N = height * width``; the tables are ``(2 R - 1, D)``.
    """
    batch, heads, tokens, dim = q.shape
    q = q.reshape(batch * heads, height, width, dim)
    by_row = q @ offset_embedding(rows, height).transpose(1, 2)  # (B heads, y, x, key's y)
    by_column = q.transpose(1, 2) @ offset_embedding(columns, width).transpose(1, 2)  # (B heads, x, y, key's x)
    by_row = by_row.reshape(-1, tokens, height, 1)
    by_column = by_column.transpose(1, 2).reshape(-1, tokens, 1, width)
    return (by_row + by_column).reshape(batch, heads, tokens, tokens)


class BiasedSoftmax(nn.Module):
    """``softmax(q k' / sqrt(head_dim) + logits) v``, ``(B, heads, N, head_dim)``.

    With ``timm.layers.set_fused_attn(False)`` at construction the weights are a tensor, as `Softmax`'s.
    """

    __constants__ = ["fused_attn"]

    def __init__(self) -> None:
        super().__init__()
        self.fused_attn = use_fused_attn()
        self.attn_drop = nn.Identity()  # `timm.utils.AttentionExtract` finds the weights by its name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
        """Return the outputs."""
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=logits)
        attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + logits
        attn = attn.softmax(dim=-1)
        return self.attn_drop(attn) @ v


class AugmentedConv(nn.Module):
    """``[conv(x), attention(x)]``: ``(B, C, H, W) -> (B, C, H, W)``, the last ``attn_dim`` channels from attention.

    The attention is ``proj(softmax((q k' + q rows' + q columns') / sqrt(head_dim)) v)``, cost ``N^2``. A dense
    convolution reads all channels, a grouped one those that it answers for.

    Args:
        dim: Channels in and out.
        attn_dim: Channels from attention; 0 leaves a plain multi-scale convolution.
        num_heads: Heads; they divide ``attn_dim``.
        kernel_sizes: Odd kernel sizes of the convolution, in cells.
        groups: ``depthwise``, ``dense``, or the groups of the convolution.
        stride: Attention is on a map average-pooled by this much.
        dilation: Dilation of the convolution, in cells.
        reach: Cells an axis that the relative embeddings are kept for.

    Raises:
        ValueError: Attention takes all channels, or ``groups`` does not divide the rest.
    """

    def __init__(
        self,
        dim: int,
        *,
        attn_dim: int,
        num_heads: int,
        kernel_sizes: Sequence[int],
        groups: str | int,
        stride: int = 1,
        dilation: int = 1,
        reach: int = 14,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.attn_dim, self.num_heads, self.stride = attn_dim, num_heads, stride
        self.conv_dim = dim - attn_dim
        if self.conv_dim < 1:
            raise ValueError(
                f"augment_ratio leaves {self.conv_dim} of {dim} channels to the convolution; choose a smaller one"
            )
        number = num_groups(self.conv_dim, groups)
        self.conv_in = dim if number == 1 else self.conv_dim
        self.conv = MultiScaleConv(
            self.conv_in, self.conv_dim, kernel_sizes=kernel_sizes, groups=number, dilation=dilation, **factory
        )
        if attn_dim:
            self.qkv = ConvNorm(dim, 3 * attn_dim, **factory)
            self.rows = nn.Parameter(torch.empty(2 * reach - 1, attn_dim // num_heads, **factory))
            self.columns = nn.Parameter(torch.empty(2 * reach - 1, attn_dim // num_heads, **factory))
            self.inner_attn = BiasedSoftmax()
            self.proj = ConvNorm(attn_dim, attn_dim, **factory)
            self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the relative embeddings anew: normal, standard deviation ``head_dim ** -0.5``."""
        if self.attn_dim:
            for table in (self.rows, self.columns):
                trunc_normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution's channels and attention's."""
        out = self.conv(x[:, : self.conv_in])
        if hasattr(self, "qkv"):  # asked so for TorchScript, which leaves this branch out then
            return torch.cat([out, self.attend(x)], dim=1)
        else:  # noqa: RET505
            return out

    def attend(self, x: Tensor) -> Tensor:
        """Return attention's channels."""
        pooled = x
        if self.stride > 1:
            pooled = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        height, width = pooled.shape[2], pooled.shape[3]
        qkv = self.qkv(pooled).flatten(2).transpose(1, 2)
        qkv = qkv.reshape(-1, height * width, 3 * self.num_heads, self.attn_dim // self.num_heads).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=1)
        logits = relative_logits(q, self.rows, self.columns, height, width) * q.shape[-1] ** -0.5
        attn = self.inner_attn(q, k, v, logits).transpose(1, 2).flatten(2)
        attn = self.proj(attn.transpose(1, 2).reshape(-1, self.attn_dim, height, width))
        if self.stride > 1:
            attn = unpool(attn, self.stride, x.shape[2], x.shape[3])
        return attn
