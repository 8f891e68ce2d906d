"""``glattn list``: the family, with what each member costs and which weights there are."""

from __future__ import annotations

import argparse
import fnmatch
from dataclasses import dataclass
from typing import Any

ROW = "{:<24} {:>9} {:>7} {:>5}  {}"


@dataclass(frozen=True)
class Member:
    """One line of the list.

    Args:
        name: The model's name.
        params: Parameters.
        macs: Multiply-adds of one image of the default size, attention's among them.
        size: Default image size: height and width in pixels.
        weights: Tags of weights that ``pretrained=True`` can load, the one that it does without a tag first.
    """

    name: str
    params: int
    macs: int
    size: tuple[int, int]
    weights: tuple[str, ...]


def describe(name: str, **options: Any) -> Member:
    """Return what a model of timm's registry, with options, costs, counted on the meta device: nothing is computed."""
    import timm
    import torch
    from timm.data.config import resolve_model_data_config

    from glattn.benchmark.cost import count_macs

    with torch.device("meta"):
        model = timm.create_model(name, **options).eval()
    channels, height, width = resolve_model_data_config(model)["input_size"]
    tags = [tag.partition(".")[2] for tag in timm.list_models(f"{name}.*", pretrained=True, include_tags=True)]
    default = timm.get_pretrained_cfg(name)
    return Member(
        name=name,
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=count_macs(model, (1, channels, height, width)),
        size=(height, width),
        weights=tuple(sorted(tags, key=lambda tag: default is None or tag != default.tag)),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("pattern", nargs="?", default="*", help="names to show, such as 'glattn_tiny*'")


def run(args: argparse.Namespace) -> int:
    """Print one line a model, smallest first."""
    import timm

    names = fnmatch.filter(timm.list_models(module="glattn"), args.pattern)
    if not names:
        known = ", ".join(timm.list_models(module="glattn"))
        raise ValueError(f"no model of the family is named {args.pattern!r}; there are {known}")
    print(ROW.format("name", "params, M", "GMACs", "size", "weights"))
    for member in sorted(map(describe, names), key=lambda member: member.macs):
        height, width = member.size
        size = f"{height}" if height == width else f"{height}x{width}"
        millions, giga = f"{member.params / 1e6:.2f}", f"{member.macs / 1e9:.2f}"
        print(ROW.format(member.name, millions, giga, size, " ".join(member.weights) or "-"))
    return 0
