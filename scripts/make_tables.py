"""Write what is generated: the tables of README.md and docs/results.md, and the cards of the package's weights.

README.md's are counted from the models, the others' read from docs/results/; cards from the records in docs/weights/.
"""

import argparse
import csv
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import make_paths
import timm
from make_weights import chain
from run_proxies import digest_of, unpack
from transfer import PER_EPOCH, TASKS, start_digest

from glattn.benchmark.contestant import split_options
from glattn.benchmark.rows import places
from glattn.files import write_text
from glattn.hub.card import model_card, read_record
from glattn.hub.local_dir import save_config
from glattn.listing import describe
from glattn.models.variants import VARIANTS
from glattn.models.weights import HUB
from glattn.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
# folders of speed that docs/results.md shows: sizes beside their peers, by processor
CLASSES = ("atto", "pico", "nano", "tiny", "small")
PROCESSORS = {"": "AMD Zen 5", "zen4-": "AMD Zen 4", "intel-": "Intel"}
PEERED = tuple(f"{kind}{size}" for kind in PROCESSORS for size in CLASSES)
# folders of run_proxies.py's runs, the size that is compared there, and the folder of the speeds beside it
DRAWINGS = {
    "icons100": ("atto", "speed-atto"),
    "emoji": ("atto", "speed-atto"),
    "icons100-others": ("atto", "speed-others"),
    "emoji-others": ("atto", "speed-others"),
    "emoji-pico": ("pico", "speed-pico"),
    "emoji-nano": ("nano", "speed-nano"),
    "icons100-tiny": ("tiny", "speed-tiny"),
    "emoji-tiny": ("tiny", "speed-tiny"),
}
CASES = ("infer 1", "infer 8", "train 8")  # of a benchmark, that tables of designs show
CONVNEXT = (*CLASSES, "base", "large")
GAINS = {  # by name: where the weights' gain is measured
    "glattn_atto.fractal1k_64": "transfer",
    "glattn_atto.fractal1k_ft_contour1k_64": "transfer-contours",
    "glattn_pico.fractal1k_64": "transfer-pico",
    "glattn_pico.fractal1k_ft_contour1k_64": "transfer-pico",
}


def count(name: str) -> tuple[float, float]:
    """Return millions of parameters and GMACs at the default size, attention counted, of a 1000-class model."""
    model, options = split_options(name)
    member = describe(model, **options)
    return member.params / 1e6, member.macs / 1e9


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def difference(row: dict[str, str]) -> list[str]:
    """Return points gained or lost, their interval, and the verdict; blanks where nothing was compared."""
    if not row.get("points"):
        return [""] * 3
    points, low, high = (f"{float(row[key]):+.1f}" for key in ("points", "low", "high"))
    return [points, f"{low} to {high}", row["verdict"]]


def top1_by_seed(runs: Sequence[dict[str, str]]) -> str:
    """Return some runs' accuracies on the test."""
    return ", ".join(f"{float(run['test_top1']):.1f}" for run in runs)


def mean_top1(runs: Sequence[dict[str, str]]) -> str:
    """Return the mean of some runs' accuracies on the test."""
    return f"{sum(float(run['test_top1']) for run in runs) / len(runs):.1f}"


def in_place() -> str:
    """Return atto's runs before and since its pooled maps lie over the cells that they pool, seed by seed."""
    arms = [(task, "glattn_atto", "scratch") for task in ("icons100", "emoji")]
    arms += [(f"transfer/{task}", "glattn_atto.fractal1k_64:pretrained", "pretrained") for task in TASKS]
    rows = []
    for folder, model, start in arms:
        path = f"in-place/{folder}"
        if not (ROOT / "docs" / "results" / path / "runs.csv").exists():
            continue
        since = [row for row in read(f"{path}/runs.csv") if row["model"] == model]
        same = {(row["lr"], row["seed"]) for row in since}
        before = [
            row for row in read(f"{folder}/runs.csv") if row["model"] == model and (row["lr"], row["seed"]) in same
        ]
        rows.append([Path(folder).name, start, since[0]["lr"], top1_by_seed(before), top1_by_seed(since)])
    return markdown(("task", "start", "lr", "before, by seed", "since, by seed"), rows)


def sizes() -> str:
    """Return each size's cost beside the ConvNeXt of its name, and its speed as a multiple of that one's.

    Raises:
        ValueError: A speed is of another design than the size has now.
    """
    measured = {kind: [row for size in CONVNEXT for row in read(f"speed-{kind}{size}/rows.csv")] for kind in PROCESSORS}
    speeds = [ratios(of_kind) for of_kind in measured.values()]
    rows = []
    for size in CONVNEXT:
        (mine, macs), (theirs, their_macs) = count(f"glattn_{size}"), count(f"convnext_{size}")
        for kind, of_kind in measured.items():
            mine_there = [float(row["params_m"]) for row in of_kind if row["model"] == f"glattn_{size}"]
            if any(abs(millions - mine) > 0.01 * mine for millions in mine_there):
                raise ValueError(
                    f"docs/results/speed-{kind}{size}/rows.csv is of another glattn_{size}: measure it again"
                )
        faster = [of_kind.get((f"glattn_{size}", case), "") for of_kind in speeds for case in CASES[:2]]
        rows.append([f"`glattn_{size}`", f"{mine:.1f}", f"{macs:.2f}", f"{theirs:.1f}, {their_macs:.2f}", *faster])
    head = ["model", "parameters (M)", "GMACs at 224", "ConvNeXt of that name (M, GMACs)"]
    head += [f"{processor}, batch {batch}" for processor in PROCESSORS.values() for batch in (1, 8)]
    return markdown(head, rows) + place(row for of_kind in measured.values() for row in of_kind)


def variants() -> str:
    rows = []
    for name in timm.list_models("glattn_*_*", module="glattn"):
        parameters, macs = count(name)
        rows.append([f"`{name}`", f"{parameters:.1f}", f"{macs:.2f}"])
    return markdown(["model", "parameters (M)", "GMACs at 224"], rows)


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a file in docs/results/."""
    with (ROOT / "docs" / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def place(rows: Iterable[dict[str, str]]) -> str:
    """Return the machines and the torch that rows were measured on, a line to stand below their table."""
    measured = list(rows)
    torches = dict.fromkeys(row["torch"].partition("+")[0] for row in measured)
    return f"\n\nOn {places(measured)}; torch {' and '.join(torches)}."


def speed(*sizes: str) -> str:
    """Return how fast some sizes and their peers are, as multiples of the ConvNeXt of that name."""
    measured = [row for size in sizes for row in read(f"speed-{size}/rows.csv")]
    found = by_model((row for row in measured if row["engine"] == "eager"), "task", "batch")
    head = ("model", "parameters (M)", "GMACs", "batch 1", "batch 8", "share, batch 8", "training, batch 8",
            "published top-1")  # fmt: skip
    rows = []
    columns = (("infer 8", "params_m", ".1f"), ("infer 8", "gmacs", ".2f"), ("infer 1", "ratio", ".2f"),
               ("infer 8", "ratio", ".2f"), ("infer 8", "share_of_matmul", ".0%"),
               ("train 8", "ratio", ".2f"))  # fmt: skip
    for name, cases in sorted(found.items(), key=lambda item: -float(item[1]["infer 8"]["ratio"] or 0)):
        rows.append([*measured_cells(name, cases, columns), published(cases["infer 8"])])
    shown = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return markdown([head[i] for i in shown], [[row[i] for i in shown] for row in rows]) + place(measured)


def published(row: dict[str, str]) -> str:
    """Return the top-1 that was published for a benchmark's model, with its image size where that is not 224."""
    top1, pixels = row["published_top1"], row["published_pixels"]
    return f"{float(top1):.1f}" + (f" at {pixels}" if pixels != "224" else "") if top1 else ""


def gpu(size: str) -> str:
    """Return how fast a size and its peers are on a GPU, eager and as a CUDA graph, and their memory at most."""
    measured = read(f"speed-gpu-{size}/rows.csv")
    found = by_model(measured, "engine", "batch")
    largest = f"eager {max(int(row['batch']) for row in measured)}"
    cases = [f"{engine} {batch}" for engine in ("graph", "eager") for batch in (1, 8)]
    head = ["model", "parameters (M)", "GMACs", *cases, largest, "share there", "MB there"]
    rows = []
    columns = [(largest, "params_m", ".1f"), (largest, "gmacs", ".2f")]
    columns += [(case, "ratio", ".2f") for case in (*cases, largest)]
    columns += [(largest, "share_of_matmul", ".1%"), (largest, "peak_mb", ".0f")]
    for name, of_model in sorted(found.items(), key=lambda item: -float(item[1].get(largest, {}).get("ratio") or 0)):
        rows.append(measured_cells(name, of_model, columns))
    return markdown(head, rows) + place(measured)


def by_model(rows: Iterable[dict[str, str]], *fields: str) -> dict[str, dict[str, dict[str, str]]]:
    """Return a benchmark's rows by model, and by what some fields say, a space between."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["model"], {})[" ".join(row[field] for field in fields)] = row
    return found


def measured_cells(name: str, cases: dict[str, dict[str, str]], columns: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return a model's name, ours in bold, and (case, field, format) of its rows; blank where that is not there."""
    bold = "**" if name.startswith("glattn") else ""
    values = [(cases.get(case, {}).get(field), form) for case, field, form in columns]
    return [f"{bold}`{name}`{bold}", *(format(float(value), form) if value else "" for value, form in values)]


def ratios(rows: Iterable[dict[str, str]]) -> dict[tuple[str, str], str]:
    """Return a benchmark's speeds as multiples of its baseline's, by model and case, but of what failed."""
    found = ((row["model"], f"{row['task']} {row['batch']}", row["ratio"]) for row in rows)
    return {(name, case): f"{float(ratio):.2f}" for name, case, ratio in found if ratio}


def returned() -> str:
    """Return speeds as multiples of each class's ConvNeXt where processes keep freed memory and where they do not."""
    rows, measured = [], []
    kinds = [(batch, freed) for batch in (1, 8) for freed in ("kept", "returned")]
    columns = [(f"infer {batch} {freed}", "ratio", ".2f") for batch, freed in kinds]
    for size in CLASSES:
        both = [row for kind in ("intel", "returned") for row in read(f"speed-{kind}-{size}/rows.csv")]
        measured += both
        for name, cases in by_model(both, "task", "batch", "freed_memory").items():
            if name != f"convnext_{size}" and columns[1][0] in cases:  # some were measured with memory kept alone
                rows.append([size, *measured_cells(name, cases, columns)])
    head = [f"batch {batch}, {freed}" for batch, freed in kinds]
    return markdown(["class", "model", *head], rows) + place(measured)


def modes(folder: str) -> str:
    """Return what compilation and bfloat16 gain each model over its own eager fp32, images a second."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    measured = read(f"{folder}/rows.csv")
    for row in measured:
        rate = float(row["images_per_second"] or "nan")
        found.setdefault((row["model"], row["batch"]), {})[f"{row['precision']} {row['engine']}"] = rate
    kinds = list(next(iter(found.values())))
    rows = []
    for (name, batch), rates in found.items():
        rows.append([f"`{name}`", batch, *(f"{rates[kind] / rates[kinds[0]]:.2f}" for kind in kinds[1:])])
    return markdown(["model", "batch", *kinds[1:]], rows) + place(measured)


def scaling() -> str:
    """Return time and peak memory a pixel, weights left out, as multiples of those at 224."""
    measured = read("scaling/rows.csv")
    found = by_model(measured, "pixels")
    sides = sorted(map(int, next(iter(found.values()))))
    head = [f"{what} at {side}" for what in ("time", "memory") for side in sides[1:]]
    rows = []

    def activations(row: dict[str, str]) -> float:
        return float(row["peak_mb"]) - float(row["held_mb"])

    for name, cases in found.items():
        cells = []
        for cost in (lambda row: float(row["milliseconds"]), activations):
            least, *others = (cost(cases[str(side)]) / side**2 for side in sides)
            cells += [f"{other / least:.2f}" for other in others]
        rows.append([f"`{name}`", *cells])
    return markdown(["model", *head], rows) + place(measured)


def choice() -> str:
    """Return both designs' speed as multiples of ConvNeXt's, from a run when the first was the default."""
    found: dict[tuple[str, str], list[str]] = {}
    measured = read("default/rows.csv")
    for row in measured:
        if row["model"].startswith("glattn"):
            found.setdefault((row["model"].partition("(")[0], row["batch"]), []).append(f"{float(row['ratio']):.2f}")
    head = ("model", "batch", "full attention at stride 16", "pooled by two there")
    table = markdown(head, [[f"`{name}`", batch, *cells] for (name, batch), cells in found.items()])
    return table + place(measured)


def widths() -> str:
    """Return what fewer and wider blocks do: speed as a multiple of the ConvNeXt's of that size, accuracy on icons."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    measured = read("widths/rows.csv")
    for row in measured:
        found.setdefault(row["model"], {})[row["batch"]] = row
    accuracies: dict[str, list[dict[str, str]]] = {}
    for row in read("widths/icons100.csv"):
        accuracies.setdefault(row["model"].translate(str.maketrans("[]", "()")), []).append(row)
    head = ("size", "widths", "depths", "parameters (M)", "GMACs", "batch 1", "batch 8", "icons100, by seed")
    rows = []
    for name, batches in found.items():
        model, options = split_options(name)
        if options:
            size = model.removeprefix("glattn_")
            cells = [size, *(_dashed(options[key]) for key in ("dims", "depths"))]
            cells += [f"{float(batches['8']['params_m']):.1f}", f"{float(batches['8']['gmacs']):.2f}"]
            for batch, row in batches.items():
                base = float(found[f"convnext_{size}"][batch]["images_per_second"])
                cells.append(f"{float(row['images_per_second']) / base:.2f}")
            cells.append(top1_by_seed(accuracies.get(name, [])))
            rows.append(cells)
    return markdown(head, rows) + place(measured)


def searched(folder: str) -> str:
    """Return designs that were tried: speed as a multiple of the ConvNeXt's of that size, accuracy by seed."""
    measured = read(f"{folder}/speed.csv")
    speeds = ratios(measured)
    found = {data: runs_by_model(f"{folder}/{data}") for data in ("icons100", "emoji")}
    shown = ("dims", "depths", "mlp_ratio", "act_layer")
    rows = []
    for name in sorted(found["emoji"].keys() | found["icons100"].keys()):
        model, options = split_options(name)
        cells = [model.removeprefix("glattn_")]
        cells += [_dashed(options.pop(key, getattr(VARIANTS[model], key))) for key in shown]
        cells.append(", ".join(f"{key} {value!r}" for key, value in options.items()))
        parameters, macs = count(name)
        cells += [f"{parameters:.1f}", f"{macs:.2f}"]
        cells += [speeds.get((name, case), "") for case in CASES]
        rows.append([*cells, *(top1_by_seed(runs.get(name, [])) for runs in found.values())])
    head = ("size", "widths", "depths", "MLP ratio", "activation", "also", "parameters (M)", "GMACs", "batch 1",
            "batch 8", "training", *(f"{data}, by seed" for data in found))  # fmt: skip
    return markdown(head, rows) + place(measured)


def _dashed(value: object) -> str:
    """Return an option of one value, or of one a stage, for a cell."""
    return "-".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}"


def deployment() -> str:
    """Return each runtime's speed as a multiple of eager's, and how far its logits are off."""
    table: dict[str, dict[str, dict[str, str]]] = {}
    measured = read("deployment.csv")
    for row in measured:
        table.setdefault(row["runtime"], {})[f"{row['model']}, batch {row['batch']}"] = row
    cases = list(next(iter(table.values())))
    rows = []
    for runtime, found in table.items():
        off = max(float(row["difference"]) for row in found.values())
        rows.append([runtime, *(found[case]["times_eager"] for case in cases), f"{off:.0e}"])
    return markdown(["runtime", *cases, "largest difference"], rows) + place(measured)


def runs_by_model(folder: str) -> dict[str, list[dict[str, str]]]:
    """Return run_proxies.py's runs of each model but those at a rate that was not chosen.

    Raises:
        ValueError: A model has runs of two recipes, which no table tells apart.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for row in read(f"{folder}/runs.csv"):
        if row["chosen"] != "no":  # empty: not all runs of the model are done
            found.setdefault(row["model"], []).append(row)
    for model, runs in found.items():
        if len({row["settings"] for row in runs}) > 1:
            raise ValueError(
                f"{folder}/runs.csv has runs of {model} by two recipes; move one of them to another folder"
            )
    return found


def drawings(folder: str, size: str, speeds_in: str) -> str:
    """Return each model's accuracy on drawings, and how far ours of that size is above it."""
    found = runs_by_model(folder)
    mine = f"glattn_{size}"
    compared = {row["other"]: row for row in read(f"{folder}/comparisons.csv") if row["model"] == mine}
    speeds = ratios(read(f"{speeds_in}/rows.csv"))
    head = ("model", "parameters (M)", "speed at 224", "lr", "top-1 by seed", f"`{mine}` less this", "95%", "")
    rows = []
    for name, runs in sorted(found.items(), key=lambda item: -float(speeds.get((item[0], CASES[1]), 0))):
        bold = "**" if name == mine else ""
        speed_there = speeds.get((name, CASES[1]), "")
        cells = [f"{bold}`{name}`{bold}", f"{float(runs[0]['parameters']) / 1e6:.1f}", speed_there, runs[0]["lr"]]
        cells += [top1_by_seed(runs), *difference(compared.get(name, {}))]
        if not runs[0]["chosen"]:
            cells[-1] = "runs missing"
        rows.append(cells)
    return markdown(head, rows)


def paths(folder: str, pixels: int, speeds_in: str = "") -> str:
    """Return designs' accuracy on Paths, whole and by the length of the arms: the first, then the others by rank."""
    found = runs_by_model(folder)
    first = next(iter(found))
    compared = {row["other"]: row for row in read(f"{folder}/comparisons.csv") if row["model"] == first}
    speeds = {row["design"]: f"{float(row['times_default_speed']):.2f}" for row in read(speeds_in)} if speeds_in else {}
    names = (f"{split}/{make_paths.name(0, n)}" for split, count in make_paths.SPLITS.items() for n in range(count))
    if {run["digest"] for runs in found.values() for run in runs} != {digest_of(names)}:
        raise ValueError(f"docs/results/{folder}/runs.csv is of other images than make_paths.py draws now")
    count, longest = make_paths.SPLITS["test"], round(make_paths.ARMS * (pixels // make_paths.CELL))
    lengths = {
        make_paths.name(0, index): make_paths.arm_length(make_paths.generator(0, "test", index), pixels)
        for index in range(count)
    }
    images = sorted(lengths)
    bounds = [0, *(round(longest * part / 3) for part in (1, 2, 3))]
    spans = [(low + (low > 0), high) for low, high in pairwise(bounds)]
    rows = []
    ranked = sorted(found.items(), key=lambda item: (item[0] != first, -float(mean_top1(item[1]))))
    for design, runs in ranked:
        right = [unpack(run["answers"], images) for run in runs]
        cells = [f"`{design}`", f"{float(runs[0]['parameters']) / 1e6:.1f}"]
        cells += [*([speeds.get(design, "")] if speeds_in else []), top1_by_seed(runs)]
        for low, high in spans:
            asked = [run[image] for run in right for image in images if low <= lengths[image] <= high]
            cells.append(f"{100 * sum(asked) / len(asked):.0f}")
        rows.append([*cells, *difference(compared.get(design, {}))])
    arms = [f"arms of {low} to {high}" for low, high in spans]
    head = ("design", "parameters (M)", *(["speed"] if speeds_in else []), "top-1 by seed", *arms)
    return markdown((*head, "the first less this", "95%", ""), rows)


def ablation() -> str:
    """Return what each mechanism does to accuracy and speed."""
    head = (
        "mechanism", "design", "parameters (M)", "GMACs", "speed", "top-1 by seed", "less the default", "95%", ""
    )  # fmt: skip
    rows = []
    for row in read("ablation/icons100.csv"):
        design = row["design"].partition("(")[2].removesuffix(")")
        cells = [row["mechanism"], f"`{design}`" if design else "", f"{float(row['parameters']):.1f}"]
        cells += [f"{float(row['gmacs']):.2f}", f"{float(row['times_default_speed']):.2f}"]
        cells += [", ".join(f"{float(top1):.1f}" for top1 in row["by_seed"].split()), *difference(row)]
        rows.append(cells)
    return markdown(head, rows)


def transferred(
    folder: str, first: str = ""
) -> tuple[dict[tuple[str, str], dict[str, str]], dict[tuple[str, str], list[dict[str, str]]]]:
    """Return what transfer.py found by task and arm: the comparison with the first one; the runs at the chosen rate.

    The first arm of a task is that of its first comparison, if no other is asked for.
    """
    compared: dict[tuple[str, str], dict[str, str]] = {}
    arms: dict[tuple[str, str], list[dict[str, str]]] = {}
    for task in TASKS:
        if (ROOT / "docs" / "results" / folder / task / "comparisons.csv").exists():
            rows = read(f"{folder}/{task}/comparisons.csv")
            mine = first or rows[0]["model"]
            compared |= {(task, row["other"]): row for row in rows if row["model"] == mine}
            for row in read(f"{folder}/{task}/runs.csv"):
                if row["chosen"] == "yes":
                    arms.setdefault((task, row["model"]), []).append(row)
    return compared, arms


def rates_tried(folder: str, arm: str) -> str:
    """Return the rates of an arm's runs, of which the one that served best on validation images was chosen."""
    return ", ".join(sorted({row["lr"] for row in read(f"{folder}/runs.csv") if row["model"] == arm}))


def transfer(folder: str) -> str:
    """Return the accuracy of each arm on each task after pretraining, and how far the first is above it."""
    compared, arms = transferred(folder)
    rows = []
    for (task, arm), runs in sorted(
        arms.items(), key=lambda item: (list(TASKS).index(item[0][0]), item[0] in compared)
    ):
        model, _, start = arm.partition(":")
        cells = [task, f"`{model}`", Path(start).name, runs[0]["lr"], mean_top1(runs), top1_by_seed(runs)]
        rows.append([*cells, *difference(compared.get((task, arm), {}))])
    head = ("task", "model", "start", "lr", "top-1", "by seed", "the first arm less this", "95%", "")
    return markdown(head, rows)


def pretraining(folder: str) -> str:
    """Return how far each model got in pretraining, of the runs that transfer.py started from."""
    rows = []
    for path in sorted((ROOT / "docs" / "results" / folder / "pretraining").glob("*.csv")):
        epochs = read(str(path.relative_to(ROOT / "docs" / "results")))
        best = max(epochs, key=lambda row: float(row["top1"]))
        noted = path.with_suffix(".json")  # not kept at first
        per_epoch = json.loads(noted.read_text())[PER_EPOCH] if noted.exists() else TrainConfig.epoch_samples
        rows.append([path.stem, f"{len(epochs) * per_epoch:,}", f"{float(best['top1']):.1f}"])
    return markdown(("run", "pictures", "top-1 on held-out ones"), rows)


def started(folder: Path) -> str:
    """Return, for a card, what runs the one recorded went on from: "" if from none."""
    folders = chain(folder)
    if len(folders) == 1:
        return ""
    lines, seen = [], Counter[str | None]()
    for each in folders:
        run = read_record(each)
        if not run.seen or not run.hours:
            raise ValueError(f"{each}: its record does not say how many pictures were seen")
        seen[run.dataset] += run.seen
        lines.append(
            f"- `{run.command}`: at its best after {run.seen:,} pictures, {run.hours:.2g} hours of steps in all on"
            f" {run.environment['device']}, seed {run.seed}, commit {run.environment['commit']}"
            f" ([record]({each.relative_to(folder)}))"
        )
    runs = "\n".join(reversed(lines))
    kinds = " and ".join(f"{count:,} of {kind}" for kind, count in reversed(seen.items())) if len(seen) > 1 else ""
    return f"""The run below is the last of {len(folders)}, each from the weights of the one before it; so these weights
saw {seen.total():,} pictures{f", {kinds}" if kinds else ""}:

{runs}

"""


def when_it_helps(name: str, folder: Path) -> str:
    """Return, for a card, what a model gained by its weights, ``VARIANT.TAG``, on each task, and how they began."""
    model, arm, measured = name.partition(".")[0], f"{name}:pretrained", GAINS[name]
    compared, arms = transferred(measured, arm)
    rows, digest = [], start_digest(arm)
    for (task, other), row in sorted(compared.items(), key=lambda item: list(TASKS).index(item[0][0])):
        scratch, _, times = other.partition("*")
        if scratch == f"{model}:scratch":
            starts = json.loads((ROOT / "docs" / "results" / measured / task / "starts.json").read_text())
            if starts[row["model"]] != digest:
                raise ValueError(
                    f"docs/results/{measured}/{task} is of other weights than the package's: transfer.py anew"
                )
            shown = f"{task}, scratch {times} times as long" if times else task
            both = [arms[task, one] for one in (arm, other)]
            tests = [{run["seed"]: float(run["test_top1"]) for run in runs} for runs in both]
            seeds = sorted(tests[0].keys() & tests[1].keys())  # which the gain is of
            means = [mean_top1([run for run in runs if run["seed"] in seeds]) for runs in both]
            by_seed = ", ".join(f"{tests[0][seed] - tests[1][seed]:+.1f}" for seed in seeds)
            rates = [rates_tried(f"{measured}/{task}", one) for one in (arm, other)]
            rows.append([shown, *means, *difference(row)[:2], by_seed, *rates])
    if not rows:
        raise ValueError(f"docs/results/{measured}: no comparison of {arm} with scratch; transfer.py first")
    head = ("task", "from these weights, %", "from scratch, %", "gained", "95% of resampled tests", "gained by seed")
    head += ("rates tried", "rates tried from scratch")
    table = markdown(head, rows)
    _, again = transferred("in-place/transfer")
    later = ", ".join(f"{mean_top1(runs)}% on {task}" for (task, start), runs in again.items() if start == arm)
    moved = f"""
The model's pooled maps were moved by up to half a stride since (`docs/results.md`); what stands below is by the code of
the runs. By the map as it is now, and on another machine, the same fine-tuning gave {later}."""
    longer = """
A gain below zero is a loss: trained from scratch for so long, a model ends above one that trained briefly from these
weights. They save time, which pretraining has spent once for all."""
    since, losses = moved if later else "", longer if any("times as long" in row[0] for row in rows) else ""
    default = timm.get_pretrained_cfg(model)
    loaded = model if default is not None and name == f"{model}.{default.tag}" else name
    return f"""They come with the package: `timm.create_model("{loaded}", pretrained=True)` needs no network. They saw
pictures of 64 x 64 pixels; any other size works. After training, kernels in front of a batch norm were scaled down to
the size of a new model's, which changes no output: rates that suit a new model suit these weights too.{since}

{started(folder)}## When it helps

Top-1 after fine-tuning by one recipe (`scripts/transfer.py`, `docs/results.md`), the rate of each start chosen from
those tried, on validation images (of few shots, on up to 20 further images a class). Where the interval holds zero, no
gain is shown; it is of resampled tests, and leaves out what another seed, or another choice of few images, would
change: see the gains by seed.{losses}

{table}"""


def card(name: str) -> str:
    """Return the card of weights that the package carries, ``VARIANT.TAG``."""
    folder = ROOT / "docs" / "weights" / name
    record = read_record(folder)
    model = timm.create_model(name, pretrained=True)
    with tempfile.TemporaryDirectory() as temporary:
        config = save_config(model, Path(temporary) / "config.json")
    record = dataclasses.replace(record, notes=when_it_helps(name, folder))
    return model_card(model, f"{HUB}/{name}", config, record)


def results() -> str:
    """Return docs/results.md with its tables filled."""
    text = (ROOT / "docs" / "results.md").read_text()
    for size in PEERED:
        text = fill(text, f"speed-{size}", speed(size))
    for size in ("atto", "tiny"):
        text = fill(text, f"speed-gpu-{size}", gpu(size))
    tables = {
        **{f"speed-{kind}larger": speed(f"{kind}base", f"{kind}large") for kind in PROCESSORS},
        "speed-returned": returned(),
        "scaling": scaling(),
        "deployment": deployment(),
        **{f"{kind}modes": modes(f"speed-{kind}modes") for kind in PROCESSORS},
        **{folder: drawings(folder, *beside) for folder, beside in DRAWINGS.items()},
        "paths64": paths("ablation/paths64", 64, "ablation/paths64.csv"),
        "paths128": paths("paths128", 128),
        "in-place": in_place(),
        "ablation": ablation(),
        "choice": choice(),
        "widths": widths(),
        **{folder: searched(folder) for folder in ("designs", "slimmer")},
        **{folder: transfer(folder) for folder in (*dict.fromkeys(GAINS.values()), "transfer-peers")},
        "transfer-more": transfer("in-place/transfer"),
        "pretraining": pretraining("transfer-peers"),
        "pretraining-contours": pretraining("transfer-contours"),
    }
    for name, table in tables.items():
        text = fill(text, name, table)
    return text


def fill(text: str, name: str, table: str) -> str:
    """Return the text with what stands between the table's two markers replaced."""
    start, end = f"<!-- {name}: make tables -->", f"<!-- /{name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    readme = ROOT / "README.md"
    text = fill(fill(readme.read_text(), "sizes", sizes()), "variants", variants())
    write_text(readme, text)
    write_text(ROOT / "docs" / "results.md", results())
    for folder in sorted((ROOT / "docs" / "weights").iterdir()):
        write_text(folder / "README.md", card(folder.name))


if __name__ == "__main__":
    main()
