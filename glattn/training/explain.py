"""Where a block's global branch looked in an image, and what its local branch answered to.

The global branch is linear in its values whatever its layout and mechanism, so the attention that a cell receives
is the gradient of the summed outputs with respect to that cell's values; for softmax attention this is the
weights' sum over the queries, without needing them as a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from glattn.figures import save_figure
from glattn.files import plain

_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.mixer")
_LEGEND = (
    "above: attention that\na place receives\n(1 is an even share)\n\n"
    "this row: magnitude of\nthe local branch's answer\n\nbright is much"
)


@dataclass(frozen=True)
class BlockMaps:
    """What one block did with one image, as maps of the image's size.

    Args:
        title: Which block.
        received: Attention that each place receives, 1 being its even share; None without a global branch.
        answer: Mean magnitude of the local branch's output over its channels; None without a local branch.
        cells: Height and width of the map that was attended.
    """

    title: str
    received: np.ndarray | None
    answer: np.ndarray | None
    cells: tuple[int, int]


def explain(model: nn.Module, image: Tensor) -> list[BlockMaps]:
    """Return the maps of each stage's last block for one image ``(1, 3, H, W)``.

    Raises:
        ValueError: The model has no global-local blocks.
    """
    last = {int(found[1]): name for name, _ in model.named_modules() if (found := _BLOCK.fullmatch(name))}
    if not last:
        raise ValueError("this model has no global-local blocks to explain; those of glattn_* have")
    size = (int(image.shape[2]), int(image.shape[3]))
    received: dict[int, list[Tensor]] = {stage: [] for stage in last}
    answers: dict[int, Tensor] = {}

    def attend(stage: int) -> Any:
        def hook(group: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], _: Tensor) -> None:
            q, k, v = (value.detach() for value in inputs)
            with torch.enable_grad():
                v.requires_grad_()
                (gradient,) = torch.autograd.grad(group.forward(q, k, v).sum(), v)
            received[stage].append(gradient.float())

        return hook

    def answer(stage: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            answers[stage] = out.detach().float().abs().mean(1, keepdim=True)

        return hook

    handles = []
    for stage, name in last.items():
        mixer = model.get_submodule(name)
        handles += [group.register_forward_hook(attend(stage)) for group in getattr(mixer.attn, "groups", [])]
        if not isinstance(mixer.local, nn.Identity):
            handles.append(mixer.local.register_forward_hook(answer(stage)))  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()

    result = []
    for stage, name in sorted(last.items()):
        looked = torch.cat(received[stage], 1).mean(1, keepdim=True) if received[stage] else None
        found = _BLOCK.fullmatch(name)
        assert found
        some = looked if looked is not None else answers[stage]
        result.append(
            BlockMaps(
                title=f"stage {stage + 1}, block {int(found[2]) + 1}",
                received=None if looked is None else _to_image(looked, size),
                answer=_to_image(answers[stage], size) if stage in answers else None,
                cells=(int(some.shape[2]), int(some.shape[3])),
            )
        )
    return result


def _to_image(values: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Bring a map ``(1, 1, h, w)`` to the image's size."""
    return np.asarray(F.interpolate(values, size=size, mode="bilinear", align_corners=False)[0, 0].cpu())


def draw(path: Path, entries: Sequence[tuple[str, np.ndarray, Sequence[BlockMaps]]]) -> None:
    """Write a picture: for each image, a row of received attention above a row of local answers, a stage a column.

    Args:
        path: The PNG to write.
        entries: (caption, image as the model sees it ``(H, W, 3)`` in 0..1, its maps).
    """
    columns = 1 + max(len(maps) for _, _, maps in entries)
    figure = Figure(figsize=(2.5 * columns, 5.4 * len(entries) + 0.5), layout="constrained", facecolor="white")
    axes = figure.subplots(2 * len(entries), columns, squeeze=False)
    for row, (caption, image, maps) in enumerate(entries):
        top, bottom = axes[2 * row], axes[2 * row + 1]
        top[0].imshow(image)
        top[0].set_title(plain(caption), fontsize=10, parse_math=False)
        bottom[0].text(0.5, 0.5, _LEGEND, ha="center", va="center", fontsize=9, color="#444")
        for axis in (*top, *bottom):
            axis.set_axis_off()
        for column, block in enumerate(maps, start=1):
            top[column].set_title(f"{block.title}\n{block.cells[0]}x{block.cells[1]} cells", fontsize=9)
            _overlay(top[column], image, block.received, "no global branch", "magma")
            _overlay(bottom[column], image, block.answer, "no local branch", "viridis")
    save_figure(figure, path)


def _overlay(axis: Any, image: np.ndarray, values: np.ndarray | None, missing: str, colours: str) -> None:
    if values is None:
        axis.text(0.5, 0.5, missing, ha="center", va="center", fontsize=9, color="#444")
        return
    low, high = float(values.min()), float(values.max())
    axis.imshow(image.mean(2), cmap="gray", vmin=0, vmax=1)
    span = max(high - low, 1e-3 * max(-low, high), 1e-12)  # less is rounding, on a map of one cell
    # where there is little to show, the image shows through
    axis.imshow(values, cmap=colours, vmin=low, vmax=low + span, alpha=0.25 + 0.55 * (values - low) / span)
    axis.text(
        0.5, -0.03, f"{low:.1f} to {high:.1f}", transform=axis.transAxes,
        ha="center", va="top", fontsize=8, color="#444",
    )  # fmt: skip
