"""The parts of a block, each usable alone on ``(B, C, H, W)`` maps, and the tables of their kinds."""

from collections.abc import Mapping
from typing import Any

from glattn.layers.attention import MultiHeadGlobalAttention
from glattn.layers.block import GlobalLocalAttention, GlobalLocalBlock, Mlp
from glattn.layers.context import CONTEXTS
from glattn.layers.conv import ConvNorm, MultiScaleConv
from glattn.layers.cross_window import CROSS_WINDOWS
from glattn.layers.fusion import FUSIONS
from glattn.layers.layout import LAYOUTS, WINDOW_SIZINGS
from glattn.layers.local import GATES, LOCALS, ImprovedLocalAttention
from glattn.layers.mechanism import MECHANISMS
from glattn.layers.position import POSITIONS

# option of MixerConfig -> its kinds
TABLES: Mapping[str, Mapping[str, Any]] = {
    "fusion": FUSIONS,
    "local": LOCALS,
    "local_gate": GATES,
    "layout": LAYOUTS,
    "window_sizing": WINDOW_SIZINGS,
    "position": POSITIONS,
    "mechanism": MECHANISMS,
    "cross_window": CROSS_WINDOWS,
    "context": CONTEXTS,
}

__all__ = [
    "TABLES",
    "ConvNorm",
    "GlobalLocalAttention",
    "GlobalLocalBlock",
    "ImprovedLocalAttention",
    "Mlp",
    "MultiHeadGlobalAttention",
    "MultiScaleConv",
]
