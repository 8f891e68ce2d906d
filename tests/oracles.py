"""Slow, obvious answers that the mechanisms are compared with: cells in loops, every pair of cells in one matrix."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from glattn import MixerConfig
from glattn.layers import MultiHeadGlobalAttention

# options under which a kind shows what it does on maps of some ten cells a side
OPTIONS = {
    "full": {},
    "pooled": {"pool_stride": 2},
    "window": {"window_size": 4},
    "shifted": {"window_size": 4},
    "grid": {"window_size": 3},
    "overlap": {"window_size": 3, "halo": 2},
    "multi_scale": {"window_sizes": (3, 0)},
    "cross_shaped": {"window_size": 2},
    "performer": {"random_features": 16},
    "linformer": {"linformer_rank": 5},
    "reformer": {"lsh_bucket_size": 6, "lsh_rounds": 2},
}


def mixer(**options) -> MixerConfig:
    """Return a mixer of small heads whose kinds have options that show on small maps; nothing else but the heads."""
    kinds = [options.get(axis) for axis in ("layout", "mechanism")]
    small = {k: v for kind in kinds for k, v in OPTIONS.get(kind, {}).items()}
    return MixerConfig(**{"head_dim": 4, "position": "none", **small, **options})


def product(**axes) -> list[tuple[str, ...]]:
    """Return the combinations of kinds that a config takes."""
    return [kinds for kinds in itertools.product(*axes.values()) if accepted(dict(zip(axes, kinds, strict=True)))]


def accepted(options) -> bool:
    """Return whether a config takes the options."""
    try:
        mixer(**options)
    except ValueError:
        return False
    return True


def attention(dim=8, *, map_size=(7, 7), **options) -> MultiHeadGlobalAttention:
    """Return a global branch in double precision, in evaluation mode, whose norms do something."""
    attn = MultiHeadGlobalAttention(dim, config=mixer(**options), map_size=map_size).double().eval()
    return enliven(attn)


def enliven(module: nn.Module) -> nn.Module:
    """Give weights a size at which softmax is far from uniform, and norms statistics of their own."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.normal_(std=1.5 * part.weight[0].numel() ** -0.5)
            elif isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(std=0.3)
                part.running_mean.normal_(std=0.3)
                part.running_var.uniform_(0.5, 1.5)
            for name, value in part.named_parameters(recurse=False):
                if name in ("table", "rows", "columns"):
                    value.normal_()
    return module


def conv_norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Convolution, then batch normalisation by running statistics, from its formula."""
    conv, bn = module.conv, module.bn
    x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return x * scale.view(-1, 1, 1) + (bn.bias - bn.running_mean * scale).view(-1, 1, 1)


def heads_of(maps: torch.Tensor, num_heads: int) -> torch.Tensor:
    """``(B, heads * D, H, W) -> (B, heads, H * W, D)``."""
    return maps.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3)


def softmax_attention(q, k, v, bias=0.0, sees=None):
    """``softmax(q k' / sqrt(D) + bias) v`` with what ``sees`` has False ruled out."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
    if sees is not None:
        scores = scores.masked_fill(~sees, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def relu_attention(q, k, v, bias=0.0, sees=None):
    """ReLU attention with its N x N matrix."""
    weights = q.relu() @ k.relu().transpose(-2, -1)
    if sees is not None:
        weights = weights * sees
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-9)


def dense_attention(attn, x, sees=None, bias=0.0, attend=softmax_attention):
    """A global branch (not pooled, without encodings of queries) by N x N matrices: ``sees`` is ``(heads, N, N)``."""
    q, k, v = (heads_of(part, attn.num_heads) for part in conv_norm(attn.qkv, x).chunk(3, dim=1))
    out = attend(q, k, v, bias, sees).transpose(2, 3).reshape(x.shape)
    return conv_norm(attn.proj, out)


def cells(height: int, width: int) -> list[tuple[int, int]]:
    """The cells of a map, as (row, column), in the order of its tokens."""
    return [(y, x) for y in range(height) for x in range(width)]


def pair_matrix(height: int, width: int, rule) -> torch.Tensor:
    """``(N, N)`` of ``rule(query, key)`` over all pairs of cells."""
    return torch.tensor([[rule(q, k) for k in cells(height, width)] for q in cells(height, width)])


def region(place: int, length: int, size: int, shifted: bool) -> int:
    """The window of a cell along an axis; shifted ones begin half a window late, unless one covers the axis."""
    return (place + size - size // 2) // size if shifted and size < length else place // size


def sees(config: MixerConfig, height: int, width: int) -> torch.Tensor:
    """Which cell sees which under a layout, from its definition: ``(head groups, N, N)``."""
    s, halo = config.window_size, config.halo
    m, n = math.ceil(height / s), math.ceil(width / s)

    def window(h, w, shifted=False):
        return lambda q, k: all(
            region(a, length, size, shifted) == region(b, length, size, shifted)
            for a, b, length, size in zip(q, k, (height, width), (h, w), strict=True)
        )

    def around(q, k):
        return all(a // s * s - halo <= b < (a // s + 1) * s + halo for a, b in zip(q, k, strict=True))

    rules = {
        "full": [lambda q, k: True],
        "window": [window(s, s)],
        "shifted": [window(s, s, shifted=True)],
        "grid": [lambda q, k: q[0] % m == k[0] % m and q[1] % n == k[1] % n],
        "overlap": [around],
        "multi_scale": [window(w or height, w or width) for w in config.window_sizes],
        "cross_shaped": [window(s, width), window(height, s)],
    }
    return torch.stack([pair_matrix(height, width, rule) for rule in rules[config.layout]])


def sees_by_head(attn, config: MixerConfig, height: int, width: int) -> torch.Tensor:
    """`sees` for each head: ``(heads, N, N)``."""
    groups = sees(config, height, width)
    return groups.repeat_interleave(attn.num_heads // len(groups), 0)
