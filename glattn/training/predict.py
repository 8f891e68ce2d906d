"""``glattn predict``: what a checkpoint sees in images, and what it looked at."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glattn.files import user_path
from glattn.memory import keep_freed_memory

if TYPE_CHECKING:
    from glattn.training.classifier import Classifier

MODEL_HELP = "run folder (its best), local-dir:FOLDER, hf-hub:ORG/NAME, a timm model's name, or a file of weights"
CROP_MODES = ("center", "squash", "border")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_input_arguments(parser)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes shown (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of text")
    parser.add_argument(
        "--draw", metavar="OUT.png", help="draw where the global branch looked and what the local branch answered to"
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where a model's weights come from, if not from where it does, and what it is given."""
    parser.add_argument("--checkpoint", metavar="FILE", help="file of weights, of the timm model that is named")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the images (default: the checkpoint's)")
    parser.add_argument(
        "--crop-pct", type=float, metavar="SHARE", help="share of the resized side that is seen (the checkpoint's)"
    )
    parser.add_argument("--crop-mode", choices=CROP_MODES, help="how images become square (the checkpoint's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (an accelerator if there is one)")


def open_classifier(args: argparse.Namespace) -> Classifier:
    """Open the checkpoint that the arguments ask for, on their device; a process on the CPU keeps freed memory then."""
    from glattn.training.classifier import open_checkpoint
    from glattn.training.config import LARGEST_SIDE

    if args.size is not None and not 1 <= args.size <= LARGEST_SIDE:
        raise ValueError(f"--size {args.size}: 1 to {LARGEST_SIDE} pixels")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise ValueError(f"--crop-pct {args.crop_pct}: more than 0, and 1 at most")
    device = choose_device(args.device)
    if args.checkpoint is not None and not user_path(args.checkpoint).is_file():
        raise FileNotFoundError(f"--checkpoint {args.checkpoint}: no such file")
    try:
        classifier = open_checkpoint(
            args.checkpoint or args.model,
            model_name=args.model if args.checkpoint else None,
            size=args.size,
            crop_pct=args.crop_pct,
            crop_mode=args.crop_mode,
        )
    except ValueError as error:  # weights of another model: torch names every tensor
        raise ValueError(textwrap.shorten(str(error), 400, placeholder=" ...")) from None
    classifier.model.to(device)
    if device.type == "cpu":
        keep_freed_memory()
    return classifier


def run(args: argparse.Namespace) -> int:
    """Predict, print, and draw if asked; 1 if an image could not be read."""
    if args.top < 1:
        raise ValueError(f"--top {args.top}: at least 1")
    paths = [user_path(name) for name in args.images]
    for path in paths:
        if not path.is_file():
            what = "a folder; give image files" if path.is_dir() else "no such image"
            raise FileNotFoundError(f"{path}: {what}")
    picture = user_path(args.draw) if args.draw else None
    if picture is not None:
        check_picture(picture, len(paths))

    from timm.data import create_transform

    from glattn.training.images import BadImageError, read_image

    classifier = open_classifier(args)
    transform: Any = create_transform(**classifier.data_config)
    seen = []
    for path in paths:
        try:
            image = transform(read_image(path))[None]
        except BadImageError as error:
            print(f"glattn predict: {path}: cannot be read as an image: {error}", file=sys.stderr)
            continue
        best = classify(classifier.model, image, args.top)
        named = [(classifier.descriptions[index], share) for index, share in best]
        if args.json:
            rows = [
                {"class": index, "name": name, "probability": share}
                for (index, share), (name, _) in zip(best, named, strict=True)
            ]
            print(json.dumps({"image": str(path), "top": rows}, ensure_ascii=False))
        else:
            print(path, *(f"  {100 * share:6.2f}%  {name}" for name, share in named), sep="\n")
        seen.append((f"{path.name}\n{named[0][0]}, {100 * named[0][1]:.1f}%", image))
    if picture is not None and seen:
        draw_seen(picture, classifier, seen)
        if not args.json:
            print(f"drawn: {picture}")
    return 0 if len(seen) == len(paths) else 1


def classify(model: Any, image: Any, top: int) -> list[tuple[int, float]]:
    """Return the likeliest classes of one image ``(1, 3, H, W)`` and their probabilities, likeliest first.

    Raises:
        ValueError: They are no numbers.
    """
    import torch

    with torch.inference_mode():
        probabilities = model(image.to(next(model.parameters()).device))[0].float().softmax(0).cpu()
    if not probabilities.isfinite().all():
        raise ValueError("the model's outputs are no finite numbers: its training has diverged")
    values, indices = probabilities.topk(min(top, len(probabilities)))
    return list(zip(indices.tolist(), values.tolist(), strict=True))


def draw_seen(path: Path, classifier: Classifier, seen: list[tuple[str, Any]]) -> None:
    """Draw what the model's branches made of (caption, image) pairs."""
    from glattn.training.explain import draw, explain

    device = next(classifier.model.parameters()).device
    draw(
        path,
        [
            (caption, _as_seen(image[0], classifier.data_config), explain(classifier.model, image.to(device)))
            for caption, image in seen
        ],
    )


def check_picture(path: Path, images: int) -> None:
    """Refuse, before any work, a picture that could not be written or not be looked at."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--draw {path}: a .png is written; name it so")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--draw {path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}")
    if images > 16:
        raise ValueError(f"--draw draws at most 16 images in one picture, not {images}")


def choose_device(name: str) -> Any:
    """Return a torch device by name; auto is an accelerator if there is one."""
    import torch

    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def _as_seen(image: Any, data_config: dict[str, Any]) -> Any:
    """Return a normalised image ``(3, H, W)`` as ``(H, W, 3)`` in 0..1."""
    mean, std = (image.new_tensor(data_config[key])[:, None, None] for key in ("mean", "std"))
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
