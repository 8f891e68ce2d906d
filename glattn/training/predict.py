"""``glattn predict``: what a checkpoint sees in images, and what it looked at."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_checkpoint_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes shown (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of text")
    parser.add_argument(
        "--explain", metavar="OUT.png", help="draw where the global branch looked and what the local one answered to"
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what a checkpoint and its input need."""
    parser.add_argument(
        "checkpoint",
        help="run folder (its best), folder with config.json, file of weights, hf-hub:ORG/NAME, or a timm model's name",
    )
    parser.add_argument("--model", metavar="NAME", help="the model of a file that has no config.json beside it")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the images (the checkpoint's own)")
    parser.add_argument("--crop-pct", type=float, metavar="SHARE", help="share of the resized side seen (its own)")
    parser.add_argument(
        "--crop-mode", choices=("center", "squash", "border"), help="how images become square (its own)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (an accelerator if there is one)")


def check_checkpoint_arguments(args: argparse.Namespace) -> None:
    """Refuse sizes and shares that cannot be."""
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size {args.size}: at least 1 pixel")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise ValueError(f"--crop-pct {args.crop_pct}: more than 0, and 1 at most")


def run(args: argparse.Namespace) -> int:
    """Predict, print, and draw if asked."""
    check_checkpoint_arguments(args)
    if args.top < 1:
        raise ValueError(f"--top {args.top}: at least 1")
    paths = [Path(name).expanduser() for name in args.images]
    for path in paths:
        if not path.is_file():
            what = "a folder; give image files" if path.is_dir() else "no such image"
            raise FileNotFoundError(f"{path}: {what}")
    explained = Path(args.explain).expanduser() if args.explain else None
    if explained is not None:
        check_picture(explained, len(paths))

    import torch
    from timm.data import create_transform

    from glattn.training.classifier import open_checkpoint
    from glattn.training.images import BadImageError, read_image

    device = choose_device(args.device)
    classifier = open_checkpoint(
        args.checkpoint, model_name=args.model, size=args.size, crop_pct=args.crop_pct, crop_mode=args.crop_mode
    )
    model = classifier.model.to(device)
    transform: Any = create_transform(**classifier.data_config)
    drawn = []
    for path in paths:
        try:
            image = transform(read_image(path))[None].to(device)
        except BadImageError as error:
            raise ValueError(f"{path}: cannot be read as an image: {error}") from None
        with torch.inference_mode():
            probabilities = model(image)[0].float().softmax(0).cpu()
        values, indices = probabilities.topk(min(args.top, len(probabilities)))
        found = list(zip(indices.tolist(), values.tolist(), strict=True))
        names = [classifier.descriptions[index] for index, _ in found]
        if args.json:
            rows = [
                {"class": index, "name": name, "probability": value}
                for (index, value), name in zip(found, names, strict=True)
            ]
            print(json.dumps({"image": str(path), "top": rows}, ensure_ascii=False))
        else:
            print(path)
            for (_, value), name in zip(found, names, strict=True):
                print(f"  {100 * value:6.2f}%  {name}")
        if explained is not None:
            from glattn.training.explain import explain

            shown = _as_seen(image[0].cpu(), classifier.data_config)
            drawn.append((f"{path.name}\n{names[0]}, {100 * found[0][1]:.1f}%", shown, explain(model, image)))
    if explained is not None:
        from glattn.training.explain import draw

        draw(explained, drawn)
        if not args.json:
            print(f"drawn: {explained}")
    return 0


def check_picture(path: Path, images: int) -> None:
    """Refuse, before any work, a picture that could not be written or not be looked at."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"--explain {path}: a .png is written; name it so")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--explain {path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}")
    if images > 16:
        raise ValueError(f"--explain draws at most 16 images in one picture, not {images}")


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
