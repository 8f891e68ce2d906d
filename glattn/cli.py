"""The ``glattn`` command: one row a subcommand, each imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import textwrap
from collections.abc import Sequence

# subcommand -> (module with `add_arguments(parser)` and `run(args) -> int`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("glattn.training.command", "Train or fine-tune a model on a folder of images."),
    "pretrain": ("glattn.training.pretrain", "Train a model on pictures made by formula, drawn on the fly."),
    "check-data": ("glattn.training.check", "Find what is wrong with a folder of images."),
    "predict": ("glattn.training.predict", "Name what is in images, and draw what the model looked at."),
    "validate": ("glattn.training.validate", "Measure a checkpoint on a folder of images: accuracy, loss, ECE, speed."),
    "list": ("glattn.listing", "List the family: parameters, GMACs, size and weights."),
    "export": ("glattn.export", "Export a model as ONNX, torch.export or OpenVINO, checked on the spot."),
    "benchmark": ("glattn.benchmark.command", "Measure models side by side: speed, memory, cost, scaling."),
    "push": ("glattn.hub.command", "Publish a trained model on the Hugging Face Hub."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0 done, 1 the user's input or data is at fault, 130 interrupted.

    A ``ValueError`` or ``OSError`` that a command raises, and memory that does not suffice, are one line on standard
    error; anything else is a defect of ours and keeps its traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by some daemons
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="glattn", description="Global-local attention backbones for timm.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name in arguments[:1]:
            importlib.import_module(module).add_arguments(subparser)
    args, rest = parser.parse_known_args(arguments)
    if hasattr(args, "overrides") and not any(text.startswith("-") or "=" not in text for text in rest):
        args.overrides += rest  # argparse takes key=value of one place only: before, between or after the options
    elif rest:
        hint = "; a key of the configuration is written key=value" if hasattr(args, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every file's name can be encoded
    try:
        status: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
    except (ValueError, OSError) as error:
        print(f"glattn {args.command}: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        advice = "out of memory; give fewer images at a time, smaller ones or a smaller model."
        said = textwrap.shorten(f"{advice} {error}", 240, placeholder=" ...")
        print(f"glattn {args.command}: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"glattn {args.command}: interrupted", file=sys.stderr)
        return 130
    return status


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether Python, torch on the CPU or an accelerator's allocator found no memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported for this
        or "can't allocate memory" in str(error)
    )
