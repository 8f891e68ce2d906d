"""What the examples share in how they run: a thrifty training loop, whole files, and mistakes on one line."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digit_scenes import CLASSES, Digits, Scene
from torch import Tensor, nn

from glattn.files import replacing, write_text


def arguments(description: str, *, steps: int, output: str, warm_up: int = 500) -> argparse.ArgumentParser:
    """Return the parser of the options that all examples have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="glattn_atto", help="backbone, by timm's name")
    parser.add_argument("--steps", type=int, default=steps, help="steps of training")
    parser.add_argument(
        "--warm-up", type=int, default=warm_up, help="steps before on single digits, of the backbone alone"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="scenes a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--held-out", type=int, default=200, help="scenes of held-out digits to measure on")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder for model.pt, scores and pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and scenes")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model: does it run at all?")
    return parser


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> int:
    """Run an example; a mistake of the user's is one line on standard error and status 1."""
    args = parser.parse_args()
    if args.quick:
        args.model, args.warm_up, args.steps, args.batch_size, args.held_out = "test_glattn", 1, 3, 2, 4
    try:
        for name in ("warm_up", "steps", "batch_size", "held_out"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 1 or more")
        torch.manual_seed(args.seed)
        main(args)
    except (ValueError, OSError, RuntimeError) as error:
        # timm says of an unknown name that it is a RuntimeError
        if isinstance(error, RuntimeError) and not str(error).startswith("Unknown model"):
            raise
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    return 0


def train(model: nn.Module, loss_of: Callable[[int], Tensor], *, steps: int, lr: float) -> None:
    """Minimise the loss of each step with AdamW and one cycle of the rate; say how it goes.

    Args:
        model: The model, whose parameters are trained.
        loss_of: From the number of a step to its loss.
        steps: Steps.
        lr: Highest learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.15)
    start, mean = time.monotonic(), None
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            seconds = time.monotonic() - start
            left = seconds / (step + 1) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  loss {mean:.3f}  {seconds:.0f} s, {left:.0f} s left", flush=True)


def image_of(scene: Scene) -> Tensor:
    """Return a scene's image, ``(3, H, W)``, as all models of the examples take it."""
    return (torch.from_numpy(scene.image).permute(2, 0, 1) / 255 - 0.45) / 0.25


def warm_up(body: nn.Module, *, steps: int, lr: float, seed: int, batch_size: int = 32) -> None:
    """Teach a backbone which digit is which, one an image: it stands in for pretrained weights.

    Args:
        body: A timm model made with ``features_only=True``.
        steps: Steps.
        lr: Highest learning rate.
        seed: Seed of the images.
        batch_size: Images a step.
    """
    digits = Digits(train=True, digit_side=(24, 53), image_side=(64, 64), most=1)
    classifier = nn.Linear(body.feature_info.channels()[-1], len(CLASSES))

    def loss_of(step: int) -> Tensor:
        scenes = [digits.scene((seed, 1, step, i)) for i in range(batch_size)]
        images = torch.stack([image_of(scene) for scene in scenes]).contiguous(memory_format=torch.channels_last)
        labels = torch.tensor([int(scene.labels[0]) for scene in scenes])
        return F.cross_entropy(classifier(body(images)[-1].mean((2, 3))), labels)

    print("warm-up on single digits")
    train(nn.ModuleList((body, classifier)).train(), loss_of, steps=steps, lr=lr)


def save(model: nn.Module, output: Path) -> None:
    """Write a model's weights to the run's folder."""
    with replacing(output / "model.pt") as temporary:
        torch.save(model.state_dict(), temporary)


def report(args: argparse.Namespace, what: str, score: float, scores: dict[str, Any], *, start: float) -> None:
    """Write scores.json and say the score that counts.

    Args:
        args: The example's arguments.
        what: The score's name.
        score: The score.
        scores: Scores of single classes.
        start: When the run began, by ``time.monotonic``.
    """
    minutes = (time.monotonic() - start) / 60
    result = {what: score, **scores, "scenes": args.held_out, "minutes": round(minutes, 2)}
    write_text(args.output / "scores.json", json.dumps(result, indent=2) + "\n")
    print(f"{what} {score:.3f} on {args.held_out} scenes of held-out digits; {minutes:.1f} minutes")
    print(f"{args.output}: model.pt, scores.json, predictions.png")
