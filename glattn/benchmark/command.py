"""``glattn benchmark``: models side by side, their speed, memory and cost, as CSV, table and pictures."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from glattn.benchmark.contestant import Case

SWEEP = (224, 320, 448, 640, 768, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from glattn.benchmark.peers import SIZES

    parser.add_argument(
        "models",
        nargs="*",
        help="timm models: names, patterns ('glattn_tiny*'), with options (\"glattn_tiny(layout='full')\")",
    )
    parser.add_argument("--class", dest="size", choices=SIZES, action="append", help="a size of ours and its peers")
    parser.add_argument("--out", default="runs/benchmark", help="folder for rows.csv and pictures (%(default)s)")
    parser.add_argument("--task", nargs="+", choices=("infer", "train"), default=["infer"])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument(
        "--engine", nargs="+", choices=("eager", "graph", "compile"), default=["eager"],
        help="graph: a CUDA graph of the eager calls, of inference",
    )  # fmt: skip
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="images of a step (1 8)")
    parser.add_argument("--pixels", nargs="+", type=int, default=[224], help="side of the images (224)")
    parser.add_argument(
        "--sweep", nargs="*", type=int, metavar="PIXELS",
        help=f"besides, one fp32 image at each of these sides ({' '.join(map(str, SWEEP))})",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="rounds; each runs every model once (%(default)s)")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of a model's turn in a round (%(default)s)")
    parser.add_argument("--minutes", type=float, help="stop when this time is up; --resume goes on")
    parser.add_argument("--baseline", help="model that ratios are to (default: the class's ConvNeXt, or the first)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own)")
    parser.add_argument(
        "--freed-memory", choices=("kept", "returned"), default="kept",
        help="kept for the next step, as in glattn's training, or returned to the system, as a process does by itself"
        " (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--resume", action="store_true", help="keep rows of this commit, measure what is missing")


def choose_models(patterns: Sequence[str], sizes: Sequence[str] | None) -> list[str]:
    """Return names of models: classes first, then what the patterns name.

    Raises:
        ValueError: A pattern names nothing, or nothing is asked for.
    """
    import timm

    import glattn  # noqa: F401 (registers the family)
    from glattn.benchmark.contestant import join_options, split_options
    from glattn.benchmark.peers import SIZES, of_size

    names = [name for size in sizes or () for name in of_size(size)]
    for pattern in patterns:
        name, options = split_options(pattern)
        found = timm.list_models(name) if name else []  # which takes an empty name for all
        if not found or (options and found != [name]):
            raise ValueError(f"no model of timm is named {name!r}; `timm.list_models('*part*')` finds names")
        names += [join_options(name, options)] if options else found
    if not names:
        raise ValueError(f"name models, or a class of them: --class {{{','.join(SIZES)}}}")
    return list(dict.fromkeys(names))


def choose_cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases that are asked for, the sweep's after the others."""
    from glattn.benchmark.contestant import Case

    cases = [
        Case(task, precision, engine, batch, pixels)
        for task in args.task
        for precision in args.precision
        for engine in args.engine
        for batch in args.batch
        for pixels in args.pixels
    ]
    if args.sweep is not None:
        cases += [Case("infer", "fp32", "eager", 1, pixels) for pixels in args.sweep or SWEEP]
    return list(dict.fromkeys(cases))


def run(args: argparse.Namespace) -> int:
    """Measure, print and draw."""
    import os
    import sys

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter, read when torch is imported
    import torch
    from tqdm import tqdm

    from glattn.benchmark import machine, rows
    from glattn.benchmark.figures import draw_scaling, draw_speed
    from glattn.benchmark.session import Session, Settings
    from glattn.files import user_path
    from glattn.memory import keep_freed_memory

    for name in ("rounds", "turn", "minutes", "threads"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}: it must be a number above 0")
    if min([*args.batch, *args.pixels, *(args.sweep or ())]) < 1:
        raise ValueError("--batch, --pixels and --sweep take numbers above 0")
    names = choose_models(args.models, args.size)
    baseline = args.baseline or (f"convnext_{args.size[0]}" if args.size else names[0])
    baseline, *others = choose_models([baseline], None)
    if others:
        raise ValueError(f"--baseline {args.baseline}: names {len(others) + 1} models; give one")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is to be had; give --device cpu")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if "graph" in args.engine and (device.type != "cuda" or "train" in args.task):
        raise ValueError("--engine graph is for inference on a CUDA device; leave it out")
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32
    folder = user_path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to; give another --out")
    path = folder / "rows.csv"
    if path.exists() and not args.resume:
        raise ValueError(f"{path} holds rows already; add to them with --resume, or give another --out")

    about = machine.describe(device, kept=args.freed_memory == "kept" and keep_freed_memory())
    settings = Settings(args.rounds, args.turn, args.minutes, baseline)
    print(
        f"{about['machine']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}, "
        f"timm {about['timm']}, glattn {about['glattn']} {about['commit']}; ratios to {baseline}"
    )
    uncommitted = about["commit"].endswith("-dirty")
    if args.resume and uncommitted:
        print("rows of uncommitted code are measured again")
    cases = choose_cases(args)
    left, measured_any = len(cases), False
    with tqdm(disable=not sys.stderr.isatty(), leave=False, bar_format="{desc} {percentage:3.0f}%|{bar}|") as bar:

        def report(what: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(what)

        session = Session(path, settings, device, about, report, resume=args.resume)
        for case, measured in session.run(names, cases):
            measured_any |= any(not row["error"] for row in measured)
            left -= all(row["error"] or int(row["rounds"]) >= args.rounds for row in measured)
            bar.clear()
            first = next((row for row in measured if not row["error"]), None)
            yardstick = f"; matrix product {float(first['matmul_gmacs_per_second']):.0f} GMAC/s" if first else ""
            print(f"\n{case}{yardstick}\n{rows.table(measured)}", flush=True)
            if any(not row["ratio"] and not row["error"] for row in measured):
                why = session.no_baseline.get(case, "said when this case was measured")
                print(f"no ratios: {baseline} could not be measured: {why}", flush=True)
    drawn = rows.same_place(session.rows, about)  # an earlier call's as well
    pictures = [path for path in (draw_speed(folder, drawn), draw_scaling(folder, drawn)) if path]
    print("\nwritten:", ", ".join(str(p) for p in [path, *pictures]))
    if left:
        then = "commit first: rows of uncommitted code are measured again" if uncommitted else "go on with --resume"
        print(f"time is up: {left} of {len(cases)} cases are left; {then}")
    return int(not left and not measured_any)
