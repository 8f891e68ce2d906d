"""Global context block (GCNet, arXiv:1904.11492), timm's: each cell gets a transform of one attended mean."""

from collections.abc import Callable
from typing import Any

from timm.layers import GlobalContext
from torch import nn


def _none(dim: int, **factory: Any) -> nn.Module:
    return nn.Identity()


def _global_context(dim: int, **factory: Any) -> nn.Module:
    return GlobalContext(dim, fuse_add=True, fuse_scale=False, **factory)


CONTEXTS: dict[str, Callable[..., nn.Module]] = {"none": _none, "gc": _global_context}
