"""From queries, keys and values to outputs: softmax attention, Linformer (arXiv:2006.04768), and the table of all.

All take a group's tokens as ``(groups, heads, tokens, head_dim)`` and any number of tokens.
"""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import trunc_normal_, use_fused_attn
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.linear_attention import Performer, ReluLinear, existing_only
from glattn.layers.precision import precise
from glattn.layers.reformer import Reformer
from glattn.layers.resizing import resized
from glattn.layers.tracing import sizes_are_known

torch.fx.wrap("existing_only")  # torch.fx looks for wrapped functions by the file that calls them


@torch.fx.wrap
def score_mask(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Join a bias ``(heads, queries, keys)`` and a mask of keys ``(groups, keys)`` to what SDPA takes."""
    if mask is None:
        return bias if bias is None else bias.unsqueeze(0)
    keys = mask.unsqueeze(1).unsqueeze(1)
    return keys if bias is None else bias.unsqueeze(0).masked_fill(~keys, float("-inf"))


@torch.fx.wrap
def masked_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the scores with `score_mask`'s answer added, or what is False in it ruled out."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


class Softmax(nn.Module):
    """``softmax(q k' / sqrt(head_dim) + bias) v``: cost ``queries * keys``, memory linear where SDPA is fused.

    With ``timm.layers.set_fused_attn(False)`` at construction the weights are a tensor that
    `timm.utils.AttentionExtract` finds.

    Args:
        num_heads: Heads of the group.
        head_dim: Channels a head.
        tokens: Keys of a group at the nominal image size.
        config: ``attn_drop`` is read here.
    """

    takes_bias = True
    shares_qk = False
    __constants__ = ["fused_attn"]

    def __init__(self, num_heads: int, head_dim: int, tokens: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.attn_drop = nn.Dropout(config.attn_drop)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the outputs, ``(groups, heads, queries, head_dim)``."""
        attn_mask = score_mask(bias, mask)
        if self.fused_attn:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=self.attn_drop.p if self.attn_drop.training else 0.0
            )
        attn = masked_scores((q * self.scale) @ k.transpose(-2, -1), attn_mask)
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        return attn @ v


@torch.fx.wrap
def resize_projection(projection: Tensor, tokens: int) -> Tensor:
    """Return a ``(rank, tokens)`` projection for other tokens; by whole numbers it keeps what a constant becomes."""
    if sizes_are_known():
        if projection.shape[1] == tokens:
            return projection
    wide = projection.to(precise(projection)).unsqueeze(0)
    wide = F.interpolate(wide, size=[tokens], mode="linear", align_corners=False)
    return (wide.squeeze(0) * (projection.shape[1] / tokens)).to(projection.dtype)


class Linformer(nn.Module):
    """``softmax(q (E k)' / sqrt(head_dim)) F v``: keys and values projected to ``rank`` rows, cost ``tokens * rank``.

    ``E`` and ``F`` are learned for the nominal number of tokens and resized to any other.

    Args:
        num_heads: Heads of the group.
        head_dim: Channels a head.
        tokens: Keys of a group at the nominal image size.
        config: ``linformer_rank`` and ``attn_drop`` are read here.
    """

    takes_bias = False
    shares_qk = False

    def __init__(self, num_heads: int, head_dim: int, tokens: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__()
        self.project_k = nn.Parameter(torch.empty(config.linformer_rank, tokens, **factory))
        self.project_v = nn.Parameter(torch.empty(config.linformer_rank, tokens, **factory))
        self.softmax = Softmax(num_heads, head_dim, tokens, config=config)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw both projections anew: truncated normal, variance one over the tokens, so that values keep theirs."""
        for projection in (self.project_k, self.project_v):
            trunc_normal_(projection, std=projection.shape[1] ** -0.5)

    @torch.jit.ignore
    def set_tokens(self, tokens: int) -> None:
        """Resize the projections for another nominal image size."""
        for name in ("project_k", "project_v"):
            old = getattr(self, name)
            with torch.no_grad():
                new = resize_projection(old, tokens)
            setattr(self, name, resized(old, new))

    @torch.jit.ignore
    def resize_state(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Resize a checkpoint's projections to these ones' size, in place."""
        for name in ("project_k", "project_v"):
            old = state_dict.get(prefix + name)
            if old is not None and old.ndim == 2 and old.shape[0] == getattr(self, name).shape[0]:
                state_dict[prefix + name] = resize_projection(old, getattr(self, name).shape[1])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the outputs, ``(groups, heads, queries, head_dim)``."""
        k = resize_projection(self.project_k, k.shape[2]) @ existing_only(k, mask)
        v = resize_projection(self.project_v, v.shape[2]) @ existing_only(v, mask)
        return self.softmax(q, k, v, None, None)


MECHANISMS: dict[str, type[nn.Module]] = {
    "softmax": Softmax,
    "relu_linear": ReluLinear,
    "performer": Performer,
    "linformer": Linformer,
    "reformer": Reformer,
}
