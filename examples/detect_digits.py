"""Train Faster R-CNN on a GLAttn backbone to find handwritten digits in scenes of mixed, non-square sizes.

    python examples/detect_digits.py                     # 4 minutes on two cores
    python examples/detect_digits.py --detector retinanet --steps 1000

Needs 'glattn[examples]'. Scenes to measure on are made of digits that training never sees.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from digit_scenes import CLASSES, Digits, Scene
from matplotlib import pyplot as plt
from running import arguments, image_of, report, run, save, train, warm_up
from scores import average_precisions
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead

import glattn  # noqa: F401 (registers the family)
from glattn.figures import save_figure
from glattn.heads import fpn_backbone

ASPECTS = (0.8, 1.25, 2.0)  # height over width


def detector(kind: str, model: str) -> nn.Module:
    """Return a torchvision detector whose class 0 is the background, for objects of about 16 to 64 pixels."""
    classes = len(CLASSES) + 1
    sizes = {"min_size": 128, "max_size": 256}
    sizes |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # images come normalised
    if kind == "faster_rcnn":
        backbone = fpn_backbone(model, out_channels=64, extra="pool")
        anchors = AnchorGenerator(((16,), (28,), (44,), (64,), (90,)), (ASPECTS,) * 5)
        # torchvision's own numbers are for a thousand boxes of eighty classes an image
        proposals = {f"rpn_{when}_nms_top_n_{mode}": number for when, number in (("pre", 200), ("post", 100))
                     for mode in ("train", "test")}  # fmt: skip
        return FasterRCNN(
            backbone,
            rpn_anchor_generator=anchors,
            rpn_batch_size_per_image=128,
            box_head=TwoMLPHead(64 * 7 * 7, 256),
            box_predictor=FastRCNNPredictor(256, classes),
            box_batch_size_per_image=64,
            box_positive_fraction=0.5,
            box_detections_per_img=50,
            **proposals,
            **sizes,
        )
    backbone = fpn_backbone(model, out_channels=64, extra="pool", out_indices=(1, 2, 3))
    anchors = AnchorGenerator(((16, 22), (30, 40), (54, 72), (96, 128)), (ASPECTS,) * 4)
    # trained from nothing, a head without norms takes several times as long
    head = RetinaNetHead(64, 2 * len(ASPECTS), classes, norm_layer=partial(nn.GroupNorm, 8))
    return RetinaNet(backbone, classes, anchor_generator=anchors, head=head, detections_per_img=50, **sizes)


def tensors(scene: Scene) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an image and its target as torchvision's detectors take them."""
    return image_of(scene), {"boxes": torch.from_numpy(scene.boxes), "labels": torch.from_numpy(scene.labels) + 1}


@torch.inference_mode()
def detect(model: nn.Module, images: list[Tensor], *, batch_size: int) -> list[dict[str, Tensor]]:
    """Return boxes, labels and scores of each image."""
    model.eval()
    return [found for i in range(0, len(images), batch_size) for found in model(images[i : i + batch_size])]


def draw(scenes: list[Scene], found: list[dict[str, Tensor]], path: Path) -> None:
    """Draw what was found in the first scenes: a box with digit and score, red if it is not what is there."""
    figure, axes = plt.subplots(3, 4, figsize=(13, 10), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, scene, guess in zip(axes.flat, scenes, found, strict=False):
        axis.imshow(scene.image)
        for box, label, score in zip(guess["boxes"], guess["labels"], guess["scores"], strict=True):
            if score < 0.5:
                continue
            left, top, right, bottom = box.tolist()
            middle = np.array([left + right, top + bottom]) / 2
            inside = ((scene.boxes[:, :2] <= middle) & (middle <= scene.boxes[:, 2:])).all(1)
            colour = "lime" if (scene.labels[inside] == int(label) - 1).any() else "red"
            axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour))
            text = f"{CLASSES[int(label) - 1]} {score:.0%}"
            patch = {"facecolor": colour, "edgecolor": "none", "pad": 1}
            axis.text(left, max(top - 2, 6), text, fontsize=7, bbox=patch)
    figure.suptitle("Digits found in scenes of held-out digits, with scores over 50% (red: it is another, or none)")
    save_figure(figure, path)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    """Train, measure, draw, save."""
    start = time.monotonic()
    sizes = {"digit_side": (22, 48), "most": 10}
    digits, held_out = Digits(train=True, **sizes), Digits(train=False, **sizes)
    model = detector(args.detector, args.model).to(memory_format=torch.channels_last)
    print(f"{args.detector} on {args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")

    warm_up(model.backbone.body, steps=args.warm_up, lr=args.lr, seed=args.seed)

    def loss_of(step: int) -> Tensor:
        batch = [tensors(digits.scene((args.seed, 0, step, i))) for i in range(args.batch_size)]
        losses = model(*map(list, zip(*batch, strict=True)))
        return sum(losses.values(), start=torch.zeros(()))

    print("training on scenes")
    train(model.train(), loss_of, steps=args.steps, lr=args.lr)
    save(model, args.output)
    scenes = [held_out.scene((12345, i)) for i in range(args.held_out)]
    images, targets = map(list, zip(*map(tensors, scenes), strict=True))
    found = detect(model, images, batch_size=args.batch_size)
    precisions = average_precisions(found, targets)
    score = float(np.mean(list(precisions.values())))
    draw(scenes, found, args.output / "predictions.png")
    single = {CLASSES[label - 1]: value for label, value in precisions.items()}
    report(args, "map50", score, {"average_precision": single}, start=start)


if __name__ == "__main__":
    matplotlib.use("Agg")
    options = arguments(__doc__.partition("\n")[0], steps=250, output="runs/detect_digits")
    options.add_argument("--detector", choices=("faster_rcnn", "retinanet"), default="faster_rcnn", help="kind")
    raise SystemExit(run(main, options))
