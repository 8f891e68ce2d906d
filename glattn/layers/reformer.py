"""Reformer's attention within buckets of tokens that a random hash sorts together (arXiv:2001.04451)."""

import math
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.precision import autocasts, precise
from glattn.layers.tracing import sizes_are_known


class Reformer(nn.Module):
    """LSH attention: queries are keys too (normalised), and meet those of their bucket and of the one before.

    In each round tokens are sorted by a random hash and cut into buckets of ``lsh_bucket_size``; rounds are joined by
    their softmax sums. A token meets itself only where it meets nothing else. Cost ``2 * tokens * bucket size`` a
    round; up to one bucket of tokens it is full attention.

    Args:
        num_heads: Heads of the group.
        head_dim: Channels a head.
        tokens: Keys of a group at the nominal image size.
        config: ``lsh_bucket_size`` and ``lsh_rounds`` are read here.
    """

    takes_bias = False
    shares_qk = True

    def __init__(self, num_heads: int, head_dim: int, tokens: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__()
        self.bucket_size, self.rounds, self.head_dim = config.lsh_bucket_size, config.lsh_rounds, head_dim
        # 64 directions and their opposites: more than the buckets of a map of 90 x 90 cells, so they sort finely
        self.register_buffer("directions", torch.empty(config.lsh_rounds, head_dim, 64, **factory))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the hash directions anew."""
        self.directions.normal_()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the outputs, ``(groups, heads, queries, head_dim)``; ``k`` is not read."""
        return lsh_attention(q, v, mask, self.directions, self.bucket_size)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Return tokens of ``x``, ``(S, R or 1, N, D)``, in this order, ``(S, R, M)``: whole rows, for speed."""
    first = x.shape[2] * torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], 1)
    rows = x.flatten(0, 2).index_select(0, (first + order).flatten())
    return rows.reshape(order.shape[0], order.shape[1], order.shape[2], x.shape[3])


def _with_previous(x: Tensor, first: float = 0.0) -> Tensor:
    """Return each bucket with the one before it: ``(S, buckets, size, D) -> (S, buckets, 2 size, D)``."""
    return torch.cat([x, F.pad(x, [0, 0, 0, 0, 1, -1], value=first)], dim=2)


@torch.fx.wrap
def lsh_attention(q: Tensor, v: Tensor, mask: Tensor | None, directions: Tensor, size: int) -> Tensor:
    """Return `Reformer`'s attention over ``(groups, heads, tokens, head_dim)``."""
    if not torch.jit.is_scripting():
        if autocasts(q):
            with torch.autocast(q.device.type, enabled=False):
                return lsh_attention(q, v, mask, directions, size)
    groups, heads, tokens, dim = q.shape
    spare = 0 if sizes_are_known() else 1  # two buckets at least, so that an exported program holds for any number
    if spare == 0 and tokens <= size:  # every round is the same full attention
        size, directions = max(tokens, 1), directions[:1]
    rounds = directions.shape[0]
    kind = v.dtype
    q, v = q.to(precise(q)).reshape(-1, 1, tokens, dim), v.to(precise(q)).reshape(-1, 1, tokens, dim)
    exists = torch.ones(q.shape[0], tokens, device=q.device, dtype=torch.bool)
    if mask is not None:
        exists = mask.repeat_interleave(heads, 0)
    hashed = q.detach() @ directions.to(q.dtype)
    bucket = torch.cat([hashed, -hashed], dim=-1).argmax(dim=-1)
    bucket = bucket + (~exists).unsqueeze(1) * (2 * directions.shape[2])  # what does not exist sorts last
    place = torch.arange(tokens, device=q.device)
    order = (bucket * tokens + place).argsort(dim=-1)

    buckets = (tokens + size - 1) // size + spare
    empty = buckets * size - tokens
    wide = F.pad(order, [0, empty])
    real = F.pad(_take(exists.reshape(-1, 1, tokens, 1), order).squeeze(3), [0, empty])
    q = _take(q, wide).reshape(-1, buckets, size, dim)
    v = _take(v, wide).reshape(-1, buckets, size, dim)
    place = wide.reshape(-1, buckets, size, 1)
    seen = _with_previous(place.masked_fill(~real.reshape(-1, buckets, size, 1), -1), first=-1.0).transpose(2, 3)

    # all in powers of two: exp of what is hidden takes MKL twenty times as long
    hidden = torch.zeros_like(seen, dtype=q.dtype).masked_fill(seen < 0, -1e9)
    hidden = torch.where(place == seen, -5e4, hidden)  # itself
    keys = _with_previous(F.normalize(q, dim=-1)).transpose(2, 3)
    scale = dim**-0.5 / math.log(2)
    scores = torch.baddbmm(hidden.flatten(0, 1), q.flatten(0, 1), keys.flatten(0, 1), alpha=scale)
    top = scores.detach().amax(dim=-1, keepdim=True)
    weights = torch.exp2(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    out = weights @ _with_previous(v).flatten(0, 1) / total
    total = top + total.log2()

    back = order.argsort(dim=-1)
    out = _take(out.reshape(-1, rounds, buckets * size, dim), back)
    total = _take(total.reshape(-1, rounds, buckets * size, 1), back)
    out = (out * (total * math.log(2)).softmax(dim=1)).sum(dim=1)
    return out.reshape(groups, heads, tokens, dim).to(kind)
