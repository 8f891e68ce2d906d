"""From queries, keys and values to outputs: softmax attention, and cheaper ones.

Performer: FAVOR+ (arXiv:2009.14794); Linformer (arXiv:2006.04768); ReLU linear attention: EfficientViT
(arXiv:2205.14756); Reformer: LSH attention (arXiv:2001.04451). All take a group's tokens as
``(groups, heads, tokens, head_dim)`` and any number of tokens; cheaper ones compute in float32 at least.
"""

import math
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import trunc_normal_, use_fused_attn
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.position import precise
from glattn.layers.tracing import sizes_are_known


def autocasts(x: Tensor) -> bool:
    """Return whether matrix products of such tensors would be cast to a lower precision."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


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


@torch.fx.wrap
def existing_only(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``(groups, heads, keys, channels)`` with zeros where the mask ``(groups, keys)`` is False."""
    if mask is None:
        return x
    return x * mask.unsqueeze(1).unsqueeze(3).to(x.dtype)


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
                q, k, v, attn_mask=attn_mask, dropout_p=self.attn_drop.p if self.training else 0.0
            )
        attn = masked_scores((q * self.scale) @ k.transpose(-2, -1), attn_mask)
        attn = attn.softmax(dim=-1)
        attn = self.attn_drop(attn)
        return attn @ v


class ReluLinear(nn.Module):
    """``relu(q) (relu(k)' v) / (relu(q) relu(k)' 1)``: cost ``tokens * head_dim``, linear in tokens.

    A query without a positive channel gets zeros.
    """

    takes_bias = False
    shares_qk = False

    def __init__(self, num_heads: int, head_dim: int, tokens: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the outputs, ``(groups, heads, queries, head_dim)``."""
        return kernel_attention(relu_features(q), existing_only(relu_features(k), mask), v)


@torch.fx.wrap
def relu_features(x: Tensor) -> Tensor:
    """Return ``relu(x)`` in float32 at least: sums over many tokens follow."""
    return F.relu(x.to(precise(x)))


@torch.fx.wrap
def kernel_attention(q: Tensor, k: Tensor, v: Tensor, least: float = 1e-12) -> Tensor:
    """Return ``q (k' v) / (q k' 1)`` for non-negative features ``(groups, heads, tokens, features)``, in v's type.

    Args:
        q: The queries' features.
        k: The keys' features.
        v: The keys' values, ``(groups, heads, tokens, head_dim)``.
        least: What the divisor is at least; below it the outputs vanish.
    """
    if not torch.jit.is_scripting():
        if autocasts(q):
            with torch.autocast(q.device.type, enabled=False):
                return kernel_attention(q, k, v, least)
    k = k / k.shape[2]  # a mean over the keys instead of a sum: the quotient is the same, and the terms stay small
    total = q @ k.sum(dim=2).unsqueeze(3)
    return ((q @ (k.transpose(-2, -1) @ v.to(q.dtype))) / total.clamp(min=least)).to(v.dtype)


@torch.fx.wrap
def orthogonal_features(like: Tensor, num_heads: int, features: int, head_dim: int) -> Tensor:
    """Draw ``(heads, features, head_dim)`` Gaussian vectors, orthogonal to each other in blocks of ``head_dim``."""
    blocks = (features + head_dim - 1) // head_dim
    square = torch.randn(num_heads, blocks, head_dim, head_dim, device=like.device, dtype=torch.float32)
    basis, upper = torch.linalg.qr(square)
    # the signs that LAPACK chooses depend on the rest: only with R's put right is the basis uniformly distributed
    basis = basis * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    directions = basis.flatten(1, 2)[:, :features]
    gaussian = torch.randn(num_heads, features, head_dim, device=like.device, dtype=torch.float32)
    lengths = torch.linalg.vector_norm(gaussian, dim=-1)
    return (directions * lengths.unsqueeze(-1)).to(precise(like))


@torch.fx.wrap
def positive_features(x: Tensor, vectors: Tensor, each: bool) -> Tensor:
    """Return FAVOR+'s ``exp(w x - |x|^2 / 2 - c)``, ``(groups, heads, tokens, features)``.

    ``c``, which cancels later, is the largest exponent of each token, or of the whole group.
    """
    if not torch.jit.is_scripting():
        if autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return positive_features(x, vectors, each)
    x = x.to(precise(x)) * x.shape[-1] ** -0.25
    exponent = x @ vectors.to(x.dtype).transpose(-2, -1) - x.square().sum(dim=-1, keepdim=True) / 2
    largest = exponent.amax(dim=-1, keepdim=True)
    if not each:
        largest = largest.amax(dim=2, keepdim=True)
    return torch.exp(exponent - largest.detach())


class Performer(nn.Module):
    """FAVOR+: softmax attention through positive random features, cost ``tokens * features``, linear in tokens.

    The random vectors are orthogonal. In training each forward draws new ones; evaluation uses those that were
    drawn at construction, which a checkpoint carries.

    Args:
        num_heads: Heads of the group.
        head_dim: Channels a head.
        tokens: Keys of a group at the nominal image size.
        config: ``random_features`` is read here; the error falls with its square root.
    """

    takes_bias = False
    shares_qk = False

    def __init__(self, num_heads: int, head_dim: int, tokens: int, *, config: MixerConfig, **factory: Any) -> None:
        super().__init__()
        self.num_heads, self.features, self.head_dim = num_heads, config.random_features, head_dim
        self.register_buffer("vectors", torch.empty(num_heads, self.features, head_dim, **factory))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the random vectors anew."""
        if not self.vectors.is_meta:
            self.vectors.copy_(orthogonal_features(self.vectors, self.num_heads, self.features, self.head_dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the outputs, ``(groups, heads, queries, head_dim)``."""
        vectors = self.vectors
        if self.training:
            vectors = orthogonal_features(q, self.num_heads, self.features, self.head_dim)
        q = positive_features(q, vectors, True)
        k = positive_features(k, vectors, False)
        # exponentials of queries and keys that are far apart are small, and no less weights for that
        return kernel_attention(q, existing_only(k, mask), v, 1e-30)


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
            setattr(self, name, nn.Parameter(new, old.requires_grad))

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


MECHANISMS: dict[str, type[nn.Module]] = {
    "softmax": Softmax,
    "relu_linear": ReluLinear,
    "performer": Performer,
    "linformer": Linformer,
    "reformer": Reformer,
}
