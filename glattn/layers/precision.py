"""What is computed in float32 at least: tables, angles, and sums over many tokens."""

import torch
from torch import Tensor


def precise(like: Tensor) -> torch.dtype:
    """Return the type to compute tables in: float32, or float64 for a float64 tensor."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def autocasts(x: Tensor) -> bool:
    """Return whether matrix products of such tensors would be cast to a lower precision."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
