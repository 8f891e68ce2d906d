"""Attention through kernel features, at a cost linear in the tokens.

Performer: FAVOR+ (arXiv:2009.14794); ReLU linear attention: EfficientViT (arXiv:2205.14756).
"""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from glattn.config import MixerConfig
from glattn.layers.precision import autocasts, precise


@torch.fx.wrap
def existing_only(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``(groups, heads, keys, channels)`` with zeros where the mask ``(groups, keys)`` is False."""
    if mask is None:
        return x
    return x * mask.unsqueeze(1).unsqueeze(3).to(x.dtype)


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
