"""Put a run's best weights into the package, ready to start from and in fp16, and the run's record into docs/weights/.

    glattn pretrain --run runs/fractals && python scripts/make_weights.py runs/fractals

It takes the place of what the package has of that tag; then `make tables` makes the card, from the record and from what
the new weights gain, once transfer.py has measured it (docs/results.md; rows of the old ones are removed by hand). With
--to FILE, only the run's weights, to start another run from: checkpoint=FILE.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import glattn
from glattn.benchmark.folding import observe
from glattn.files import copy_file, replacing, write_text
from glattn.models.weights import save_weights
from glattn.training.config import read_recipe
from glattn.training.pretrain import FORMULAS, HELD_OUT, FormulaSource
from glattn.training.validation import predict_source

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "before"  # folder of the record of the run that it started from, which may hold another
RECORD = ("config.yaml", "environment.json", "metrics.csv", "curve.png")


def chain(folder: Path) -> list[Path]:
    """Return a record and those of the runs before its run, back to the one that started from nothing."""
    before = folder / BEFORE
    return [folder, *(chain(before) if before.is_dir() else [])]


def start(run: Path) -> nn.Module:
    """Return a pretraining's best model as others start from it: the same function of smaller kernels.

    In front of a batch norm a kernel's size is free. It grows in training, and a rate that turns small kernels hardly
    turns large ones (arXiv:1706.05350).
    """
    trained = glattn.create_model(f"local-dir:{run / 'best'}", pretrained=True).eval()
    torch.manual_seed(0)
    fresh = glattn.create_model(f"local-dir:{run / 'best'}")
    shrink(trained, fresh)
    return trained


@torch.no_grad()
def shrink(model: nn.Module, fresh: nn.Module) -> None:
    """Scale kernels in front of a batch norm down to their size in a fresh model; outputs stay as they are.

    Raises:
        ValueError: They do not, as where a convolution's output goes elsewhere too.
    """
    image = torch.rand(2, 3, 64, 64)
    expected = model(image)
    for conv_name, norm_name in observe(model, image):
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        first = fresh.get_submodule(conv_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(first, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        scale = first.weight.norm() / conv.weight.norm()
        mean, variance = norm.running_mean, norm.running_var
        if conv.bias is None and norm.affine and mean is not None and variance is not None and 0 < scale < 1:
            before = (variance + norm.eps).sqrt()
            conv.weight *= scale
            mean *= scale
            variance *= scale**2
            # eps is not scaled
            norm.weight *= (variance + norm.eps).sqrt() / (scale * before)
    if not torch.allclose(model(image), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise ValueError(f"{type(model).__name__}: smaller kernels in front of its batch norms change what it computes")


def check_begins(runs: Sequence[Path]) -> None:
    """Raise a ``ValueError`` unless all runs began with weights but the last, which began with none."""
    for number, run in enumerate(runs, 1):
        config = read_recipe(run / "config.yaml")
        began = bool(config.get("checkpoint") or config.get("pretrained"))
        if began and number == len(runs):
            raise ValueError(f"{run}: began with weights; name the run that made them, or its record: --after RUN")
        if not began and number < len(runs):
            raise ValueError(f"{run}: began with no weights, so that no run was before it; leave --after out")


def made_of(runs: Sequence[Path]) -> tuple[str, str]:
    """Return the tag of the last of some runs, by the pictures of all and its size of them; and its dataset.

    Raises:
        ValueError: One saw other images, or its size of them is not noted.
    """
    configs = [read_recipe(run / "config.yaml") for run in runs]
    for run, config in zip(runs, configs, strict=True):
        if config.get("dataset") not in list(FORMULAS):
            raise ValueError(
                f"{run / 'config.yaml'}: its images, {config.get('dataset')!r}, are not {' or '.join(FORMULAS)}"
            )
    side = configs[0].get("image_size")
    if type(side) is not int:
        raise ValueError(f"{runs[0] / 'config.yaml'}: image_size is {side!r}, not a number of pixels")
    kinds = [f"{dataset.removesuffix('s')}1k" for dataset, _ in groupby(config["dataset"] for config in configs[::-1])]
    return f"{'_ft_'.join(kinds)}_{side}", configs[0]["dataset"]


def kept_epoch(run: Path) -> tuple[int, float]:
    """Return the epoch that a run kept as its best, and that one's top-1, percent.

    Raises:
        ValueError: They are not noted.
    """
    path = run / "best" / "metrics.json"
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return int(noted["epoch"]), float(noted["top1"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: no epoch and top1 in it, which `glattn pretrain` notes there") from None


def carried(name: str) -> Path:
    """Return the package's file of weights, ``VARIANT.TAG``.

    Raises:
        ValueError: It has none of that name.
    """
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # of a tag
        cfg = None
    if cfg is None or not cfg.file:
        raise ValueError(f"the package carries no weights {name}; name them in glattn/models/glattn.py first")
    return Path(cfg.file)


def measure(model: nn.Module, dataset: str) -> dict[str, Any]:
    """Return what a model knows of the held-out pictures of fractals, or of contours."""
    source = FormulaSource.of(dataset, HELD_OUT, fixed=True, side=64)
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, 64, 64)}
    device = torch.device("cpu")
    return predict_source(model.eval(), source, config, batch_size=100, workers=0, device=device).metrics()


def main() -> int:
    """Write the file, load it as a user does, measure it; the record is of what the user gets."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter, epilog=__doc__
    )
    parser.add_argument("run", type=Path, help="run folder of `glattn pretrain`")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument("--after", type=Path, metavar="RUN", help="run that this one started from, or its record")
    aim.add_argument("--to", type=Path, metavar="FILE", help="write the weights there, and nothing into the package")
    args = parser.parse_args()
    try:
        model = start(args.run)
        if args.to:
            save_weights(model, args.to)
            return 0
        epoch, before_fp16 = kept_epoch(args.run)
        runs = [args.run, *(chain(args.after) if args.after else [])]
        for run in runs:
            if absent := [file for file in RECORD if not (run / file).is_file()]:
                raise FileNotFoundError(f"{run}: no {absent[0]}; is it a run folder of `glattn pretrain`?")
        check_begins(runs)
        tag, dataset = made_of(runs)
        name = f"{model.pretrained_cfg['architecture']}.{tag}"
        file = carried(name)
        record = ROOT / "docs" / "weights" / name
        records = {record.joinpath(*[BEFORE] * number): run for number, run in enumerate(runs)}
        # read before any is written: --after may name what is there
        kept = {folder / file: (run / file).read_bytes() for folder, run in records.items() for file in RECORD}
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
        with tempfile.TemporaryDirectory() as folder:  # the package's stay, unless these load as a user loads them
            aside = Path(folder) / "model.safetensors"
            save_weights(model, aside)
            shipped = measure(
                timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(aside)}), dataset
            )
            shutil.rmtree(record / BEFORE, ignore_errors=True)
            for path, content in kept.items():
                with replacing(path) as temporary:
                    temporary.write_bytes(content)
            write_text(record / "best" / "metrics.json", json.dumps({"epoch": epoch, **shipped}, indent=2) + "\n")
            copy_file(aside, file)
    except (ValueError, OSError) as error:
        print(f"make_weights: {error}", file=sys.stderr)
        return 1
    size = file.stat().st_size / 1e6
    print(f"{file}: {size:.2f} MB; {shipped['top1']:.2f}% of held-out {dataset}, {before_fp16:.2f}% before fp16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
