"""Switch one mechanism of a model at a time: accuracy on drawings, speed, one CSV and one picture of both.

    python scripts/ablate.py                  # all of it; a killed run goes on where it was
    python scripts/ablate.py --model "glattn_atto(layout='full')" --data data/paths64 --lr 0.001    # of another default

Accuracy is of run_proxies.py, at one lr and seed unless told otherwise; speed of `glattn benchmark` at 224 pixels,
batch 8, as a multiple of the first design's. The training data must be there: make_icons.py, make_paths.py.
"""

import argparse
import sys
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import run_proxies
import torch
from matplotlib.figure import Figure
from run_proxies import Row

from glattn.benchmark.contestant import join_options, split_options
from glattn.benchmark.machine import describe
from glattn.benchmark.rows import read, same_place
from glattn.cli import main as glattn
from glattn.figures import save_figure
from glattn.memory import keep_freed_memory

WINDOWS = ["window", "window", "window", "full"]
# mechanism: what stands instead of the default; every list has one value a stage
DESIGNS: dict[str, list[dict[str, Any]]] = {
    "default": [{}],
    # the second has about as many parameters as the default of glattn_atto
    "branches": [{"fusion": "local"}, {"fusion": "local", "mlp_ratio": [5.5, 5.5, 5.5, 3.5]}, {"fusion": "global"}],
    "fusion": [{"fusion": "split", "head_dim": 16}, {"fusion": "concat"}, {"fusion": "gated"}],
    "kernels": [{"kernel_sizes": sizes} for sizes in ((3,), (5,), (7,), (3, 7))],
    "gate": [{"local_gate": gate} for gate in ("none", "eca")],
    "convolution": [{"local": "augmented"}, {"local_groups": 4}, {"local_groups": "dense"}],
    "layout": [
        {"layout": ["pooled", "pooled", "full", "full"], "pool_stride": [4, 2, 1, 1]},
        {"layout": "full"},
        {"layout": WINDOWS},
        {"layout": ["window", "shifted", "window", "full"]},
        {"layout": ["window", "grid", "grid", "full"]},
        {"layout": ["overlap", "overlap", "overlap", "full"]},
        {"layout": ["multi_scale", "multi_scale", "multi_scale", "full"], "head_dim": 16},
        {"layout": WINDOWS, "window_sizing": "tokens"},
        {"layout": ["cross_shaped", "cross_shaped", "cross_shaped", "full"], "head_dim": 16},
    ],
    "cross-window": [{"layout": WINDOWS, "cross_window": "strip"}],
    # on whole maps, since the default's have four cells at 64 pixels: beside layout="full", not beside the default
    "position": [
        *({"layout": "full", "position": position} for position in ("none", "bias", "cpb", "rope", "rope_mixed")),
        {"layout": "full", "abs_pos": "stem"},
    ],
    "mechanism": [
        {"layout": "full", "mechanism": mechanism}
        for mechanism in ("relu_linear", "performer", "linformer", "reformer")
    ],
    "context": [{"context": "gc"}],
    "head width": [{"head_dim": 16}],
    "activation": [{"act_layer": act} for act in ("hard_swish", "gelu")],
}
COLUMNS = (
    "mechanism", "design", "parameters", "gmacs", "times_default_speed", "data", "test_top1", "by_seed", "points",
    "low", "high", "verdict", "settings",
)  # fmt: skip


def accuracy(args: argparse.Namespace, models: list[str], asked: list[str]) -> tuple[dict[str, Row], list[str]]:
    """Train the designs that are asked for; return accuracy, and its difference from the first's, of all that are done.

    Each is of the seeds that the design and the first have in common. Designs that failed are returned beside.

    Args:
        models: All designs.
        asked: Those to train, if there is time.
    """
    settings = {"models": asked, "data": args.data, "config": args.config, "lr": [args.lr], "seeds": args.seeds}
    proxies = run_proxies.Proxies(
        SimpleNamespace(**settings, runs=args.runs, out=args.out, end=args.end, settings=args.settings)
    )
    if strange := {row["lr"] for model in models for row in proxies.rows_of(model)} - {repr(args.lr)}:
        raise ValueError(f"{proxies.path} holds runs at lr {', '.join(sorted(strange))}; give another --out")
    proxies.run()
    first, found = proxies.chosen(models[0]), {}
    for model in models:
        runs = proxies.chosen(model)
        if seeds := first.keys() & runs.keys():
            nothing = dict.fromkeys(("points", "low", "high", "verdict"), "")
            difference = proxies.comparison(models[0], model) if model != models[0] else None
            tests = [float(runs[seed]["test_top1"]) for seed in sorted(seeds)]
            found[model] = (difference or nothing) | {
                "test_top1": f"{sum(tests) / len(tests):.2f}",
                "by_seed": " ".join(f"{test:.2f}" for test in tests),
                "settings": proxies.settings,
            }
    return found, proxies.failed


def speed(args: argparse.Namespace, models: list[str]) -> dict[str, Row]:
    """Return each design's row of a benchmark here, at 224 pixels, batch 8; rows of this commit are not made again.

    Raises:
        ValueError: A design could not be measured.
    """
    folder = args.out / "speed"
    command = ["benchmark", *models, "--batch", "8", "--rounds", str(args.rounds), "--baseline", models[0]]
    if status := glattn([*command, "--out", str(folder), "--resume"]):
        raise SystemExit(status)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = same_place(read(folder / "rows.csv"), describe(device, kept=keep_freed_memory()))  # as the command did
    if failed := next((row for row in measured if row["model"] in models and row["error"]), None):
        raise ValueError(f"{failed['model']} has no speed: {failed['error']}")
    return {row["model"]: row for row in measured}


def draw(rows: list[Row], path: Path) -> None:
    """Draw a line a design, by mechanism: points of accuracy above the first, with the interval, and speed.

    Points are of the seeds that both have; how far the first's own are apart is grey.
    """
    (first, *rows), data = rows, rows[0]["data"]
    figure = Figure(figsize=(12, 1.5 + 0.24 * len(rows)), layout="constrained")
    accuracy_axes, speed_axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    kinds = list(DESIGNS)
    for y, row in enumerate(rows):
        points, low, high = (float(row[key]) for key in ("points", "low", "high"))
        colour = f"C{kinds.index(row['mechanism']) % 10}"
        accuracy_axes.errorbar(points, y, xerr=[[points - low], [high - points]], marker="o", color=colour)
        speed = float(row["times_default_speed"])
        speed_axes.barh(y, speed - 1, left=1, color=colour)
    names = (row["design"].partition("(")[2].removesuffix(")").replace("'", "") for row in rows)
    accuracy_axes.set_yticks(range(len(rows)), names, fontsize=8)
    accuracy_axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    seeds = [float(top1) for top1 in first["by_seed"].split()]
    apart = max(seeds) - min(seeds)
    accuracy_axes.axvspan(-apart, apart, color="#475569", alpha=0.12, linewidth=0)
    accuracy_axes.axvline(0, color="#475569", linewidth=1)
    accuracy_axes.set_xlabel(
        f"points of top-1 on {data} above {first['design']}\n"
        f"of the same seeds; 95% interval of resampled tests\ngrey: as far as its own seeds are apart, {apart:.1f}"
    )
    speed_axes.axvline(1, color="#475569", linewidth=1)
    speed_axes.set_xlabel(f"images a second, as multiples of\n{first['design']}'s\n224 pixels, batch 8")
    for axes in (accuracy_axes, speed_axes):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> int:
    """Train, time, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes of the recipe, for all designs alike")
    parser.add_argument(
        "--model", default="glattn_atto", help="whose mechanisms are switched (%(default)s), or NAME(OPTION=VALUE)"
    )
    parser.add_argument("--only", nargs="+", choices=list(DESIGNS)[1:], help="mechanisms to train (default: all)")
    parser.add_argument("--data", type=Path, default=Path("data/icons100"), help="folder with train, val, test")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rounds", type=int, default=7, help="of the benchmark (%(default)s)")
    run_proxies.add_list_arguments(parser, runs="runs/ablation", out="docs/results/ablation")
    args = parser.parse_args()
    kinds, data = list(DESIGNS), args.data.resolve().name
    # the first of each mechanism, then the second: a short run says something of all
    turns = zip_longest(*([(options, kind) for options in DESIGNS[kind]] for kind in kinds))
    try:
        name, own = split_options(args.model)
        designs: dict[str, str] = {}
        for options, kind in (design for turn in turns for design in turn if design):
            designs.setdefault(join_options(name, own | options), kind)  # what the model has anyway is no change
        asked = [design for design, kind in designs.items() if kind in ("default", *(args.only or kinds))]
        accuracies, failed = accuracy(args, list(designs), asked)
        designs = {design: kind for design, kind in designs.items() if design in accuracies}
        speeds = speed(args, list(designs)) if designs else {}
    except (ValueError, OSError) as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 1
    rows = []
    for design, kind in sorted(designs.items(), key=lambda item: kinds.index(item[1])):
        found, timed = accuracies[design], speeds[design]
        # run_proxies.py has the default less the design
        turned = {"points": found["points"], "low": found["high"], "high": found["low"]}
        rows.append(
            {"mechanism": kind, "design": design, "parameters": timed["params_m"], "gmacs": timed["gmacs"]}
            | {"times_default_speed": timed["ratio"], "data": data}
            | {key: f"{0 - float(value):.2f}" if value else "" for key, value in turned.items()}
            | {"verdict": {"better": "worse", "worse": "better"}.get(found["verdict"], found["verdict"])}
            | {key: found[key] for key in ("test_top1", "by_seed", "settings")}
        )
    if not rows:
        print("no design is done yet")
        return int(bool(failed))
    run_proxies.write_csv(args.out / f"{data}.csv", COLUMNS, rows)
    if len(rows) > 1:
        draw(rows, args.out / f"{data}.png")
    for row in rows:
        print(f"{row['design']:90} {row['test_top1']:>6} {row['points']:>6} {row['times_default_speed']:>6}x")
    return int(bool(failed))


if __name__ == "__main__":
    run_proxies.end_with_children()
    sys.exit(main())
