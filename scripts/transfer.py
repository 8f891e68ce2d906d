"""Fine-tune from pretrained weights and from scratch on few and on many drawings: does pretraining help, and whom?

    python scripts/transfer.py glattn_atto:pretrained glattn_atto:scratch

An arm is MODEL:START, START being scratch, pretrained (the weights that the model comes with) or a run folder of
`glattn pretrain`, whose weights are made ready as the package's are (make_weights.py); MODEL:scratch*10 trains ten
times as long. The first is compared with the others. lr is chosen for each arm on val/, by its first seed; the test is
seen once by the best checkpoint of each run. A killed list goes on.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import make_weights
import numpy as np
import timm
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from run_proxies import Proxies, Row, add_list_arguments, end_with_children, has_test, images_in, read_csv, words
from timm.models._registry import split_model_name_tag

import glattn  # noqa: F401
from glattn.figures import save_figure
from glattn.files import copy_file, new_folder, write_text
from glattn.models.weights import reading_checkpoint, save_weights
from glattn.training.data import find_split
from glattn.training.digits import write_digits

PER_EPOCH = "images_per_epoch"  # of a run's environment.json


@dataclass(frozen=True)
class Task:
    """What is learned after pretraining.

    Args:
        data: Folder of images.
        shots: Training images a class, another choice for each seed; 0: all.
        seeds: Of weights, order and choice.
        settings: Changes of the recipe.
    """

    data: str
    shots: int
    seeds: tuple[int, ...]
    settings: tuple[str, ...]


TASKS = {
    "icons100-10shot": Task("data/icons100", 10, (0, 1, 2), ("epochs=30", "warmup_epochs=2")),
    "digits-5shot": Task("data/digits", 5, (0, 1, 2), ("epochs=100", "warmup_epochs=5", "batch_size=25")),
    # identities of few drawings gave none to val/
    "emoji": Task("data/emoji", 0, (0, 1), ("epochs=6", "warmup_epochs=1", "partial_val=true")),
    "icons100": Task("data/icons100", 0, (0, 1), ("epochs=6", "warmup_epochs=1")),
}


def find_task(name: str) -> Task:
    """Return a task by name: of `TASKS`, or DATA or DATA-Nshot of other images, which lie in data/DATA."""
    if name in TASKS:
        return TASKS[name]
    if not name or "/" in name:
        raise ValueError(f"{name!r}: give the name of a folder in data/, such as icons100, or icons100-5shot")
    found = re.search(r"-([1-9]\d*)shot$", name)
    data, shots = (name[: found.start()], int(found[1])) if found else (name, 0)
    settings = ("epochs=30", "warmup_epochs=2") if shots else ("epochs=6", "warmup_epochs=1")
    new = Task(f"data/{data}", shots, (0, 1, 2) if shots else (0, 1), settings)
    alike = (task for task in TASKS.values() if (task.data, task.shots > 0) == (new.data, shots > 0))
    task = replace(next(alike, new), shots=shots)
    # of classes of few images none may be left to validate on
    return replace(task, settings=tuple(dict.fromkeys([*task.settings, "partial_val=true"])))


class Transfer(Proxies):
    """The runs of one task."""

    def __init__(self, name: str, task: Task, args: argparse.Namespace) -> None:
        self.task = task
        settings = {"models": args.arms, "data": Path(name), "config": args.config, "settings": task.settings}
        folders = {"runs": args.runs, "out": args.out, "end": args.end}
        super().__init__(SimpleNamespace(**settings, **folders, lr=args.lr, seeds=args.seeds or task.seeds))  # type: ignore[arg-type]
        self.check_starts()

    def check_starts(self) -> dict[str, str]:
        """Return digests of the files that the arms start from.

        Raises:
            ValueError: Runs of an arm began with another file.
        """
        path = self.out / "starts.json"
        noted: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for arm in self.args.models:
            digest = start_digest(arm)
            if not digest:
                continue
            if noted.get(arm, digest) != digest and self.begun(arm):
                raise ValueError(
                    f"{path}: runs of {arm} began with other weights; remove its rows from {self.path}, and its "
                    f"folders from {self.runs}"
                )
            noted[arm] = digest
        return noted

    def begun(self, arm: str) -> bool:
        """Tell whether there is a run of an arm, or a row of one."""
        name = re.compile(rf"{re.escape(words(arm))}-\d[\d.]*(e-?\d+)?-seed")  # no arm that only begins alike
        ran = any(name.match(path.name) for path in self.runs.iterdir() if path.is_dir())
        return ran or any(row["model"] == arm for row in self.rows)

    def run(self) -> bool:
        """Note what the arms start from, and do what is missing."""
        starts = self.check_starts()  # again: another list may have noted others since
        write_text(self.out / "starts.json", json.dumps(starts, indent=2) + "\n")
        return super().run()

    @property
    def source(self) -> Path:
        """The folder of images."""
        return write_digits("data/digits") if self.task.data == "data/digits" else Path(self.task.data)

    def chosen_data(self, seed: int) -> Path:
        """Return the folder of a seed's images, chosen if that is still to be done."""
        if not self.task.shots and has_test(self.source) and find_split(self.source, "val"):
            return self.source
        number = f"{self.task.shots}shot" if self.task.shots else "all"
        chosen = self.runs / f"images-{number}-seed{seed}"
        if not chosen.exists():
            choose(self.source, chosen, self.task.shots, seed)
        return chosen

    def start(self, model: str) -> list[str]:
        """Return the arguments of an arm, MODEL:START."""
        name, start, times = split_arm(model)
        arguments = [f"model={name}"]
        if start == "pretrained":
            arguments.append("pretrained=true")
        elif start != "scratch":
            arguments.append(f"checkpoint={start_file(model)}")
        if times:
            epochs = next(int(text.partition("=")[2]) for text in self.task.settings if text.startswith("epochs="))
            arguments.append(f"epochs={epochs * times}")
        return arguments


def split_arm(arm: str) -> tuple[str, str, int]:
    """Return an arm's model, its start, and how many times longer it trains, 0 for no longer."""
    found = re.fullmatch(r"([^:]+):([^*]+)(?:\*([1-9]\d*))?", arm)
    if found is None:
        raise ValueError(f"{arm!r} is no arm: write MODEL:scratch, MODEL:scratch*10, MODEL:pretrained or MODEL:RUN")
    return found[1], found[2], int(found[3] or 0)


def start_file(arm: str) -> Path | None:
    """Return the file of weights that an arm starts from, see `make_start`; None from scratch, or if the Hub's."""
    model, start, _ = split_arm(arm)
    if start == "pretrained":
        try:
            cfg = timm.get_pretrained_cfg(model)
        except RuntimeError as error:  # of a tag
            raise ValueError(f"{arm}: {error}") from None
        return Path(cfg.file) if cfg is not None and cfg.file else None
    if start == "scratch":
        return None
    best, path = Path(start) / "best" / "model.safetensors", Path(start) / "start.safetensors"
    if not best.is_file():
        raise FileNotFoundError(f"{arm}: no {best}; is {start} a run folder of `glattn pretrain`?")
    return path


def start_digest(arm: str) -> str:
    """Return the SHA-256 of the file of weights that an arm starts from; nothing where there is none."""
    file = start_file(arm)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file else ""


def make_start(arm: str, records: Path) -> None:
    """Make the file that an arm starts from, if it starts from a run folder; keep a copy of that run's measurements.

    Raises:
        ValueError: timm knows no such model.
        OSError: There are no such weights.
    """
    model, start, _ = split_arm(arm)
    name, tag = split_model_name_tag(model)
    if not timm.is_model(name):
        raise ValueError(f"{arm}: timm knows no model {name!r}; timm.list_models() has them")
    file = start_file(arm)
    if start == "pretrained":
        with reading_checkpoint(name, True, tag or None):
            pass
    elif file is not None:
        save_weights(make_weights.start(Path(start)), file)
        copy_file(Path(start) / "metrics.csv", records / f"{Path(start).name}.csv")
        if per_epoch := json.loads((Path(start) / "environment.json").read_text()).get(PER_EPOCH):  # once not noted
            write_text(records / f"{Path(start).name}.json", json.dumps({PER_EPOCH: per_epoch}) + "\n")


def choose(source: Path, target: Path, shots: int, seed: int) -> None:
    """Link a few images a class to train on, some to choose rate and epoch by, and all of the test's.

    What has no test/ (the digits) is tested on val/; it, and what has no val/, is validated on other images of train/:
    with 0 shots, on a fifth of them.

    Raises:
        ValueError: No class has an image to validate on.
    """
    rng = np.random.default_rng([seed, shots])
    train, val = find_split(source, "train"), find_split(source, "val")
    if train is None:
        raise ValueError(f"{source}: no train/ to train on")
    tests_in, val = (source / "test", val) if has_test(source) else (val, None)
    classes, vals, tests = (by_class(folder) for folder in (train, val, tests_in))
    with new_folder(target) as root:
        for label, images in classes.items():
            picked = [images[i] for i in rng.permutation(len(images))]
            count = shots or max(1, len(images) - max(1, len(images) // 5))
            others = vals[label] if val else picked[count:]
            others = [others[i] for i in rng.permutation(len(others))]
            chosen = (
                ("train", train, picked[:count]),
                ("val", val or train, others[: max(count, 20)]),
                ("test", tests_in, tests[label]),
            )
            for split, base, paths in chosen:
                for path in paths:
                    link = root / split / path.relative_to(base)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(path.resolve())
        if not (root / "val").is_dir():
            fewer = f"fewer shots than {shots}, or " if shots else ""
            raise ValueError(f"{source}: nothing to validate on: give {fewer}a val/ beside test/")


def by_class(split: Path | None) -> dict[str, list[Path]]:
    """Return a split's images by class, which is the name of the folder that they lie in; none where it is None."""
    classes: dict[str, list[Path]] = defaultdict(list)
    for path in images_in(split) if split else ():
        if path.parent != split:
            classes[path.parent.name].append(path)
    return classes


def draw(rows: list[Row], path: Path) -> None:
    """Draw the accuracy of each arm on each task at its chosen rate: a bar to the mean, a dot a seed."""
    rows = [row for row in rows if row["chosen"] == "yes"]
    for name in {row["data"] for row in rows}:
        if len(found := {row["settings"] for row in rows if row["data"] == name}) > 1:
            raise ValueError(f"{path.parent / name} holds runs of {len(found)} recipes: {'; '.join(sorted(found))}")
    tasks, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("data", "model"))
    colours = {arm: colormaps["tab20"](number % 20) for number, arm in enumerate(arms)}
    figure = Figure(figsize=(4 + 2.4 * len(tasks), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(arms)
    for place, task in enumerate(tasks):
        tests: dict[str, list[float]] = {}
        for row in rows:
            if row["data"] == task:
                tests.setdefault(row["model"], []).append(float(row["test_top1"]))
        for number, arm in enumerate(sorted(tests, key=arms.index)):
            x = place + (number - (len(tests) - 1) / 2) * width
            axes.bar(x, sum(tests[arm]) / len(tests[arm]), width * 0.9, color=colours[arm], alpha=0.6)
            axes.plot([x] * len(tests[arm]), tests[arm], ".", color="#1e293b", markersize=4)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("top-1 on the test, %")
    axes.grid(axis="y", alpha=0.3)
    marks = [Patch(color=colours[arm], alpha=0.6, label=arm) for arm in arms]
    axes.legend(handles=marks, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def main() -> int:
    """Fine-tune, test, compare, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter, epilog=__doc__
    )
    parser.add_argument("arms", nargs="+", metavar="MODEL:START", help="the others are compared with the first")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), metavar="TASK",
        help="DATA for all images of data/DATA, DATA-Nshot for N a class (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 2e-3])
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the two or three of each task")
    add_list_arguments(parser, runs="runs/transfer", out="docs/results/transfer")
    args = parser.parse_args()
    try:
        for arm in args.arms:
            make_start(arm, args.out / "pretraining")
        failed = []
        for transfer in [Transfer(name, find_task(name), args) for name in dict.fromkeys(args.tasks)]:
            print(transfer.data, flush=True)
            transfer.run()
            transfer.compare()
            failed += transfer.failed
        rows = [row for name in dict.fromkeys([*TASKS, *args.tasks]) for row in read_csv(args.out / name / "runs.csv")]
        if any(row["chosen"] == "yes" for row in rows):
            draw(rows, args.out / "transfer.png")
    except (ValueError, OSError) as error:
        print(f"transfer: {error}", file=sys.stderr)
        return 1
    return int(bool(failed))


if __name__ == "__main__":
    end_with_children()
    sys.exit(main())
