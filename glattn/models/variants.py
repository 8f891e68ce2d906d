"""The family's sizes and named mechanisms, as one table of configs."""

from typing import Any

from glattn.config import GLAttnConfig

# Every stage attends on a map of stride 32: pooled where its own is larger (see docs/results.md).
_DEFAULT: dict[str, Any] = {
    "layout": ("pooled", "pooled", "pooled", "full"),
    "pool_stride": (8, 4, 2, 1),
}


def _size(dims: tuple[int, ...], depths: tuple[int, ...], **options: Any) -> GLAttnConfig:
    return GLAttnConfig(dims=dims, depths=depths).replace(**{**_DEFAULT, **options})


# One wide block stands last: on drawings it is worth more than depth (see docs/results.md).
_WIDE = {"mlp_ratio": (4.0, 4.0, 4.0, 2.0)}
_TINY = _size((64, 128, 320, 1344), (1, 1, 6, 1), **_WIDE)

VARIANTS: dict[str, GLAttnConfig] = {
    "test_glattn": _size((16, 24, 32, 64), (1, 1, 2, 1), head_dim=8),
    "glattn_atto": _size((32, 64, 160, 448), (1, 1, 3, 1), **_WIDE),
    "glattn_pico": _size((64, 96, 224, 704), (1, 1, 3, 1), **_WIDE),
    "glattn_nano": _size((64, 128, 256, 960), (1, 1, 4, 1), **_WIDE),
    "glattn_tiny": _TINY,
    "glattn_small": _size((64, 128, 384, 1536), (1, 1, 14, 1), **_WIDE),
    "glattn_base": _size((96, 192, 512, 1920), (1, 1, 14, 1), **_WIDE),
    "glattn_large": _size((128, 256, 704, 2816), (1, 1, 18, 1), **_WIDE),
    # glattn_tiny with other mechanisms, and its widths and depths but for the last
    "glattn_tiny_rope": _TINY.replace(position="rope"),
    # no bias where the whole map is attended: it would grow with the square of the map
    "glattn_tiny_window": _TINY.replace(
        layout=("window", "shifted", "window", "full"), position=("bias", "bias", "bias", "conv")
    ),
    "glattn_tiny_linear": _TINY.replace(layout="full", mechanism="relu_linear"),
    "glattn_tiny_performer": _TINY.replace(layout=("pooled", "full", "full", "full"), mechanism="performer"),
    # the first specification taken literally: dense convolutions, full attention with a relative bias
    "glattn_tiny_dense": _size((48, 80, 160, 288), (2, 2, 8, 2), head_dim=16).replace(
        local_groups="dense", layout=("pooled", "pooled", "full", "full"), position="bias"
    ),
}
