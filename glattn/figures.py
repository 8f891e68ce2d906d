"""Drawing to PNG files, without a display, a global state or a half-written file."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.figure import Figure

from glattn.files import replacing


def save_figure(figure: Figure, path: Path, *, dpi: int = 110) -> Path:
    """Write a figure as PNG, whole or not at all, and return its path."""
    with replacing(path) as temporary, warnings.catch_warnings():
        # a class may be named in a script that the font lacks: a box in the picture, the name in the page
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(temporary, format="png", dpi=dpi)
    return path
