"""`glattn train`: every option does what it says, in runs of a second on noisy colours."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from image_folders import COLOURS, spoil, write_class, write_folder
from PIL import Image
from safetensors.torch import load_file, save_file

from glattn.cli import main
from glattn.hub.card import is_untouched
from glattn.models.weights import save_weights
from glattn.training import build, run_folder
from glattn.training.augment import BatchAugment
from glattn.training.batches import make_loader
from glattn.training.command import resolve
from glattn.training.config import TrainConfig
from glattn.training.data import open_sources
from glattn.training.digits import write_digits
from glattn.training.distributed import start_accelerator
from glattn.training.loop import Trainer
from glattn.training.optim import build_optimizer, make_scheduler
from glattn.training.validation import Predictions

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
QUICK = {
    "model": "test_glattn", "image_size": 32, "epochs": 1, "batch_size": 8, "warmup_epochs": 0, "workers": 0,
    "tracker": "none", "device": "cpu", "seed": 1,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("colours"), train=8, val=4)


@pytest.fixture
def trainer(images, tmp_path):
    """Return a maker of trainers: nothing is trained before `run` or `train_epoch`."""
    numbers = iter(range(10))

    def make(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = str(tmp_path / f"run{next(numbers)}")
        return Trainer(TrainConfig(**{**QUICK, "data": str(images), "run": run, **options}))

    return make


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train_only(trainer, epochs):
    """Train without validating or writing anything; return the losses."""
    losses = []
    for epoch in range(epochs):
        trainer.progress.epoch, trainer.progress.step, trainer.progress.loss_sum = epoch, 0, 0.0
        losses.append(trainer.train_epoch())
    return losses


def moved(model, before):
    """Return the names of the weights that differ from before."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def rows(run):
    with (Path(run) / "metrics.csv").open(encoding="utf-8") as file:
        return [
            {name: value for name, value in row.items() if name != "images_per_second"} for row in csv.DictReader(file)
        ]


# --- the whole run --------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises_and_its_best_loads_identically(images, tmp_path, capsys):
    run = tmp_path / "run"
    options = [f"{name}={value}" for name, value in QUICK.items() if name not in ("model", "epochs")]
    given = ["--data", str(images), "--model", "test_glattn", "--run", str(run), "--epochs", "4"]
    assert main(["train", *given, *options, "lr=3e-3", "ema_decay=0.5"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        said[-1] == f'load it: import timm, glattn; model = timm.create_model("local-dir:{run}/best", pretrained=True)'
    )
    for epoch in range(1, 5):
        assert any(line.startswith(f"epoch {epoch}/4  loss ") and "top-1" in line and "top-5" in line for line in said)
    for name in ("config.yaml", "environment.json", "metrics.csv", "curve.png", "samples.png", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "curve.png").read_bytes()[:4] == (run / "samples.png").read_bytes()[:4] == b"\x89PNG"
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3", "4"]

    noted = json.loads((run / "best" / "metrics.json").read_text())
    best = max(rows(run), key=lambda row: float(row["top1"]))
    assert (noted["epoch"], noted["top1"]) == (int(best["epoch"]), float(best["top1"]))
    assert noted["top1"] > 90  # it learnt
    assert noted["images"] == 12

    assert TrainConfig.read(run / "config.yaml").epochs == 4
    loaded = timm.create_model(f"local-dir:{run}/best", pretrained=True).eval()
    made = build.create("test_glattn", num_classes=3).eval()
    made.load_state_dict(load_file(run / "best" / "model.safetensors"))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), made(x))
    assert loaded.pretrained_cfg["label_names"] == list(COLOURS)
    assert loaded.pretrained_cfg["input_size"] == (3, 32, 32)

    # what the loaded model says of the validation images is what the run measured
    config = build.data_config_of(loaded, TrainConfig(**QUICK))
    _, val = open_sources(TrainConfig(data=str(images)))
    loader = make_loader(val, [[(n, 0) for n in range(12)]], config, workers=0, device=CPU)
    x, places = next(iter(loader))
    with torch.no_grad():
        right = (loaded(x).argmax(1) == places[:, 0]).float().mean()
    assert 100 * right.item() == pytest.approx(noted["top1"])


def test_the_same_seed_gives_the_same_run_with_any_workers(images, tmp_path):
    options = {
        **QUICK, "data": images, "epochs": 2, "auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.2, "ema_decay": 0.9,
        "drop_rate": 0.1, "drop_path_rate": 0.1, "random_erase": 0.5,
    }  # fmt: skip
    runs = []
    for number, workers in enumerate((2, 1)):
        arguments = [f"{k}={v}" for k, v in {**options, "workers": workers, "run": tmp_path / str(number)}.items()]
        command = [sys.executable, "-m", "glattn", "train", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for run in runs:
        said = run.communicate()[0].decode()
        assert run.returncode == 0, said
    first, again = tmp_path / "0", tmp_path / "1"
    assert len(rows(first)) == 2
    assert rows(again) == rows(first)
    weights = [(run / "best" / "model.safetensors").read_bytes() for run in (first, again)]
    assert weights[0] == weights[1]


def test_another_seed_gives_another_run(trainer):
    losses = {trainer(seed=seed).train_epoch() for seed in (1, 1, 2)}
    assert len(losses) == 2


def test_bad_images_are_skipped_and_listed_or_refused(tmp_path, capsys):
    root = write_folder(tmp_path / "data", train=8, val=4)
    bad = [
        spoil(root / "train" / "red" / "003.png", "truncated"),
        spoil(root / "train" / "blue" / "000.png", "zero bytes"),
        spoil(root / "val" / "green" / "001.png", "text"),
    ]
    options = [f"{name}={value}" for name, value in QUICK.items()]
    run = tmp_path / "run"
    assert main(["train", "--data", str(root), "--run", str(run), *options]) == 0
    assert sorted((run / "skipped.txt").read_text().split()) == sorted(map(str, bad))
    assert "3 image(s) could not be read and were left out" in capsys.readouterr().out
    assert json.loads((run / "best" / "metrics.json").read_text())["images"] == 11

    assert main(["train", "--data", str(root), "--run", str(tmp_path / "no"), "bad_images=refuse", *options]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "3 image(s) cannot be read, e.g. " in said
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are text")
def test_files_whose_names_are_no_text_are_trained_on_and_listed(tmp_path, capsys):
    root = write_folder(tmp_path / "data", train=8, val=4)
    for path in root.glob("*/*/*.png"):
        os.rename(path, os.fsencode(path.parent) + b"/caf\xe9-" + os.fsencode(path.name))
    for split in ("train", "val"):
        os.rename(root / split / "blue", os.fsencode(root / split) + b"/bleu\xe9")
    bad = [spoil(root / split / "red" / "caf\udce9-003.png", "truncated") for split in ("train", "val")]
    options = [f"{name}={value}" for name, value in {**QUICK, "epochs": 2, "lr": 1e-9}.items()]
    assert main(["train", "--data", str(root), "--run", str(tmp_path / "run"), *options]) == 0
    listed = (tmp_path / "run" / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert listed == [str(path).replace("\udce9", "\\udce9") for path in bad]
    assert capsys.readouterr().out.count("could not be read") == 1
    assert "caf\\udce9-0" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")  # among the mistakes
    assert main(["push", str(tmp_path / "run"), "org/name", "--dry-run", str(tmp_path / "pushed")]) == 0
    card = (tmp_path / "pushed" / "README.md").read_text(encoding="utf-8")
    assert "bleu\\udce9" in card
    assert is_untouched(card)


def test_odd_images_train(tmp_path):
    root = write_folder(tmp_path / "data", train=6, val=2)
    for split in ("train", "val"):
        path = root / split / "red" / "000.png"
        with Image.open(path) as image:
            grey = image.convert("L")
            path.unlink()
            grey.save(path.with_suffix(".gif"), save_all=True, append_images=[grey.rotate(90)])
            grey.convert("CMYK").save(path.with_suffix(".jpg"))
            grey.convert("LA").save(path.with_name("alpha.webp"))
            grey.point(lambda v: v * 257, "I").convert("I;16").save(path.with_name("deep.png"))
    trainer = Trainer(TrainConfig(**{**QUICK, "data": str(root), "run": str(tmp_path / "run")}))
    trainer.run()
    assert trainer.progress.bad == []
    assert len(trainer.val_source) == 2 * 3 - 1 + 4


# --- digits ---------------------------------------------------------------------------------------------------


def test_digits_are_written_once_stratified_and_always_the_same(tmp_path):
    folder = write_digits(tmp_path / "digits")
    counts = {split: [len(list((folder / split / str(n)).iterdir())) for n in range(10)] for split in ("train", "val")}
    assert sum(counts["train"]) == 1438
    assert sum(counts["val"]) == 359
    for train, val in zip(counts["train"], counts["val"], strict=True):
        assert abs(val - (train + val) / 5) <= 0.5
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    assert hashlib.sha256("\n".join(map(str, files)).encode()).hexdigest()[:16] == "bea92a017fc92df0"
    assert len({path.name for path in files}) == 1797  # no image on both sides
    first = folder / files[0]
    first.unlink()
    write_digits(folder)
    assert not first.exists()  # a folder that is there is left as it is
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_digits_recipe_writes_what_it_trains_on(tmp_path):
    config = TrainConfig.read(CONFIGS[0].parent / "digits.yaml", [f"data={tmp_path / 'digits'}"])
    train, val = open_sources(config)
    assert (len(train), len(val)) == (1438, 359)
    assert train.class_names == val.class_names == tuple("0123456789")
    assert config.pretrained  # the quick start's other run is the one from scratch


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_finetune_reaches_what_it_promises(tmp_path):
    recipe = CONFIGS[0].parent / "digits.yaml"
    assert main(["train", "--config", str(recipe), f"data={tmp_path / 'digits'}", f"run={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run" / "best" / "metrics.json").read_text())["top1"] >= 98.0


# --- recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_says_what_it_is_and_builds(path):
    opening = path.read_text(encoding="utf-8").partition("\n\n")[0]
    assert all(line.startswith("#") for line in opening.splitlines())
    for word in (f"glattn train --config configs/{path.name}", "Hardware:", "Time:", "Expected:"):
        assert word in opening
    config = TrainConfig.read(path)
    with torch.device("meta"):
        model = timm.create_model(config.model, num_classes=7, **config.model_args)
    assert build.data_config_of(model, config)["input_size"][0] == 3
    assert build_optimizer(config, model, type("T", (), {"get_trainable_module": lambda _: model})()).param_groups
    BatchAugment(config, 7, CPU)


DOCS = (CONFIGS[0].parent.parent / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_guides_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    exec(block, {})
    assert (tmp_path / "runs" / "mine" / "best" / "model.safetensors").exists()


def test_the_guides_accelerate_configuration_is_one(tmp_path):
    (block,) = blocks("yaml")
    (tmp_path / "fsdp.yaml").write_text(block)
    config = ClusterConfig.from_yaml_file(str(tmp_path / "fsdp.yaml"))
    assert config.distributed_type == "FSDP"
    assert set(config.fsdp_config) <= {action.dest for action in launch_command_parser()._actions}


def test_the_guide_names_keys_that_exist():
    keys = {item.name for item in dataclasses.fields(TrainConfig)}
    named = set(re.findall(r"`([a-z_]+)=[^`]+`", DOCS))
    assert len(named) > 10
    assert named <= keys


# --- what the user gets wrong ---------------------------------------------------------------------------------

MISTAKES = {
    "epoch=3": "unknown key 'epoch'; did you mean 'epochs'?",
    "learning_rate=1": "unknown key 'learning_rate'",
    "optimzer=sgd": "did you mean 'optimizer'?",
    "zzz=1": "`glattn train --help` lists the keys",
    "epochs=many": "epochs='many' is a str; it must be a whole number",
    "epochs=2.5": "epochs=2.5 is a float; it must be a whole number",
    "lr=fast": "lr='fast' is a str; it must be a number",
    "lr=nan": "it must be a number",
    "hflip=yes": "hflip=True is a bool; it must be a number",
    "pretrained=1": "pretrained=1 is a int; it must be a true or false",
    "freeze=stages_": "freeze='stages_': allowed is none or stem or stages or backbone; did you mean 'stages'?",
    "drop_rate=1.5": "drop_rate=1.5 is out of range: allowed is 0 to 1",
    "batch_size=0": "batch_size=0 is out of range",
    "workers=99999999999": "workers=99999999999 is out of range: allowed is 0 to 1024",
    "image_size=100000": "image_size=100000 is out of range",
    "warmup_epochs=.inf": "warmup_epochs=inf is out of range",
    "color_jitter=.inf": "color_jitter=inf is out of range",
    "optimizer_args.betas=[0.9]": "optimizer='adamw'",
    "crop_ratio=0": "crop_ratio=0.0 is out of range",
    "resume=always": "resume='always': allowed is 'auto' or nothing",
    "compile_mode=reduce-overhead": "does nothing without compile=true",
    "compile=true compile_mode=reduce-overhead accumulate=2": "loses gradients between the parts of accumulate=2",
    "distill_weight=0.9": "distill_weight=0.9 does nothing without teacher=MODEL",
    "teacher_checkpoint=x": "teacher_checkpoint=x does nothing without teacher=MODEL",
    "precision=fp16": "precision=fp16: a CPU does not train in it",
    "val_split=tset": "val_split='tset': no such folder in",
    "data=~nobody/x": "no folder '~nobody/x'",
    "seed=2020-13-45": "seed='2020-13-45' is a str; it must be a whole number",
    "model_args.act_layer=swishh": "act_layer='swishh' is not one of",
    "model=test_resnet model_args.act_layer=swishh": "'swishh' is none of what an option of it takes",
    "model_args={1: 2}": "1 is no keyword",
    "model_args.features_only=true": "model_args.features_only: take it out",
    "model=hf-hub:org/nope@x@y": "hf-hub:org/nope",
    "epochs": "'epochs' is no key=value",
    "lr.x=1": "'lr' holds no keys of its own",
    "optimizer=adamwish": "optimizer='adamwish'",
    "optimizer_args.bets=1": "optimizer='adamw'",
    "optimizer=adahessian": "optimizer='adahessian': it needs second derivatives",
    "model=test_glatn": "unknown model 'test_glatn'; did you mean 'test_glattn'?",
    "model_args.head_dimm=32": "head_dimm",
    "model_args.in_chans=1": "the model takes 1 channel(s)",
    "model_args.in_chans=1 image_size=null": "the model takes 1 channel(s)",
    "auto_augment=randy": "auto_augment='randy' or ",
    "schedule=cosin": "schedule='cosin'",
    "interpolation=cubic": "interpolation='cubic' is unknown to timm",
    "batch_size=9 accumulate=2": "batch_size=9 does not divide",
    "checkpoint=/nowhere.safetensors": "no checkpoint '/nowhere.safetensors'",
    "teacher=test_resnett": "unknown model 'test_resnett'",
    "data=/nowhere": "no folder '/nowhere'",
    f"run={__file__}": "is a file; give a folder",
    "run=caf\udce9": "run=caf\\udce9: the name is no UTF-8",
    "tracker=tensorbord": "tensorbord",
    "tracker=aim": "tracker=aim: its package is not installed",
    "dataset=hfds": "dataset='hfds'",
    "dataset=torch/cifar10 data=": "dataset='torch/cifar10' needs data=FOLDER",
    "loss=bce label_smoothing=1": "label_smoothing=1: loss=bce takes less than 1",
    "epoch_samples=5": "epoch_samples=5 with dataset='': only pictures of dataset=fractals or dataset=contours",
    "instances=2 dataset=contour": "instances=2 with dataset='contour': only pictures of dataset=fractals",
    "pretrained=true checkpoint=a.safetensors": "checkpoint=a.safetensors: both say what to start from",
}


@pytest.mark.parametrize("tracker", ["auto", "tensorboard"])
def test_a_tracker_that_is_installed_is_taken(tracker):
    pytest.importorskip("tensorboard")
    accelerator = start_accelerator(TrainConfig(device="cpu", tracker=tracker))
    assert [str(kind) for kind in accelerator.log_with] == ["tensorboard"]


def test_fp16_on_a_cpu_is_refused_after_another_run_in_the_process():
    start_accelerator(TrainConfig(device="cpu", tracker="none"))
    with pytest.raises(ValueError, match="a CPU does not train in it"):
        start_accelerator(TrainConfig(device="cpu", tracker="none", precision="fp16"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(mistake, images, tmp_path, capsys):
    options = [f"{name}={value}" for name, value in {**QUICK, "data": images, "run": tmp_path / "run"}.items()]
    assert main(["train", *options, *re.split(r" (?=[a-z_.]+=)", mistake)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("glattn train: ")
    assert said.count("\n") == 1, said
    assert MISTAKES[mistake] in said
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_mistakes_in_recipes_name_the_recipe(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    for text, expected in (
        ("epocs: 3", f"unknown key 'epocs' in {recipe}; did you mean 'epochs'?"),
        ("- a\n- b", "a recipe is a list of `key: value` lines"),
        ("lr: [", "is no YAML"),
        ("lr: 1\nepochs: 3\nlr: 2", f"{recipe} says 'lr' twice"),
        ("model_args:\n  head_dim: 16\n  head_dim: 32", f"{recipe} says 'head_dim' twice"),
        ("model_args: &a\n  b: *a", f"{recipe} is no recipe: a mapping in it holds itself"),
        ("seed: 2020-13-45", f"{recipe} is no YAML: month must be in 1..12"),
    ):
        recipe.write_text(text)
        assert main(["train", "--config", str(recipe)]) == 1
        assert expected in capsys.readouterr().err
    for path in (str(tmp_path / "none.yaml"), ""):
        assert main(["train", "--config", path]) == 1
        assert "no recipe" in capsys.readouterr().err
    assert main(["train"]) == 1
    assert "no images given" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("glattn.training.loop.train", interrupted)
    assert main(["train", "--data", "anything"]) == 130
    assert "--resume auto (and run=FOLDER)" in capsys.readouterr().err


def _not_on_an_accelerator(config):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "fill", [lambda config: torch.empty(2**60), lambda config: bytes(2**60), _not_on_an_accelerator]
)
def test_memory_that_does_not_suffice_is_one_line_with_advice(fill, monkeypatch, capsys):
    monkeypatch.setattr("glattn.training.loop.train", fill)
    assert main(["train", "--data", "anything"]) == 1
    said = capsys.readouterr().err
    assert "glattn train: out of memory; give fewer images at a time" in said
    assert said.count("\n") == 1, said


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("glattn.training.loop.train", lambda config: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(["train", "--data", "anything"])


def test_keys_stand_before_between_and_behind_options(monkeypatch, capsys):
    read = []
    monkeypatch.setattr("glattn.training.command.run", lambda args: read.append(resolve(args)) or 0)
    assert main(["train", "lr=0.5", "seed=3", "--model", "test_glattn", "batch_size=7", "--epochs", "2", "keep=1"]) == 0
    config = read[0]
    assert (config.lr, config.seed, config.model, config.batch_size, config.epochs, config.keep) == (
        0.5, 3, "test_glattn", 7, 2, 1,
    )  # fmt: skip
    for wrong in (["--model", "m", "--speed=3"], ["--model", "m", "lr=1", "--epochs", "2", "word"]):
        with pytest.raises(SystemExit):
            main(["train", *wrong])
        assert wrong[-1] in capsys.readouterr().err
    assert len(read) == 1


@pytest.mark.parametrize("typed", ["photos #2", "001", "1_000", "1:30", "2026-10-12", "null", "no", "[a", "'x'"])
def test_text_is_taken_as_typed(typed, monkeypatch, tmp_path):
    read = []
    monkeypatch.setattr("glattn.training.command.run", lambda args: read.append(resolve(args)) or 0)
    given = [f"--data={typed}", f"--model={typed}", f"--run={typed}", f"checkpoint={typed}", f"teacher={typed}"]
    assert main(["train", *given]) == 0
    (tmp_path / "config.yaml").write_text(read[0].to_yaml())
    for config in (read[0], TrainConfig.read(tmp_path / "config.yaml")):
        assert {getattr(config, name) for name in ("data", "model", "run", "checkpoint", "teacher")} == {typed}


def test_configuration_survives_yaml_and_help_lists_every_key(tmp_path, capsys):
    config = TrainConfig.read(
        None,
        ["lr=1e-4", "model_args.head_dim=16", "optimizer_args.eps=1e-6", "hflip=0", "layer_decay=0.7", "freeze=none"],
    )
    assert (config.lr, config.model_args, config.hflip, config.layer_decay) == (1e-4, {"head_dim": 16}, 0.0, 0.7)
    assert config.optimizer_args == {"eps": 1e-6}
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.read(tmp_path / "config.yaml") == config
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for name, value in yaml.safe_load(TrainConfig().to_yaml()).items():
        assert f"\n  {name}=" in said, (name, value)


# --- options: each asserted to have done what it says ---------------------------------------------------------

MODELS = pytest.mark.parametrize("model", ["test_glattn", "test_resnet"])


@MODELS
@pytest.mark.parametrize("freeze", ["stem", "stages", "backbone"])
def test_frozen_layers_and_their_statistics_do_not_move(model, freeze, trainer):
    t = trainer(model=model, freeze=freeze, ema_decay=0.9, lr=1e-2)
    before = weights_of(t.model)
    t.train_epoch()
    changed = moved(t.model, before)
    tops = {".".join(name.split(".")[: 2 if name.startswith("stages") else 1]) for name in changed}
    allowed = {
        "test_glattn": {"backbone": {"head"}, "stages": {"head", "stages.3"}},
        "test_resnet": {"backbone": {"fc"}, "stages": {"fc", "layer4"}},
    }[model]
    if freeze == "stem":
        first = {"test_glattn": {"stem", "stages.0"}, "test_resnet": {"conv1", "bn1", "layer1"}}[model]
        assert not tops & first
        assert len(tops) == 4
    else:
        assert tops == allowed[freeze]


@MODELS
@pytest.mark.parametrize("schedule", ["cosine", "none"])
def test_layer_decay_lowers_the_rate_layer_by_layer(model, schedule, trainer):
    t = trainer(model=model, schedule=schedule, layer_decay=0.5, lr=1e-2, weight_decay=0.1)
    rate = {id(p): group["lr"] for group in t.optimizer.param_groups for p in group["params"]}
    by_name = {name: rate[id(p)] for name, p in t.model.named_parameters()}
    first, *_, last = by_name
    assert by_name[last] == pytest.approx(1e-2)
    assert by_name[first] < by_name[last] / 10
    assert len(set(by_name.values())) >= 4
    assert list(by_name.values()) == sorted(by_name.values())
    decay = {id(p): group["weight_decay"] for group in t.optimizer.param_groups for p in group["params"]}
    for name, p in t.model.named_parameters():
        assert decay[id(p)] == (0 if p.ndim <= 1 else 0.1) or "table" in name


def test_warmup_and_cosine(trainer):
    t = trainer(epochs=4, warmup_epochs=1, warmup_lr=1e-5, lr=1e-2, min_lr=1e-4)
    rates = []
    step = t.scheduler.step_update
    t.scheduler.step_update = lambda n: (step(n), rates.append(t.lr))
    train_only(t, 4)
    assert len(rates) == 12
    assert rates[0] < rates[1] < rates[2]
    for number in range(2, 12):
        expected = 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * (number + 1) / 12)) / 2
        assert rates[number] == pytest.approx(expected)


def test_a_polynomial_falls_evenly(trainer):
    t = trainer(epochs=4, schedule="poly", lr=1e-2, min_lr=1e-4)
    rates = []
    step = t.scheduler.step_update
    t.scheduler.step_update = lambda n: (step(n), rates.append(t.lr))
    train_only(t, 4)
    falls = [before - after for before, after in itertools.pairwise(rates)]
    assert falls == pytest.approx([(1e-2 - 1e-4) / 12] * 11, rel=1e-3)


def test_no_more_images_are_validated_at_once_than_trained(trainer):
    t = trainer(accumulate=4)
    assert {len(images) for images, _ in t.train_loader} == {2}
    assert {len(images) for images, _ in t.val_loader} == {2}


def test_a_run_that_goes_on_asks_for_no_weights_to_start_from(monkeypatch):
    asked = []
    monkeypatch.setattr(build, "create_model", lambda name, **options: asked.append(options) or timm.create_model(name))
    config = TrainConfig(**QUICK, data="x", pretrained=True)
    for start in (True, False):
        build.build_model(config, 3, start=start)
    assert [options["pretrained"] for options in asked] == [True, False]


def test_ema_is_what_is_validated_and_saved(trainer):
    t = trainer(ema_decay=0.5, ema_warmup=False, lr=1e-2)
    t.run()
    saved = load_file(t.folder / "best" / "model.safetensors")
    assert moved(t.model, saved)
    assert not moved(t.eval_model, saved)


def test_ema_follows_its_formula(trainer):
    t = trainer(ema_decay=0.75, ema_warmup=False, lr=1e-2)
    name, parameter = next(iter(t.model.named_parameters()))
    expected = parameter.detach().clone()
    update = t.task.update_ema

    def watched(step):
        expected.lerp_(parameter.detach(), 0.25 if step > 1 else 1.0)  # it starts from the first step's weights
        update(step)

    t.task.update_ema = watched
    t.train_epoch()
    torch.testing.assert_close(t.eval_model.state_dict()[name], expected)


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_mixing_mixes_until_it_is_switched_off(option, images):
    config = TrainConfig(**{**QUICK, option: 1.0, "mixup_off_epoch": 2, "label_smoothing": 0.0})
    augment = BatchAugment(config, 3, CPU)
    x, targets = torch.rand(7, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2, 0])  # an odd number
    torch.manual_seed(0)
    mixed, soft = augment(x.clone(), targets[:, None], 1)
    assert mixed.shape == x.shape
    assert soft.shape == (7, 3)
    assert torch.allclose(soft.sum(1), torch.ones(7))
    assert ((soft > 0.01) & (soft < 0.99)).any()
    assert not torch.equal(mixed, x)
    plain, hard = augment(x.clone(), targets[:, None], 2)
    assert torch.equal(plain, x)
    assert torch.equal(hard.argmax(1), targets)
    assert hard.max() > 0.999


def test_random_erasing_erases():
    augment = BatchAugment(TrainConfig(**QUICK, random_erase=1.0), 3, CPU)
    x = torch.zeros(4, 3, 32, 32)
    erased, _ = augment(x.clone(), torch.zeros(4, 1, dtype=torch.long), 0)
    assert (erased != 0).any(dim=(1, 2, 3)).all()


@MODELS
@pytest.mark.parametrize("option", [{"mixup": 0.8}, {"cutmix": 1.0, "loss": "bce"}, {"loss": "bce"}])
def test_mixed_and_binary_losses_train(option, model, trainer):
    t = trainer(model=model, epochs=1, **option)
    before = weights_of(t.model)
    assert math.isfinite(t.train_epoch())
    assert moved(t.model, before)


@pytest.mark.parametrize("model", ["levit_128s", "test_vit"])  # which is told its size when made, which afterwards
def test_a_model_of_a_fixed_size_is_made_for_the_images(model):
    config = TrainConfig(**QUICK | {"model": model, "image_size": 64})
    assert build.build_model(config, 2).eval()(torch.rand(1, 3, 64, 64)).shape == (1, 2)


def test_what_the_run_sets_is_no_argument_of_the_model():
    with pytest.raises(ValueError, match="num_classes: take it out"):
        build.build_model(TrainConfig(**QUICK, model_args={"num_classes": 5}), 2)


def test_class_weights_balance_the_loss(tmp_path):
    for name, count in (("few", 2), ("many", 6)):
        write_class(tmp_path / "data" / name, COLOURS["red"], count)
    train, _ = open_sources(TrainConfig(data=str(tmp_path / "data"), val_fraction=0.2))
    config = TrainConfig(**QUICK, class_weights="balanced", label_smoothing=0.0)
    model = build.build_model(config, 2)
    task = build.build_task(config, model, train.class_names, train.class_counts(), CPU)
    weight = task.criterion.weight
    assert train.class_counts().tolist() == [1, 5]
    assert torch.allclose(weight * torch.tensor([1.0, 5.0]), torch.tensor([3.0, 3.0]))
    logits, targets = torch.randn(8, 2), torch.tensor([0, 0, 0, 0, 1, 1, 1, 0])
    parts = [task.criterion(*part) for part in zip(logits.split(4), targets.split(4), strict=True)]
    torch.testing.assert_close(task.criterion(logits, targets), sum(parts) / 2)  # accumulated or in two processes
    plain = build.build_task(TrainConfig(**QUICK), model, train.class_names, train.class_counts(), CPU)
    assert plain.criterion.weight is None
    unseen = build.build_task(config, model, train.class_names, np.array([0, 6]), CPU)  # of drawn ones, a few are
    assert unseen.criterion.weight.isfinite().all()


def test_a_folder_is_trained_in_by_one_process_at_a_time(trainer, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.0)
    first = trainer()
    again = dataclasses.replace(first.config, resume="auto")
    with pytest.raises(ValueError, match="another process trains in"):
        Trainer(again)
    first.run()
    second = Trainer(again)
    assert second.progress.epoch == first.progress.epoch == first.config.epochs


def test_a_run_that_has_come_and_gone_meanwhile_keeps_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(model="test_glattn", data="images")
    with contextlib.ExitStack() as stack:
        taken = run_folder.claim(config, stack)

    choices = iter([taken, *[tmp_path / "other"] * 3])
    monkeypatch.setattr(run_folder, "choose_folder", lambda config: next(choices))
    with contextlib.ExitStack() as stack:
        assert run_folder.claim(config, stack) == tmp_path / "other"
        assert not taken.exists()
    assert not (tmp_path / "other").exists()


@MODELS
def test_accumulated_parts_are_one_batch(model, trainer):
    # norms in eval mode: a part's statistics are its own
    updates, losses = [], []
    for parts in (1, 4):
        t = trainer(
            model=model, accumulate=parts, batch_size=8, optimizer="momentum", lr=0.1, clip_grad=None, epochs=1,
            optimizer_args={"momentum": 0.0}, label_smoothing=0.0, hflip=0.0,
        )  # fmt: skip
        t.frozen = list(t.model.modules())
        before = weights_of(t.model)
        losses.append(t.train_epoch())
        assert t.progress.step == 3
        updates.append({name: value - before[name] for name, value in t.model.state_dict().items()})
    for name, update in updates[0].items():
        torch.testing.assert_close(updates[1][name], update, rtol=1e-3, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)  # a part sees the weights of its step


def test_the_speed_of_an_epoch_that_goes_on_is_that_of_what_was_left(trainer, monkeypatch):
    t, clock = trainer(epochs=1), itertools.count(step=10)
    t.progress.step = t.steps - 1
    monkeypatch.setattr(t, "train_epoch", lambda: 0.5)
    monkeypatch.setattr("glattn.training.loop.time", SimpleNamespace(monotonic=lambda: next(clock)))
    t.run()
    assert t.progress.rows[0]["images_per_second"] == t.batches.batch_size / 10


def test_clipping_bounds_the_update(trainer):
    norms = []
    for clip in (None, 1e-3):
        t = trainer(
            clip_grad=clip, optimizer="momentum", lr=1.0, optimizer_args={"momentum": 0.0}, weight_decay=0.0,
            batch_size=24,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
        t.train_epoch()
        after = dict(t.model.named_parameters())
        norms.append(torch.cat([(after[n] - before[n]).flatten() for n in before]).norm().item())
    assert norms[0] > 1e-2
    assert norms[1] <= 1e-3 * 1.01


def test_early_stop(trainer, capsys):
    t = trainer(epochs=20, early_stop=2)
    t.train_epoch = lambda: 1.0  # nothing is learnt
    t.run()
    assert t.progress.epoch == 3
    assert "stopped early: no better top-1 for 2 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(("metric", "kept", "said"), [("top1", 1, "top-1"), ("loss", 2, "validation loss")])
def test_the_epoch_kept_is_the_best_by_the_metric_asked_for(trainer, monkeypatch, capsys, metric, kept, said):
    found = iter([(90.0, 1.0), (80.0, 0.5), (70.0, 0.8), (60.0, 0.7), (50.0, 0.9)])
    measured = Predictions.metrics

    def metrics(self):
        return measured(self) | shown

    t = trainer(epochs=5, eval_metric=metric, early_stop=2)
    monkeypatch.setattr(Predictions, "metrics", metrics)
    validate = t.validate

    def validated():
        nonlocal shown
        shown = dict(zip(("top1", "loss"), next(found), strict=True))
        return validate()

    shown, t.validate, t.train_epoch = {}, validated, lambda: 1.0
    folder = t.run()
    assert t.progress.best["epoch"] == json.loads((folder / "best" / "metrics.json").read_text())["epoch"] == kept
    assert t.progress.epoch == kept + 2
    assert f"no better {said} for 2 epochs" in capsys.readouterr().out


def test_divergence_is_said(trainer):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf)"):
        trainer(lr=1e12, min_lr=1e12, optimizer="sgd", clip_grad=None, epochs=2).run()


def test_a_model_that_has_become_no_number_is_not_kept(trainer):
    t = trainer(epochs=2)
    t.train_epoch = lambda: 1.0
    with torch.no_grad():
        t.model.get_classifier().bias.fill_(math.nan)
    with pytest.raises(ValueError, match="the validation loss is nan in epoch 1"):
        t.run()
    assert not (t.folder / "best").exists()


def test_training_needs_no_standard_output(images, tmp_path):
    options = [f"{name}={value}" for name, value in {**QUICK, "data": images, "run": tmp_path / "run"}.items()]
    command = shlex.join([sys.executable, "-m", "glattn", "train", *options, "epochs=1"])
    assert subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, check=True).stderr.count(b"Error") == 0
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


def test_grad_checkpointing_recomputes_and_changes_nothing(trainer):
    losses, calls = [], []
    for on in (False, True):
        t = trainer(grad_checkpointing=on, drop_path_rate=0.0)
        seen = []
        # before the block: its recomputation ends as soon as the last tensor is there
        t.model.stages[0].blocks[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        losses.append(t.train_epoch())
        calls.append(len(seen))
    assert calls == [3, 6]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(trainer):
    t = trainer(precision="bf16")
    seen = set()
    t.model.stages[0].blocks[0].mlp.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    assert math.isfinite(t.train_epoch())
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in t.model.parameters()} == {torch.float32}


def test_channels_last_reaches_the_model(trainer):
    for on in (True, False):
        t = trainer(channels_last=on)
        seen = set()
        t.model.stem.register_forward_pre_hook(
            lambda m, args, seen=seen: seen.add(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        t.train_epoch()
        assert seen == {on}


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_training_learns_the_same(trainer):
    losses = [trainer(compile=on).train_epoch() for on in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_start_from_a_checkpoint_with_other_classes(trainer, tmp_path):
    source = timm.create_model("test_glattn", num_classes=11)
    save_file(source.state_dict(), tmp_path / "start.safetensors")
    t = trainer(checkpoint=str(tmp_path / "start.safetensors"))
    differing = moved(
        t.model, {**t.model.state_dict(), **{k: v for k, v in source.state_dict().items() if "head.fc" not in k}}
    )
    assert differing == set()
    assert t.model.num_classes == 3
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors is of another model: it lacks"):
        trainer(checkpoint=str(tmp_path / "other.safetensors"))
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "start.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        trainer(checkpoint=str(tmp_path / "torn.safetensors"))
    save_weights(source, tmp_path / "ours.safetensors")
    content = bytearray((tmp_path / "ours.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "ours.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        trainer(checkpoint=str(tmp_path / "ours.safetensors"))
    source.stem.conv1.bn.weight.data[0] = math.nan
    save_file(source.state_dict(), tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"stem.conv1.bn.weight has 1 of .* NaN"):
        trainer(checkpoint=str(tmp_path / "nan.safetensors"))


def test_a_run_goes_on_without_what_it_started_from(trainer, tmp_path):
    start = tmp_path / "start.safetensors"
    save_file(timm.create_model("test_glattn", num_classes=3).state_dict(), start)
    first = trainer(checkpoint=str(start), epochs=1)
    first.run()
    start.unlink()
    options = {"checkpoint": str(start), "epochs": 2, "run": str(first.folder)}
    went_on = trainer(**options, resume="auto")
    assert went_on.progress.epoch == 1
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        trainer(**options | {"run": str(tmp_path / "anew")}, resume="auto")


# --- distillation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong_teacher(tmp_path_factory):
    """Return a checkpoint of a teacher that calls each colour by the next one's name."""
    root = tmp_path_factory.mktemp("wrong")
    for split, count, seed in (("train", 8, 0), ("val", 4, 1000)):
        for name, other in zip(COLOURS, [*list(COLOURS)[1:], next(iter(COLOURS))], strict=True):
            write_class(root / "data" / split / other, COLOURS[name], count, seed=seed)
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {**QUICK, "epochs": 6, "lr": 5e-3, "model": "test_resnet", "label_smoothing": 0.0}
    t = Trainer(TrainConfig(**options, data=str(root / "data"), run=str(root / "run")))
    t.run()
    assert t.progress.best["top1"] > 99
    return str(root / "run" / "best" / "model.safetensors")


@pytest.mark.parametrize("distill", ["logits", "features"])
def test_a_teacher_of_one_size_takes_the_images_size(images, tmp_path, distill):
    path, teacher = tmp_path / "teacher.safetensors", "vit_tiny_patch16_224"
    save_weights(timm.create_model(teacher, num_classes=3), path)
    given = [f"{key}={value}" for key, value in QUICK.items()] + [f"teacher_checkpoint={path}", f"teacher={teacher}"]
    assert main(["train", "--data", str(images), f"run={tmp_path / 'run'}", f"distill={distill}", *given]) == 0


@MODELS
def test_logit_distillation_teaches_what_the_teacher_believes(model, wrong_teacher, trainer):
    t = trainer(
        model=model, teacher="test_resnet", teacher_checkpoint=wrong_teacher, distill_weight=1.0, epochs=8, lr=5e-3
    )
    before = weights_of(t.task.teacher)
    train_only(t, 8)
    predictions = t.validate()
    assert (predictions.predicted == (predictions.target + 1) % 3).mean() > 0.9  # not what the folders say
    assert not moved(t.task.teacher, before)


def test_a_teacher_without_these_classes_has_no_logits_to_teach(trainer, wrong_teacher, tmp_path):
    save_file(timm.create_model("test_resnet", num_classes=11).state_dict(), tmp_path / "other.safetensors")
    for teacher in (
        {"teacher": "test_resnet", "teacher_checkpoint": str(tmp_path / "other.safetensors")},
        {"teacher": "glattn_atto"},  # of a thousand contours
    ):
        with pytest.raises(ValueError, match="classifier is not of the data's 3 classes"):
            trainer(**teacher)
        trainer(**teacher, distill="features")
    folder = Path(wrong_teacher).parent
    trainer(teacher=f"local-dir:{folder}")
    config = json.loads((folder / "config.json").read_text())
    config["label_names"].reverse()
    shutil.copytree(folder, tmp_path / "turned")
    (tmp_path / "turned" / "config.json").write_text(json.dumps(config))
    for teacher in (
        {"teacher": f"local-dir:{tmp_path / 'turned'}"},
        {"teacher": "test_resnet", "teacher_checkpoint": str(tmp_path / "turned" / "model.safetensors")},
    ):
        with pytest.raises(ValueError, match="classifier is not of the data's 3 classes"):
            trainer(**teacher)
    config["label_names"] = {str(number): name for number, name in enumerate(config["label_names"])}
    (tmp_path / "turned" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="classifier is not of the data's 3 classes"):
        trainer(teacher=f"local-dir:{tmp_path / 'turned'}")
    config["label_names"] = ["n01", "n02", "n03"]  # of the same, for all that is known
    (tmp_path / "turned" / "config.json").write_text(json.dumps(config))
    trainer(teacher=f"local-dir:{tmp_path / 'turned'}")


@MODELS
def test_feature_distillation_draws_the_features_near(model, wrong_teacher, trainer):
    t = trainer(
        model=model, teacher="test_resnet", teacher_checkpoint=wrong_teacher, distill="features", distill_weight=1.0,
        epochs=4, lr=5e-3,
    )  # fmt: skip
    before = weights_of(t.task)
    losses = train_only(t, 4)
    assert losses[-1] < 0.8 * losses[0]
    changed = moved(t.task, before)
    projects = t.model.num_features != t.task.teacher.model.num_features
    assert projects == (model == "test_glattn")
    assert projects == any("projection" in name for name in changed)
    assert not any(name.startswith("teacher.") for name in changed)
    t.export(t.validate())
    saved = load_file(t.folder / "best" / "model.safetensors")
    assert saved.keys() == t.model.state_dict().keys()  # the student alone


@pytest.mark.skipif(sys.platform != "linux", reason="memory is handed back to the system in other ways")
def test_training_on_a_cpu_keeps_what_it_frees():
    code = """if True:
        import torch
        from glattn.training.config import TrainConfig
        from glattn.training.distributed import start_accelerator

        def resident():
            return int(open("/proc/self/statm").read().split()[1])

        def shed():  # pages, of 51,200
            large = torch.ones(50 * 2**20)
            held = resident()
            del large
            return held - resident()

        before = shed()
        start_accelerator(TrainConfig(device="cpu", tracker="none"))
        print(before, shed())
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split()[-2:])
    if before < 40_000:
        pytest.skip("this C library keeps it by itself")
    assert after < 5_000


@pytest.mark.parametrize("schedule", ["step", "multistep"])
def test_steps_fall_at_each_third_of_the_epochs(schedule):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(TrainConfig(schedule=schedule, epochs=9, warmup_epochs=0, lr=1.0), optimizer, 4)
    rates = []
    for update in range(9 * 4 - 1):
        scheduler.step_update(update + 1)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[::4] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])
