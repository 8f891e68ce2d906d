"""Draw docs/layouts.png: the cells that a query sees under each layout, as the gradient of its output tells."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from glattn import MixerConfig
from glattn.figures import save_figure
from glattn.layers import MultiHeadGlobalAttention

TARGET = Path(__file__).resolve().parents[1] / "docs" / "layouts.png"
HEIGHT, WIDTH = 14, 18
QUERY = (6, 9)
UNSEEN, SEEN, MARK = "#f4f4f4", "#7fa3d1", "#c0392b"
GROUPS = ("#7fa3d1", "#e3b36b")


@dataclass(frozen=True)
class Panel:
    """One picture: a title, what stands under it, and the options that it shows."""

    title: str
    text: str
    options: dict[str, object]


PANELS = (
    Panel('layout="full"', "every cell", {}),
    Panel('layout="pooled"', "every cell, on a strided map (pool_stride=2)", {"layout": "pooled", "pool_stride": 2}),
    Panel('layout="window"', "its window (window_size=4)", {"layout": "window", "window_size": 4}),
    Panel('layout="shifted"', "windows moved by half (window_size=4)", {"layout": "shifted", "window_size": 4}),
    Panel('layout="overlap"', "its window and a halo (3, halo=2)", {"layout": "overlap", "window_size": 3, "halo": 2}),
    Panel('layout="grid"', "a dilated grid (window_size=5)", {"layout": "grid", "window_size": 5}),
    Panel(
        'layout="multi_scale"',
        "window_sizes=(4, 8): blue, and orange",
        {"layout": "multi_scale", "window_sizes": (4, 8)},
    ),
    Panel(
        'layout="cross_shaped"',
        "stripes (window_size=2): blue, orange",
        {"layout": "cross_shaped", "window_size": 2},
    ),
    Panel(
        'window_sizing="map"',
        "the map cut in 3 (window_ratio=3)",
        {"layout": "window", "window_sizing": "map", "window_ratio": 3},
    ),
    Panel(
        'window_sizing="tokens"',
        "at most 30 cells (window_tokens=30)",
        {"layout": "window", "window_sizing": "tokens", "window_tokens": 30},
    ),
    Panel(
        'cross_window="strip"',
        "what the windows (3) of its strips see",
        {"layout": "window", "window_size": 3, "cross_window": "strip"},
    ),
)


def seen(options: dict[str, object]) -> list[torch.Tensor]:
    """Return for each head group the cells, ``(H, W)``, that the query's output has a gradient of."""
    torch.manual_seed(0)
    config = MixerConfig(position="none", head_dim=8, **options)
    attn = MultiHeadGlobalAttention(16, config=config, map_size=(HEIGHT, WIDTH), project=False).double().eval()
    x = torch.randn(1, 16, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
    out = attn(x)[0, :, QUERY[0], QUERY[1]]
    groups = []
    for heads in out.chunk(len(attn.groups)):
        gradient = torch.autograd.grad(heads.square().sum(), x, retain_graph=True)[0]
        groups.append(gradient[0].abs().amax(0) > 0)
    return groups


def draw(axes: plt.Axes, panel: Panel) -> None:
    axes.imshow(torch.zeros(HEIGHT, WIDTH), cmap=ListedColormap([UNSEEN]))
    # the group that sees more below, the other on top of it; where stripes cross both are one's
    groups = sorted(zip(seen(panel.options), GROUPS, strict=False), key=lambda pair: -int(pair[0].sum()))
    for cells, colour in groups:
        for y, x in cells.nonzero().tolist():
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour, lw=0))
    for y in range(HEIGHT + 1):
        axes.axhline(y - 0.5, color="white", lw=0.8)
    for x in range(WIDTH + 1):
        axes.axvline(x - 0.5, color="white", lw=0.8)
    axes.add_patch(Rectangle((QUERY[1] - 0.5, QUERY[0] - 0.5), 1, 1, facecolor=MARK, edgecolor="white", lw=0.8))
    axes.set_title(panel.title, fontsize=10, family="monospace", pad=5)
    axes.set_xlabel(panel.text, fontsize=9, labelpad=5)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, WIDTH - 0.5), ylim=(HEIGHT - 0.5, -0.5))
    for side in axes.spines.values():
        side.set_visible(False)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    figure, grid = plt.subplots(3, 4, figsize=(13, 9), dpi=110)
    for axes, panel in zip(grid.flat, PANELS, strict=False):
        draw(axes, panel)
    legend = grid.flat[-1]
    legend.axis("off")
    legend.set(xlim=(0, 10), ylim=(10, 0))
    lines = ((MARK, "the query"), (GROUPS[0], "seen"), (GROUPS[1], "seen by the second\nhalf of the heads"))
    for i, (colour, text) in enumerate((*lines, (UNSEEN, "not seen"))):
        legend.add_patch(Rectangle((1, 1.6 + 1.9 * i), 1, 1, facecolor=colour, edgecolor="#bbb", lw=0.6))
        legend.text(2.7, 2.1 + 1.9 * i, text, fontsize=10, va="center")
    legend.set_aspect("auto")
    figure.tight_layout(pad=0.8, h_pad=1.6)
    save_figure(figure, TARGET)


if __name__ == "__main__":
    main()
