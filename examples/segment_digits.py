"""Train UNetFormer's decoder on a GLAttn backbone to mark the ink of handwritten digits, a class a digit.

    python examples/segment_digits.py                    # 13 minutes on two cores

Needs 'glattn[examples]'. Scenes to measure on are made of digits that training never sees.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from digit_scenes import CLASSES, Digits, Scene
from matplotlib import pyplot as plt
from running import arguments, image_of, report, run, save, train, warm_up
from scores import confusion, intersections_over_unions
from torch import Tensor, nn

import glattn  # noqa: F401 (registers the family)
from glattn.figures import save_figure
from glattn.heads import unetformer

NAMES = ("background", *CLASSES)
IGNORED = 255  # what pads the masks of a batch


def batch_of(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Return images ``(B, 3, H, W)`` and masks ``(B, H, W)``, padded to the largest."""
    height, width = (max(scene.mask.shape[i] for scene in scenes) for i in (0, 1))
    images, masks = torch.zeros(len(scenes), 3, height, width), torch.full((len(scenes), height, width), IGNORED)
    for image, mask, scene in zip(images, masks, scenes, strict=True):
        h, w = scene.mask.shape
        image[:, :h, :w] = image_of(scene)
        mask[:h, :w] = torch.from_numpy(scene.mask)
    return images, masks


def loss_of_masks(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean of three losses: cross-entropy of all pixels, of the digits where there is ink, and Dice.

    Most pixels are background: without the second, which digit it is would hardly count. It compares digits alone, so
    that it does not thicken them.
    """
    counted = masks != IGNORED
    ink = counted & (masks > 0)
    digits = F.cross_entropy(logits.permute(0, 2, 3, 1)[ink][:, 1:], masks[ink] - 1)
    shares = logits.softmax(1) * counted[:, None]
    truth = F.one_hot(masks * counted, len(NAMES)).permute(0, 3, 1, 2) * counted[:, None]
    both = (shares * truth).sum((0, 2, 3))
    dice = 1 - (2 * both + 1) / (shares.sum((0, 2, 3)) + truth.sum((0, 2, 3)) + 1)
    return (F.cross_entropy(logits, masks, ignore_index=IGNORED) + digits + dice.mean()) / 3


@torch.inference_mode()
def segment(model: nn.Module, scene: Scene) -> Tensor:
    """Return the class of each pixel of a scene, at the scene's own size."""
    return model(batch_of([scene])[0].contiguous(memory_format=torch.channels_last)).argmax(1)[0]


def draw(scenes: list[Scene], found: list[Tensor], path: Path) -> None:
    """Draw the first scenes, what they hold, and what was found."""
    figure, axes = plt.subplots(3, 6, figsize=(15, 8), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for column, scene, mask in zip(axes.T, scenes, found, strict=False):
        shown = None
        for axis, image in zip(column, (scene.image, scene.mask, mask.numpy()), strict=True):
            shown = axis.imshow(image, cmap="tab20", vmin=-0.5, vmax=len(NAMES) - 0.5, interpolation="nearest")
        bar = shown
    for axis, title in zip(axes[:, 0], ("scene", "truth", "found"), strict=True):
        axis.set_title(title, loc="left")
    figure.colorbar(bar, ax=axes, ticks=range(len(NAMES)), shrink=0.6).ax.set_yticklabels(NAMES)
    save_figure(figure, path)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    """Train, measure, draw, save."""
    start = time.monotonic()
    sizes = {"digit_side": (56, 80), "most": 12}
    digits, held_out = Digits(train=True, **sizes), Digits(train=False, **sizes)
    # the stem's map at stride 2 keeps strokes of a few pixels apart
    model = unetformer(args.model, num_classes=len(NAMES), dim=args.dim, stem_features=args.stem)
    model = model.to(memory_format=torch.channels_last)
    print(f"UNetFormer on {args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")

    warm_up(model.backbone, steps=args.warm_up, lr=args.lr, seed=args.seed)

    def loss_of(step: int) -> Tensor:
        size = digits.size(np.random.default_rng((args.seed, 2, step)))  # one for the batch, so that nothing is padded
        images, masks = batch_of([digits.scene((args.seed, 0, step, i), size) for i in range(args.batch_size)])
        return loss_of_masks(model(images.contiguous(memory_format=torch.channels_last)), masks)

    print("training on scenes")
    train(model.train(), loss_of, steps=args.steps, lr=args.lr)
    save(model, args.output)
    model.eval()
    scenes = [held_out.scene((12345, i)) for i in range(args.held_out)]
    found = [segment(model, scene) for scene in scenes]
    pixels = sum(
        confusion(mask, torch.from_numpy(scene.mask).long(), classes=len(NAMES))
        for mask, scene in zip(found, scenes, strict=True)
    )
    ious = intersections_over_unions(pixels)
    draw(scenes, found, args.output / "predictions.png")
    single = {name: None if iou != iou else iou for name, iou in zip(NAMES, ious.tolist(), strict=True)}
    report(args, "mean_iou", ious.nanmean().item(), {"iou": single}, start=start)


if __name__ == "__main__":
    matplotlib.use("Agg")
    options = arguments(__doc__.partition("\n")[0], steps=1200, warm_up=1000, output="runs/segment_digits")
    options.add_argument("--dim", type=int, default=32, help="channels of the decoder")
    options.add_argument("--stem", action=argparse.BooleanOptionalAction, default=True, help="use the stem's map")
    raise SystemExit(run(main, options))
