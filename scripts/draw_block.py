"""Draw docs/block.png: the idea of the block in one picture."""

import argparse
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

from glattn.figures import save_figure

TARGET = Path(__file__).resolve().parents[1] / "docs" / "block.png"
LOCAL, GLOBAL, PLAIN = "#dcebdc", "#dbe4f3", "#f1f1f1"


def box(axes: plt.Axes, x: float, y: float, text: str, colour: str, width: float = 1.9, height: float = 0.62) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.03",
            facecolor=colour,
            edgecolor="#555",
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes: plt.Axes, *points: tuple[float, float]) -> None:
    for (x0, y0), (x1, y1) in itertools.pairwise(points[:-1]):
        axes.plot([x0, x1], [y0, y1], color="#555", lw=1.2, solid_capstyle="round")
    (x0, y0), (x1, y1) = points[-2:]
    axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "-|>", "color": "#555", "lw": 1.2})


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    figure, axes = plt.subplots(figsize=(11, 3.6), dpi=110)
    axes.set(xlim=(-0.4, 14.4), ylim=(-1.9, 2.5))
    axes.axis("off")
    axes.text(0.15, 0, "x", ha="center", va="center", fontsize=12)
    box(axes, 2.4, 1.0, "1x1 + 3x3 + 5x5\nconvolutions", LOCAL)
    box(axes, 5.2, 1.0, "squeeze and\nexcitation", LOCAL)
    box(axes, 2.4, -1.0, "position,\nq, k, v by 1x1", GLOBAL)
    box(axes, 5.2, -1.0, "multi-head\nself-attention", GLOBAL)
    axes.text(3.8, 1.75, "local branch: texture and edges", ha="center", fontsize=9, color="#3d6b3d")
    axes.text(3.8, -1.75, "global branch: the whole image", ha="center", fontsize=9, color="#34507f")
    box(axes, 7.6, 0, "fusion", PLAIN, width=1.1)
    box(axes, 9.3, 0, "1x1", PLAIN, width=0.8)
    axes.text(10.6, 0, "+", ha="center", va="center", fontsize=15)
    box(axes, 12.0, 0, "MLP", PLAIN, width=1.0)
    axes.text(13.3, 0, "+", ha="center", va="center", fontsize=15)
    arrow(axes, (0.3, 0), (0.9, 0), (0.9, 1.0), (1.4, 1.0))
    arrow(axes, (0.9, 0), (0.9, -1.0), (1.4, -1.0))
    for y in (1.0, -1.0):
        arrow(axes, (3.4, y), (4.2, y))
        arrow(axes, (6.2, y), (7.6, y), (7.6, 0.36 if y > 0 else -0.36))
    arrow(axes, (8.2, 0), (8.85, 0))
    arrow(axes, (9.75, 0), (10.45, 0))
    arrow(axes, (10.75, 0), (11.45, 0))
    arrow(axes, (12.55, 0), (13.15, 0))
    arrow(axes, (13.45, 0), (14.2, 0))
    arrow(axes, (0.6, 0), (0.6, 2.3), (10.6, 2.3), (10.6, 0.25))
    arrow(axes, (11.1, 0), (11.1, 1.2), (13.3, 1.2), (13.3, 0.25))
    figure.tight_layout(pad=0.2)
    save_figure(figure, TARGET)


if __name__ == "__main__":
    main()
