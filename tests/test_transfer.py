"""Transfer: which images each seed sees, how each arm starts, and what is written; the quick start's summary."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import compare_runs
import make_weights
import run_proxies
import transfer

from glattn.training.checkpoint import export
from glattn.training.config import TrainConfig

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "icons.yaml"


def drawings(root: Path, *splits: str) -> Path:
    """Write eight images of each of two classes to each split, no two of them alike in name."""
    for split in splits:
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for number in range(8):
                Image.new("L", (32, 32), 10 * number).save(root / split / label / f"{split}{label}{number}.png")
    return root


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.png")}


def test_few_images_are_chosen_by_seed_and_the_test_is_whole(tmp_path):
    source = drawings(tmp_path / "icons", "train", "val", "test")
    chosen = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(chosen):
        transfer.choose(source, folder, 3, seed)
        assert [len(names(folder / "train" / label)) for label in "ab"] == [3, 3]
        assert names(folder / "train") < names(source / "train")
        assert names(folder / "val") == names(source / "val")  # up to twenty a class
        assert names(folder / "test") == names(source / "test")
    assert names(chosen[0] / "train") != names(chosen[1] / "train")
    transfer.choose(source, tmp_path / "again", 3, 0)
    assert names(tmp_path / "again") == names(chosen[0])
    # as every result so far was chosen
    assert sorted(names(chosen[0] / "train")) == [f"train{each}.png" for each in ("a0", "a1", "a3", "b2", "b4", "b5")]


def test_a_class_without_validation_images_has_no_folder_of_them(tmp_path):
    source = drawings(tmp_path / "icons", "train", "val", "test")
    for image in (source / "val" / "a").iterdir():
        image.unlink()
    transfer.choose(source, tmp_path / "few", 2, 0)
    assert [path.name for path in (tmp_path / "few" / "val").iterdir()] == ["b"]


def test_a_task_is_named_by_its_images_and_shots():
    assert transfer.find_task("icons100-10shot") is transfer.TASKS["icons100-10shot"]
    other = transfer.find_task("digits-2shot")
    assert (other.data, other.shots) == ("data/digits", 2)
    assert other.settings == (*transfer.TASKS["digits-5shot"].settings, "partial_val=true")
    assert transfer.find_task("mine").data == "data/mine"
    few = transfer.find_task("my-drawings-3shot")
    assert (few.data, few.shots, "partial_val=true" in few.settings) == ("data/my-drawings", 3, True)


def test_what_has_no_test_of_its_own_is_tested_on_what_was_held_out(tmp_path):
    source = drawings(tmp_path / "digits", "train", "val")
    transfer.choose(source, tmp_path / "few", 2, 0)
    few = {split: names(tmp_path / "few" / split) for split in ("train", "val", "test")}
    assert few["test"] == names(source / "val")
    assert few["train"] | few["val"] == names(source / "train")
    assert not few["train"] & few["val"]
    assert len(few["train"]) == 4
    transfer.choose(source, tmp_path / "all", 0, 0)
    whole = {split: names(tmp_path / "all" / split) for split in ("train", "val", "test")}
    assert whole["test"] == names(source / "val")
    assert whole["train"] | whole["val"] == names(source / "train")
    assert [len(whole[split]) for split in ("train", "val")] == [14, 2]


def test_shots_are_never_validated_on(tmp_path):
    source = drawings(tmp_path / "icons", "train", "test")
    transfer.choose(source, tmp_path / "few", 6, 0)
    assert [len(names(tmp_path / "few" / split)) for split in ("train", "val", "test")] == [12, 4, 16]
    with pytest.raises(ValueError, match=r"fewer shots than 8, or a val/"):
        transfer.choose(source, tmp_path / "none", 8, 0)
    assert not (tmp_path / "none").exists()


def test_images_of_any_kind_and_splits_of_any_name_are_taken(tmp_path):
    source = drawings(tmp_path / "photos", "training", "validation")
    for path in sorted(source.rglob("*.png")):
        path.rename(path.with_suffix(".JPG"))
    (source / "training" / "a" / "notes.txt").write_text("no image")
    for split in ("training", "validation"):
        (source / split / "a" / ".ipynb_checkpoints").mkdir()
        (source / split / "a" / ".ipynb_checkpoints" / "x.png").touch()
    assert run_proxies.tested_split(source) == "validation"
    tested = run_proxies.survey(source)[0]
    assert (len(tested), tested[0]) == (16, "a/validationa0.JPG")
    transfer.choose(source, tmp_path / "few", 3, 0)
    assert [len(list((tmp_path / "few" / "train").rglob(f"*.{kind}"))) for kind in ("JPG", "png")] == [6, 0]
    assert len(list((tmp_path / "few" / "test").rglob("*.JPG"))) == 16
    with pytest.raises(FileNotFoundError, match=r"no test/ and no val/"):
        run_proxies.survey(drawings(tmp_path / "alone", "train"))


def test_classes_lie_in_any_folder_below_a_split(tmp_path):
    source = drawings(tmp_path / "icons", "train", "val", "test")
    for split in ("train", "test"):
        (source / split / "group").mkdir()
        (source / split / "a").rename(source / split / "group" / "a")
    transfer.choose(source, tmp_path / "few", 3, 0)
    for split, count in (("train", 3), ("val", 8), ("test", 8)):
        where = Path("group/a") if split != "val" else Path("a")
        assert len(list((tmp_path / "few" / split / where).iterdir())) == count
        assert len(list((tmp_path / "few" / split / "b").iterdir())) == count
    assert run_proxies.survey(tmp_path / "few")[0] == run_proxies.survey(source)[0]


def test_all_images_without_a_val_are_validated_on_a_fifth(tmp_path):
    source = drawings(tmp_path / "icons", "train", "test")
    for image in sorted((source / "train" / "a").iterdir())[1:]:
        image.unlink()
    folders = {"runs": tmp_path / "runs", "out": tmp_path / "out", "end": 0.0}
    args = SimpleNamespace(arms=["test_glattn:scratch"], config=RECIPE, lr=[0.001], seeds=None, **folders)
    few = transfer.Transfer("icons", transfer.Task(str(source), 0, (0,), ()), args).chosen_data(0)
    assert [len(names(few / split)) for split in ("train", "val", "test")] == [8, 1, 16]


DRAWN = "dataset: contours\nimage_size: 32\n"


def pretrained(run: Path) -> torch.nn.Module:
    """Write a run's best model, whose kernels have grown; return it."""
    model = timm.create_model("test_resnet", num_classes=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(()) + (2 if parameter.ndim > 1 else 0.5))
        for buffer in model.buffers():
            if buffer.ndim:
                buffer.copy_(torch.rand_like(buffer) + 0.1)
    config = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    export(
        model,
        run / "best",
        class_names=("a", "b", "c"),
        data_config={**config, "crop_pct": 1.0},
        metrics={"top1": 1, "epoch": 1},
    )
    (run / "metrics.csv").write_text("epoch,top1\n1,1.0\n")
    (run / "environment.json").write_text('{"images_per_epoch": 7, "command": ["glattn"]}')
    return model


def test_a_start_is_the_same_function_of_smaller_kernels(tmp_path, monkeypatch):
    model = pretrained(tmp_path / "run")
    started = make_weights.start(tmp_path / "run")
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(started(image), model(image), rtol=1e-4, atol=1e-4)
    sizes = {name: p.norm() for name, p in started.named_parameters() if p.ndim == 4}
    grown = dict(model.named_parameters())
    assert len(sizes) > 5
    monkeypatch.setattr(sys, "argv", ["make_weights.py", str(tmp_path / "run"), "--to", str(tmp_path / "start")])
    assert make_weights.main() == 0
    assert all(torch.equal(value, started.state_dict()[key]) for key, value in load_file(tmp_path / "start").items())
    assert all(size < 0.9 * grown[name].norm() for name, size in sizes.items())


def test_weights_go_into_the_package_with_the_records_of_both_runs(tmp_path, monkeypatch, capsys):
    for run in ("first", "second", "third"):
        pretrained(tmp_path / run)
        for file in make_weights.RECORD:
            (tmp_path / run / file).write_text(f"{run} {file}")
        start = "" if run == "first" else "before.safetensors"
        (tmp_path / run / "config.yaml").write_text(f"checkpoint: {start!r}\n{DRAWN}")
    cfg = SimpleNamespace(file=str(tmp_path / "package.safetensors"))
    monkeypatch.setattr(make_weights, "ROOT", tmp_path)
    monkeypatch.setattr(make_weights, "measure", lambda model, dataset: {"top1": 2.0})
    loaded = []
    names = {"get_pretrained_cfg": lambda name: cfg, "create_model": lambda name, **options: loaded.append(options)}
    monkeypatch.setattr(make_weights, "timm", SimpleNamespace(**names))
    record = tmp_path / "docs" / "weights" / "test_resnet.contour1k_32"

    def make(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["make_weights.py", *map(str, arguments)])
        assert make_weights.main() == status
        assert load_file(cfg.file)["conv1.0.weight"].dtype == torch.float16
        return [(folder / "metrics.csv").read_text().split()[0] for folder in (record, record / "before")
                if folder.exists()]  # fmt: skip

    assert make(tmp_path / "first") == ["first"]
    assert make(tmp_path / "second", "--after", record) == ["second", "first"]
    assert make(tmp_path / "third", "--after", record / "before") == ["third", "first"]
    # what the runs began with is not told, or told wrongly: nothing is written
    assert make(tmp_path / "second", status=1) == ["third", "first"]
    assert make(tmp_path / "second", "--after", tmp_path / "third", status=1) == ["third", "first"]
    assert make(tmp_path / "first", "--after", tmp_path / "first", status=1) == ["third", "first"]
    assert "--after" in capsys.readouterr().err
    assert make(tmp_path / "first") == ["first"]
    assert loaded[-1]["pretrained_cfg_overlay"]["file"] != cfg.file


def test_weights_that_do_not_load_leave_the_packages_alone(tmp_path, monkeypatch, capsys):
    pretrained(tmp_path / "run")
    for file in make_weights.RECORD:
        (tmp_path / "run" / file).write_text(f"checkpoint: ''\n{DRAWN}")
    package = tmp_path / "package.safetensors"
    package.write_bytes(b"whole")
    cfg = SimpleNamespace(file=str(package))

    def refuse(name, **_):
        raise ValueError("of another shape")

    names = {"get_pretrained_cfg": lambda name: cfg, "create_model": refuse}
    monkeypatch.setattr(make_weights, "timm", SimpleNamespace(**names))
    monkeypatch.setattr(make_weights, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_weights.py", str(tmp_path / "run")])
    assert make_weights.main() == 1
    assert capsys.readouterr().err == "make_weights: of another shape\n"
    assert package.read_bytes() == b"whole"
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("best/metrics.json", '{"top1": 1.0}', "no epoch and top1 in it"),
        ("best/metrics.json", "{", "no epoch and top1 in it"),
        ("config.yaml", "", "its images, None, are not"),
        ("config.yaml", ": : [", "is no YAML"),
        ("config.yaml", "dataset: [contours]", "its images, ['contours'], are not"),
        ("config.yaml", "dataset: contours\n", "image_size is None"),
    ],
)
def test_a_broken_run_folder_is_one_line_and_changes_nothing(tmp_path, monkeypatch, capsys, file, text, said):
    pretrained(tmp_path / "run")
    for name in make_weights.RECORD:
        (tmp_path / "run" / name).write_text(f"checkpoint: ''\n{DRAWN}")
    (tmp_path / "run" / file).write_text(text)
    monkeypatch.setattr(make_weights, "copy_file", lambda *_: pytest.fail("the package's weights are overwritten"))
    monkeypatch.setattr(make_weights, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_weights.py", str(tmp_path / "run")])
    assert make_weights.main() == 1
    error = capsys.readouterr().err
    assert re.search(rf"{file}:? ", error)
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "docs").exists()


def test_a_tag_says_what_was_seen_one_after_the_other(tmp_path):
    runs = [tmp_path / str(number) for number in range(4)]
    for run, kind, size in zip(runs, ("contours", "fractals", "fractals", "digits"), (96, 64, 64, 64), strict=True):
        run.mkdir()
        (run / "config.yaml").write_text(f"dataset: {kind}\nimage_size: {size}\n")
    assert make_weights.made_of(runs[:3]) == ("fractal1k_ft_contour1k_96", "contours")
    assert make_weights.made_of(runs[1:3]) == ("fractal1k_64", "fractals")
    with pytest.raises(ValueError, match="its images, 'digits', are not fractals or contours"):
        make_weights.made_of(runs)
    for name in ("glattn_atto.fractal1k_96", "glattn_tiny"):
        with pytest.raises(ValueError, match=f"carries no weights {name}"):
            make_weights.carried(name)


class Branching(nn.Module):
    """A convolution, its batch norm, and what else its output goes to."""

    def __init__(self, *, size: float, affine: bool = True, aside: bool = False) -> None:
        super().__init__()
        self.conv, self.bn, self.aside = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine), aside
        nn.init.constant_(self.conv.weight, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.bn(x) + x if self.aside else self.bn(x)


@pytest.mark.parametrize(("size", "affine"), [(0.0, True), (2.0, True), (0.5, False)])
def test_kernels_stay_where_a_new_models_are_none_or_larger_or_no_norm_can_make_up(size, affine):
    grown = Branching(size=1.0, affine=affine).eval()
    make_weights.shrink(grown, Branching(size=size, affine=affine))
    assert (grown.conv.weight == 1).all()


def test_kernels_whose_size_matters_are_refused():
    with pytest.raises(ValueError, match=r"Branching: smaller kernels .* change what it computes"):
        make_weights.shrink(Branching(size=1.0, aside=True).eval(), Branching(size=0.5))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Make a task of two classes, and pretend to train: what starts from weights is right more often."""
    commands, wrong = [], {}
    source = drawings(tmp_path / "icons", "train", "val", "test")
    task = transfer.Task(str(source), 2, (0, 1), ("epochs=3",))
    monkeypatch.setattr(transfer, "TASKS", {"two": task})
    pretrained(tmp_path / "resnet")
    monkeypatch.chdir(tmp_path)
    images = sorted(f"{path.parent.name}/{path.name}" for path in (source / "test").rglob("*.png"))

    def train(command, **_):
        commands.append(command)
        said = dict(part.split("=", 1) for part in command if "=" in part)
        TrainConfig.read(None, [part for part in command if "=" in part])  # every key exists
        wrong[said["run"]] = 2 if "pretrained" in said or "checkpoint" in said else 8
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run_proxies.subprocess, "run", train)

    def finished(run, data):
        right = {image: number >= wrong[str(run)] for number, image in enumerate(images)}
        return {"val_top1": "50", "test_top1": "60"}, right

    monkeypatch.setattr(run_proxies, "finished", finished)

    def main(*arguments):
        folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--config", str(RECIPE)]
        monkeypatch.setattr(sys, "argv", ["transfer.py", *arguments, *folders])
        return transfer.main()

    return main, commands, tmp_path


ARMS = ("glattn_atto:pretrained", "test_glattn:scratch", "test_resnet:resnet", "test_glattn:scratch*10")


def test_each_arm_starts_as_it_says_and_is_compared_with_the_first(trained, capsys):
    main, commands, root = trained
    assert main(*ARMS, "--lr", "0.001", "0.002") == 0
    assert len(commands) == 4 * 3  # two rates, and the second seed at the better one
    ends = {arm: commands[3 * place] for place, arm in enumerate(ARMS)}
    assert "pretrained=true" in ends[ARMS[0]]
    assert not {"pretrained=true", "epochs=30"} & set(ends[ARMS[1]])
    assert {"model=test_resnet", "checkpoint=resnet/start.safetensors"} <= set(ends[ARMS[2]])
    assert ends[ARMS[3]].index("epochs=30") > ends[ARMS[3]].index("epochs=3")  # the last one counts
    compared = {row["other"]: row for row in run_proxies.read_csv(root / "out" / "two" / "comparisons.csv")}
    assert {arm: row["points"] for arm, row in compared.items()} == {
        ARMS[1]: "37.50",
        ARMS[2]: "0.00",
        ARMS[3]: "37.50",
    }
    assert {row["data"] for row in run_proxies.read_csv(root / "out" / "two" / "runs.csv")} == {"two"}
    assert (root / "out" / "transfer.png").stat().st_size > 0
    assert (root / "out" / "pretraining" / "resnet.csv").read_text() == (root / "resnet" / "metrics.csv").read_text()
    assert json.loads((root / "out" / "pretraining" / "resnet.json").read_text()) == {"images_per_epoch": 7}
    before = (root / "out" / "two" / "runs.csv").read_text()
    assert main(*ARMS) == 0
    assert len(commands) == 4 * 3
    assert (root / "out" / "two" / "runs.csv").read_text() == before


def test_the_picture_names_every_arm_once(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(transfer, "save_figure", lambda figure, path: drawn.append(figure))
    places = [("one", "a:scratch"), ("two", "a:scratch"), ("two", "b:scratch")]
    shared = {"chosen": "yes", "test_top1": "50", "settings": "icons.yaml"}
    rows = [{"model": model, "data": task} | shared for task, model in places]
    transfer.draw(rows, tmp_path / "p.png")
    legend = drawn[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a:scratch", "b:scratch"]
    with pytest.raises(ValueError, match=r"two holds runs of 2 recipes: icons\.yaml; other\.yaml"):
        transfer.draw([*rows, rows[1] | {"settings": "other.yaml"}], tmp_path / "p.png")


def test_a_list_that_ran_out_of_time_goes_on(trained, capsys):
    main, commands, _ = trained
    assert main(ARMS[0]) == 0
    assert main(*ARMS, "--minutes", "1e-12") == 0
    assert "goes on" in capsys.readouterr().out
    assert len(commands) == 3
    assert main(*ARMS[:2]) == 0
    assert len(commands) == 6


def test_no_picture_is_drawn_of_nothing(trained, capsys):
    main, _, root = trained
    assert main(ARMS[0], "--minutes", "1e-12") == 0
    assert not (root / "out" / "transfer.png").exists()


def test_arms_that_are_not_done_are_not_compared(trained):
    main, _, root = trained
    assert main(*ARMS[:2]) == 0
    runs = root / "out" / "two" / "runs.csv"
    rows = run_proxies.read_csv(runs)
    run_proxies.write_csv(runs, tuple(rows[0]), [row for row in rows if (row["model"], row["seed"]) != (ARMS[1], "1")])
    (root / "out" / "two" / "comparisons.csv").unlink()
    assert main(ARMS[0], ARMS[1], "--minutes", "1e-12") == 0
    assert not (root / "out" / "two" / "comparisons.csv").exists()


@pytest.mark.parametrize("arm", ["glattn_atto", "glattn_atto:", "glattn_atto:scratch*0", ":scratch", "a:b:c*d"])
def test_what_is_no_arm_is_said(trained, arm, capsys):
    main, commands, _ = trained
    assert main(arm) == 1
    assert "is no arm" in capsys.readouterr().err
    assert not commands


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nosuch:scratch",), "nosuch:scratch: timm knows no model 'nosuch'"),
        (("glattn_tiny:pretrained",), "glattn_tiny: no pretrained weights of it in this package"),
        ((ARMS[1], "--tasks", "two", "data/two-3shot"), "'data/two-3shot': give the name of a folder in data/"),
        ((ARMS[1], "--tasks", ""), "'': give the name of a folder in data/"),
        ((ARMS[1], "--tasks", "two", "typo-3shot"), "data/typo: no such folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_training(trained, arguments, said, capsys):
    main, commands, root = trained
    assert main(*arguments) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not commands
    assert not list(root.rglob("starts.json"))  # of runs that there are none of


def test_other_seeds_are_taken(trained):
    main, commands, root = trained
    assert main(*ARMS[:2], "--seeds", "4", "0", "7", "--lr", "0.001") == 0
    assert [next(part for part in command if part.startswith("seed=")) for command in commands] == [
        f"seed={seed}" for _ in range(2) for seed in (4, 0, 7)
    ]
    assert [row["seeds"] for row in run_proxies.read_csv(root / "out" / "two" / "comparisons.csv")] == ["3"]


def test_runs_that_began_with_other_weights_are_not_mixed(trained, capsys):
    main, _, root = trained
    assert main(ARMS[2]) == 0
    pretrained(root / "resnet")
    assert main(ARMS[2]) == 1
    error = capsys.readouterr().err
    assert "other weights" in error
    assert "runs.csv" in error
    assert error.count("\n") == 1


def test_a_run_without_a_row_began_with_its_weights_and_no_other_arms_with_them(trained, capsys):
    main, _, root = trained
    for name in ("resnet", "resnet-long"):
        pretrained(root / name)
    assert main(ARMS[2], f"{ARMS[2]}-long", "--minutes", "1e-12") == 0
    runs = next((root / "runs").iterdir())
    (runs / "test_resnet-resnet-long-0.001-seed0-icons").mkdir()  # as of a training that was killed
    pretrained(root / "resnet")
    assert main(ARMS[2], "--minutes", "1e-12") == 0
    (runs / "test_resnet-resnet-1e-05-seed0-icons").mkdir()
    torch.manual_seed(7)  # main seeds it
    pretrained(root / "resnet")
    assert main(ARMS[2], "--minutes", "1e-12") == 1
    assert "other weights" in capsys.readouterr().err


def test_an_arm_that_never_ran_begins_with_other_weights(trained):
    main, commands, root = trained
    assert main(ARMS[2], "--minutes", "1e-12") == 0
    before = (root / "out" / "two" / "starts.json").read_text()
    pretrained(root / "resnet")
    assert main(ARMS[2]) == 0
    assert commands
    assert (root / "out" / "two" / "starts.json").read_text() != before


def test_why_a_training_failed_is_said(trained, monkeypatch, capsys):
    main, _, _ = trained

    def fail(command, stdout, **_):
        stdout.write("epoch 1\nglattn train: no such thing\n\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(run_proxies.subprocess, "run", fail)
    assert main(ARMS[0], "--lr", "0.001") == 1
    error = capsys.readouterr().err
    assert "training failed: glattn train: no such thing; see " in error
    assert error.count("\n") == 1


def test_missing_images_are_one_line(trained, monkeypatch, capsys):
    main, _, root = trained
    monkeypatch.setattr(transfer, "TASKS", {"none": transfer.Task(str(root / "none"), 2, (0,), ("epochs=3",))})
    assert main(ARMS[0]) == 1
    error = capsys.readouterr().err
    assert str(root / "none") in error
    assert "make_" in error
    assert error.count("\n") == 1


def test_runs_are_printed_side_by_side(tmp_path, monkeypatch, capsys):
    for name, tops in (("one", (50, 99.5)), ("two", (25,))):
        (tmp_path / name).mkdir()
        rows = [{"epoch": str(epoch), "top1": str(top)} for epoch, top in enumerate(tops, 1)]
        run_proxies.write_csv(tmp_path / name / "metrics.csv", ("epoch", "top1"), rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "one", "two"])
    assert compare_runs.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [["epoch", "one", "two"], ["1", "50.00%", "25.00%"], ["2", "99.50%"]]
    assert "local-dir:one/best" in lines[3]
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "one", "gone"])
    assert compare_runs.main() == 1
    error = capsys.readouterr().err
    assert "gone" in error
    assert error.count("\n") == 1
