"""``glattn train``: train or fine-tune a model on a folder of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from glattn.training.config import NO_DEFAULTS, TrainConfig, help_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; every key of the configuration is one, as key=value."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = help_text()
    parser.add_argument("--config", metavar="FILE", help="a YAML recipe, such as those in configs/ of the repository")
    for name, text in (
        ("data", "folder with train/ and val/, or with one folder a class"),
        ("model", "timm model name"),
        ("run", "run folder"),
        ("epochs", "passes over the training images"),
        ("resume", "auto: go on with the run folder's last good checkpoint"),
    ):
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"{text} (short for {name}=...)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration, listed below")


def resolve(args: argparse.Namespace, defaults: Mapping[str, Any] = NO_DEFAULTS) -> TrainConfig:
    """Return the configuration that the arguments ask for, over other defaults than the usual."""
    names = ("data", "model", "run", "epochs", "resume")
    given = {name: f"{name}={value}" for name in names if (value := getattr(args, name)) is not None}
    for text in args.overrides:
        if (name := text.partition("=")[0]) in given:
            raise ValueError(f"--{name} and {text} both say it; give one of them")
    return TrainConfig.read(args.config, [*given.values(), *args.overrides], defaults)


def run(args: argparse.Namespace, defaults: Mapping[str, Any] = NO_DEFAULTS) -> int:
    """Train."""
    config = resolve(args, defaults)
    if not config.data and not config.dataset:
        raise ValueError("no images given: --data FOLDER, with train/CLASS/*.png and val/CLASS/*.png")
    from torch import distributed

    from glattn.training.loop import train

    try:
        train(config)
    except KeyboardInterrupt:
        print(
            "\nthe same command with --resume auto (and run=FOLDER) goes on from the last checkpoint", file=sys.stderr
        )
        raise
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    return 0
