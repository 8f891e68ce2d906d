"""Train models from scratch on drawings by one recipe, choose each one's lr on val/, test it, compare on authors.

For each model: the first seed at every lr; the lr with the better validation accuracy is kept; the other seeds at
that. The test is seen once by the best checkpoint of each run, never chosen by. Rows are written run by run, with the
answer to every test image; a killed list goes on where it was, and a later list adds models, rates and seeds.
"""

import argparse
import base64
import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from bootstrap import compare

from glattn.benchmark.contestant import split_options
from glattn.files import replacing, write_text
from glattn.training.config import read_recipe
from glattn.training.data import find_split
from glattn.training.image_folder import EXTENSIONS
from glattn.training.images import find_bad

FIELDS = (
    "model", "data", "lr", "seed", "chosen", "val_top1", "test_top1", "test_images", "parameters", "epochs", "seconds",
    "settings", "torch", "timm", "threads", "commit", "digest", "answers",
)  # fmt: skip
# how a process ends that torch ends: FastViT's does when torch 2.14 trains it in channels_last on a CPU
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL, -signal.SIGBUS)
# of a training, that a list sets
ARGUMENTS = ("data", "dataset", "train_split", "val_split", "model", "lr", "seed", "resume", "run")
Row = dict[str, str]


class TrainingError(OSError):
    """A training ended without a result."""


def write_csv(path: Path, fields: tuple[str, ...], rows: list[Row]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def key(row: Row) -> tuple[str, ...]:
    """Return what tells one run from the others of its data set."""
    return row["model"], row["settings"], row["lr"], row["seed"]


class Proxies:
    """The runs of one data set.

    Args:
        args: The command's.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        for setting in args.settings:
            if (name := setting.partition("=")[0]) in ARGUMENTS:
                raise ValueError(f"{setting}: the list itself gives each run its {name}; leave it out")
        if has_test(self.source) and read_recipe(args.config).get("val_split") == "test":
            raise ValueError(f"{args.config}: val_split is test, which may not choose rate and epoch")
        for model in args.models:
            self.start(model)  # what is no model is said before any training
        self.images, self.digest = survey(self.source)
        self.data = args.data.resolve().name
        self.out, self.runs = args.out / self.data, args.runs / f"{self.data}-{self.digest}"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.path = self.out / "runs.csv"
        self.rows = read_csv(self.path)
        if strange := sum(row.get("digest") != self.digest for row in self.rows):
            raise ValueError(f"{self.path}: {strange} rows are of other images than {self.source}; give another --out")
        self.check_recipe()
        self.authors = authors_of(self.images)
        self.failed: list[str] = []

    def check_recipe(self) -> None:
        """Note what the recipe says, and raise if rows of its name are of what it said before."""
        path, name = self.out / "recipes.json", self.args.config.name
        noted = json.loads(path.read_text()) if path.exists() else {}
        said = self.recipe_digest()
        used = any(row["settings"].partition(" ")[0] == name for row in self.rows)
        if used and noted.get(name) != said:
            raise ValueError(f"{self.path}: its rows of {name} were made before that was changed; give it another name")
        if noted.get(name) != said:
            write_text(path, json.dumps(noted | {name: said}, indent=2) + "\n")

    def recipe_digest(self) -> str:
        """Return a digest of what the recipe says now."""
        text = json.dumps(read_recipe(self.args.config), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def run(self) -> bool:
        """Do what is missing, but for what fails, which is said and noted in `failed`; tell whether all is done."""
        self.rows = read_csv(self.path)  # another list may have added to them since
        for model in self.args.models:
            if kept := self.rows_of(model):
                print(f"{model}: {len(kept)} runs are there, of {', '.join(sorted({row['commit'] for row in kept}))}")
            try:
                if not self.settle(model):
                    return False
            except TrainingError as error:
                print(f"{model}: {error}", file=sys.stderr)
                self.failed.append(model)
        return not self.failed

    def settle(self, model: str) -> bool:
        """Do a model's missing runs and choose its rate; tell whether there was time for all."""
        there = self.rows_of(model)
        first = int(there[0]["seed"]) if there else self.args.seeds[0]
        if not all(self.one(model, lr, first) for lr in self.args.lr):
            return False
        tried = [row for row in self.rows_of(model) if int(row["seed"]) == first]
        best = max(tried, key=lambda row: (float(row["val_top1"]), -float(row["lr"])))
        for row in self.rows_of(model):
            row["chosen"] = "yes" if row["lr"] == best["lr"] else "no"
        for seed in self.args.seeds:
            row = self.one(model, float(best["lr"]), seed)
            if row is None:
                return False
            row["chosen"] = "yes"
        self.write()
        return True

    def write(self) -> None:
        """Write the rows of this list's models, and leave others' as another list may have written them meanwhile."""
        mine = {key(row): row for model in self.args.models for row in self.rows_of(model)}
        self.rows = [mine.pop(key(row), row) for row in read_csv(self.path)] + list(mine.values())
        write_csv(self.path, FIELDS, self.rows)

    @property
    def settings(self) -> str:
        return " ".join([self.args.config.name, *self.args.settings])

    def one(self, model: str, lr: float, seed: int) -> Row | None:
        """Return a run's row, trained and tested unless it is there; None if the time is up."""
        for row in self.rows_of(model):
            if (float(row["lr"]), int(row["seed"])) == (lr, seed):
                return row
        if time.monotonic() >= self.args.end:
            print("time is up; the same command goes on")
            return None
        self.check_recipe()  # which the training reads again
        folder, data = self.folder(model, lr, seed), self.chosen_data(seed)
        print(f"{model} lr {lr:g} seed {seed}", flush=True)
        begun = time.monotonic()
        command = [
            sys.executable, "-m", "glattn", "train", "--config", str(self.args.config), *self.args.settings,
            f"data={data}", *self.start(model), f"lr={lr}", f"seed={seed}", "resume=auto",
        ]  # fmt: skip
        with (self.runs / f"{folder.name}.log").open("a") as log:
            before = log.tell()
            status = subprocess.run([*command, f"run={folder}"], stdout=log, stderr=log, check=False).returncode
            if status in CRASHES:
                folder = folder.with_name(f"{folder.name}-nchw")
                command.append("channels_last=false")
                status = subprocess.run([*command, f"run={folder}"], stdout=log, stderr=log, check=False).returncode
        if status:
            said = Path(log.name).read_bytes()[before:].decode(errors="replace").strip()
            why = f"signal {-status}" if status < 0 else said.rpartition("\n")[2] or f"status {status}"
            raise TrainingError(f"training failed: {why}; see {log.name}")
        seconds = time.monotonic() - begun
        row = {"model": model, "data": self.data, "lr": repr(lr), "seed": str(seed), "chosen": ""}
        row |= {"settings": self.settings, "seconds": f"{seconds:.0f}", "digest": self.digest}
        found, right = finished(folder, data)
        row |= found | {"answers": pack(right, self.images)}
        self.rows.append(row)
        self.write()
        print(f"  val {row['val_top1']} test {row['test_top1']} in {seconds / 60:.1f} min", flush=True)
        return row

    @property
    def source(self) -> Path:
        """The folder of images."""
        path: Path = self.args.data
        return path

    def chosen_data(self, seed: int) -> Path:
        """Return the folder of the images that a seed's run sees."""
        if not has_test(self.source):
            raise ValueError(f"{self.source} has no test/: val/ chooses rate and epoch, and cannot test them too")
        return self.source

    def start(self, model: str) -> list[str]:
        """Return the training's arguments that say what is trained."""
        name, options = split_options(model)
        return [f"model={name}", *(f"model_args.{key}={json.dumps(value)}" for key, value in options.items())]

    def folder(self, model: str, lr: float, seed: int) -> Path:
        """Return a run's folder."""
        recipe = [self.args.config.stem, self.recipe_digest(), *self.args.settings]
        parts = [words(model), repr(lr), f"seed{seed}", *recipe]
        return self.runs / "-".join(parts).replace("/", "_")

    def rows_of(self, model: str) -> list[Row]:
        """Return a model's rows by the recipe of this list."""
        return [row for row in self.rows if (row["model"], row["settings"]) == (model, self.settings)]

    def chosen(self, model: str) -> dict[int, Row]:
        """Return a model's rows at the lr that was chosen, by seed."""
        return {int(row["seed"]): row for row in self.rows_of(model) if row["chosen"] == "yes"}

    @property
    def done(self) -> list[str]:
        """The models that every rate and every seed is done of."""
        return [
            model
            for model in self.args.models
            if self.chosen(model).keys() >= set(self.args.seeds)
            and {float(row["lr"]) for row in self.rows_of(model)} >= set(self.args.lr)
        ]

    def compare(self) -> list[Row]:
        """Write and return the comparisons of the first model with each other one, of those that are done.

        Those that the file has already are made anew, of the rows as they are now.
        """
        models, path = self.done, self.out / "comparisons.csv"
        if not models or models[0] != self.args.models[0]:
            if self.args.models[1:]:
                print(f"nothing is compared: {self.args.models[0]} is not done")
            return []
        noted = read_csv(path)
        before = [(row["model"], row["other"]) for row in noted if row["settings"] == self.settings]
        asked = [(models[0], other) for other in models[1:]]
        found = {pair: row for pair in dict.fromkeys([*before, *asked]) if (row := self.comparison(*pair))}
        if found:
            rows = [row for row in noted if row["settings"] != self.settings] + list(found.values())
            write_csv(path, tuple(rows[0]), rows)
        for pair in asked:
            print("{model} less {other}: {points} points, 95% {low} to {high}: {verdict}".format(**found[pair]))
        return [found[pair] for pair in asked]

    def comparison(self, mine: str, other: str) -> Row | None:
        """Return how a model compares with another one, on the seeds that both have; None if there are none."""
        runs = self.chosen(mine), self.chosen(other)
        seeds = sorted(runs[0].keys() & runs[1].keys())
        if not seeds:
            return None
        answers = ([unpack(rows[seed]["answers"], self.images) for seed in seeds] for rows in runs)
        difference = compare(*answers, self.authors)
        return {
            "model": mine, "other": other, "seeds": str(len(seeds)),
            "points": f"{difference.points:.2f}", "low": f"{difference.low:.2f}", "high": f"{difference.high:.2f}",
            "authors": str(difference.authors), "verdict": difference.verdict, "settings": self.settings,
        }  # fmt: skip


def words(model: str) -> str:
    """Return what the names of a model's run folders begin with."""
    return "-".join(re.findall(r"[\w.]+", model))


def has_test(source: Path) -> bool:
    """Tell whether there are images that are for the test alone."""
    return (source / "test").is_dir()


def tested_split(source: Path) -> str:
    """Return the name of the images that are tested on: test, or those to validate on where there is none.

    Raises:
        FileNotFoundError: There are neither.
    """
    held_out = source / "test" if has_test(source) else find_split(source, "val")
    if held_out is None:
        raise FileNotFoundError(f"{source}: no test/ and no val/ to test on")
    return held_out.name


def images_in(folder: Path) -> list[Path]:
    """Return the images in a folder and those below it, sorted; folders whose names begin with a dot are left out.

    Links to folders are followed, as in training.
    """
    found = []
    for home, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(home, name) for name in names if Path(name).suffix.lower() in EXTENSIONS]
    return sorted(path for path in found if path.is_file())


def survey(source: Path) -> tuple[list[str], str]:
    """Return the tested images, sorted, and a digest of the names of all images.

    Raises:
        FileNotFoundError: There are none, or none to test on.
        ValueError: One is of a class that nothing is trained on, or cannot be read.
    """
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such folder; scripts/make_icons.py, make_emoji.py, make_paths.py make some"
        )
    names = sorted(str(path.relative_to(source)) for path in images_in(source))
    if not names:
        raise FileNotFoundError(f"{source}: no images in it; they are to lie as train/CLASS/NAME.png, in no .tar")
    split = f"{tested_split(source)}/"
    tested = [name.removeprefix(split) for name in names if name.startswith(split)]
    if not tested:
        raise FileNotFoundError(f"{source}: no images in {split} to test on")
    if train := find_split(source, "train"):
        known = {Path(name).parent.name for name in names if name.startswith(f"{train.name}/")}
        if unknown := sorted({Path(name).parent.name for name in tested} - known):
            which = f"a class {unknown[0]!r} that {train.name}/ has not" if unknown[0] else "images outside its classes"
            raise ValueError(f"{source}: {split} has {which}")
    if bad := next(find_bad([str(source / split / name) for name in tested]), None):
        raise ValueError(f"test image {bad[0]} cannot be read ({bad[1]}): repair it or take it out")
    return tested, digest_of(names)


def digest_of(names: Iterable[str]) -> str:
    """Return a digest of the names of a set's images, by which rows tell sets apart."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12]


def pack(right: dict[str, bool], images: list[str]) -> str:
    """Return in short which images were named rightly.

    Raises:
        ValueError: It is said of other images.
    """
    if sorted(right) != images:
        raise ValueError(f"{len(right)} images were tested, which are not the {len(images)} of the data set")
    return base64.b64encode(np.packbits([right[image] for image in images]).tobytes()).decode()


def unpack(answers: str, images: list[str]) -> dict[str, bool]:
    """Return what `pack` was given."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(answers), np.uint8), count=len(images))
    return dict(zip(images, bits.astype(bool).tolist(), strict=True))


def finished(run: Path, data: Path) -> tuple[Row, dict[str, bool]]:
    """Test a run's best checkpoint; return what the run's row says of it, and which images it named rightly."""
    import torch

    from glattn.training.classifier import open_checkpoint
    from glattn.training.data import open_split
    from glattn.training.validation import predict_source

    classifier = open_checkpoint(str(run))
    root = data / tested_split(data)
    source = open_split(str(root), "", classifier.class_names)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    said = predict_source(
        classifier.model.to(device), source, classifier.data_config, batch_size=256, workers=0, device=device
    )
    right = {}
    for index, correct in zip(said.index, said.correct, strict=True):
        right[str(Path(source.name(int(index))).relative_to(root))] = bool(correct)
    environment: dict[str, Any] = json.loads((run / "environment.json").read_text())
    commit, _, dirty = (environment["commit"] or "").partition("-")
    best = json.loads((run / "best" / "metrics.json").read_text())
    row = {
        "val_top1": f"{best['top1']:.3f}",
        "test_top1": f"{said.metrics()['top1']:.3f}",
        "test_images": str(len(right)),
        "parameters": str(sum(p.numel() for p in classifier.model.parameters())),
        "epochs": str(len(read_csv(run / "metrics.csv"))),
        "torch": environment["versions"]["torch"],
        "timm": environment["versions"]["timm"],
        "threads": str(environment["threads"]),
        "commit": commit[:12] + (f"-{dirty}" if dirty else ""),
    }
    return row, right


def authors_of(images: list[str]) -> dict[str, str]:
    """Return each image's author. What no manifest names (Paths), or one author alone drew, is each by itself.

    Raises:
        ValueError: A manifest names some of the sets, SET--NAME, and others not: theirs would pass for as many authors.
    """
    import manifest

    known = {e.set: e.author for path in sorted(manifest.FOLDER.glob("*.csv.gz")) for e in manifest.read(path)}
    found = {image: known.get(Path(image).name.partition("--")[0], image) for image in images}
    unknown = [image for image, author in found.items() if author == image and "--" in Path(image).name]
    if unknown and any(author != image for image, author in found.items()):
        raise ValueError(
            f"{len(unknown)} test images are of sets that no manifest of data_manifests/ names, such as {unknown[0]}:"
            " put theirs there, or take -- out of the names of images that are each by an author of their own"
        )
    return found if len(set(found.values())) > 1 else {image: image for image in images}


def deadline(minutes: str) -> float:
    """Return when so many minutes are over, on the monotonic clock."""
    seconds = 60 * float(minutes)
    if not seconds >= 0:
        raise ValueError
    return time.monotonic() + seconds


def add_list_arguments(parser: argparse.ArgumentParser, *, runs: str, out: str) -> None:
    """Declare what every list of runs takes: its recipe, its folders, its time."""
    parser.add_argument("--config", type=Path, default=Path("configs/icons.yaml"), help="recipe (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="folder of the runs (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the rows (%(default)s)")
    parser.add_argument(
        "--minutes", dest="end", type=deadline, default=float("inf"),
        help="begin no training after this time; the same command goes on",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes of the recipe, for all models alike")
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        help="timm models, or \"glattn_atto(layout='full')\"; the others are compared with the first",
    )
    parser.add_argument("--data", type=Path, default=Path("data/icons100"), help="folder with train, val, test")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 2e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    add_list_arguments(parser, runs="runs/proxies", out="docs/results")
    args = parser.parse_args()
    try:
        proxies = Proxies(args)
        proxies.run()
        proxies.compare()
    except (ValueError, OSError) as error:
        print(f"run_proxies: {error}", file=sys.stderr)
        return 1
    return int(bool(proxies.failed))


def end_with_children() -> None:
    """Let SIGTERM unwind like an error, so that the training that is waited for ends too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    end_with_children()
    sys.exit(main())
