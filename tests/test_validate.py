"""`glattn validate`: its numbers against loops, the order of classes, every image once, and what it refuses."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_folders import COLOURS, noisy, spoil, write_class, write_folder
from PIL import Image
from reports import predictions_of
from timm.data import create_transform

from glattn.cli import main
from glattn.training.checkpoint import export
from glattn.training.validate import Stopwatch
from glattn.training.validation import AmongClasses, predict_all

NAMES = ("red", "unseen", "green", "blue")  # not the order of the folder
INPUT = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.8,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images") / "data", train=1, val=5)


def save(folder, class_names=NAMES):
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=len(class_names)).eval()
    with torch.no_grad():
        model.get_classifier().weight.mul_(10)
    export(model, folder, class_names=class_names, data_config=INPUT, metrics={})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint") / "best")


def validate(*arguments):
    return main(["validate", *map(str, arguments), "--workers", "0", "--device", "cpu"])


def by_hand(checkpoint, folder, present=None, **changed):
    """Return the logits and targets of a folder, an image at a time."""
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True).eval()
    transform = create_transform(**{**INPUT, **changed})
    logits, targets = [], []
    for path in sorted(folder.glob("*/*.png")):
        with torch.inference_mode():
            logits.append(model(transform(Image.open(path).convert("RGB"))[None])[0])
        targets.append(NAMES.index(path.parent.name))
    return torch.stack(logits), torch.tensor(targets)


@pytest.mark.parametrize("batch_size", [1, 4, 15, 64])
def test_every_image_counts_once_whatever_the_batch(images, checkpoint, tmp_path, batch_size):
    output = tmp_path / "found.json"
    assert validate(checkpoint, "--data", images, "--batch-size", batch_size, "--output", output) == 0
    found = json.loads(output.read_text())
    logits, target = by_hand(checkpoint, images / "val")
    assert found["images"] == len(target) == 15
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-3)
    assert list(found["class_top1"]) == ["red", "green", "blue"]
    for name, share in found["class_top1"].items():
        of_class = target == NAMES.index(name)
        right = (logits[of_class].argmax(1) == NAMES.index(name)).double().mean().item()
        assert share == pytest.approx(100 * right, abs=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json"]


@pytest.mark.parametrize(("batches", "worked", "read"), [(1, 0, 0), (2, 8, 0), (3, 16, 8), (5, 32, 24)])
def test_speed_is_that_of_all_batches_but_the_first_and_of_reading_but_the_last(batches, worked, read):
    watch = Stopwatch()
    for _ in watch([(torch.zeros(8), 0)] * batches):
        pass
    assert (watch.worked, watch.read) == (worked, read)
    assert [speed is None for speed in watch.speeds().values()] == [read == 0, worked == 0]


def test_speed_with_reading_is_that_of_a_loader_that_reads_ahead(monkeypatch):
    """As timm's does: the first call waits for two batches, the last for none."""
    now = 0.0
    monkeypatch.setattr("glattn.training.validate.time.perf_counter", lambda: now)

    def loader():
        nonlocal now
        for reads in (2, 1, 1, 0):
            now += 0.5 * reads
            yield torch.zeros(8), 0

    watch = Stopwatch()
    for _ in watch(loader()):
        now += 0.5
    assert watch.speeds() == {"images_per_second": 8.0, "model_images_per_second": 16.0}


def test_size_crop_and_present_classes_are_what_was_asked(images, checkpoint, tmp_path, capsys):
    output = tmp_path / "found.json"
    asked = ["--size", 48, "--crop-pct", 1.0, "--crop-mode", "squash", "--present-only"]
    assert validate(checkpoint, "--data", images / "val", *asked, "--output", output) == 0
    found = json.loads(output.read_text())
    logits, target = by_hand(checkpoint, images / "val", input_size=(3, 48, 48), crop_pct=1.0, crop_mode="squash")
    logits[:, NAMES.index("unseen")] = -torch.inf
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-3)
    assert (found["size"], found["crop_pct"], found["crop_mode"]) == ([48, 48], 1.0, "squash")
    printed = capsys.readouterr().out
    assert f"{found['top1']:.2f}%" in printed
    assert "48x48" in printed
    assert "3 of 4" in printed


def test_metrics_are_those_of_loops():
    logits = 3 * torch.randn(400, 12)
    target = torch.randint(12, (400,))
    predictions = predictions_of(logits, target)
    found = predictions.metrics()
    probabilities = logits.softmax(1).numpy()
    order = np.argsort(-probabilities, axis=1)
    assert found["top1"] == pytest.approx(100 * np.mean([t == o[0] for t, o in zip(target, order, strict=True)]))
    assert found["top5"] == pytest.approx(100 * np.mean([t in o[:5] for t, o in zip(target, order, strict=True)]))
    error = 0.0
    for low in range(15):
        inside = [
            (float(p.max()), int(p.argmax()) == int(t))
            for p, t in zip(probabilities, target, strict=True)
            if low / 15 <= p.max() < (low + 1) / 15 or (low == 14 and p.max() == 1)
        ]
        if inside:
            confidence, right = np.mean([c for c, _ in inside]), np.mean([r for _, r in inside])
            error += len(inside) / 400 * abs(confidence - right)
    assert found["ece"] == pytest.approx(100 * error, abs=1e-3)
    confusion = predictions.confusion(12)
    assert confusion.sum() == 400
    assert (confusion.sum(1) == np.bincount(target, minlength=12)).all()
    assert (confusion.sum(0) == np.bincount(order[:, 0], minlength=12)).all()
    assert confusion.trace() == pytest.approx(4 * found["top1"])
    assert predictions.class_accuracy(13)[:12] == pytest.approx(confusion.diagonal() / confusion.sum(1))
    assert np.isnan(predictions.class_accuracy(13)[12])


class Table(torch.nn.Module):
    """Gives the logits that an image's first pixels hold."""

    def forward(self, x):
        return x[:, 0, 0, :6]


def places(*classes):
    return torch.tensor([[target, number, number] for number, target in enumerate(classes)])


def test_answers_that_are_not_finite_are_never_right():
    images = torch.zeros(2, 3, 1, 6)
    images[:, 0] = torch.nan
    found = predict_all(Table(), [(images, places(0, 3))]).metrics()
    assert (found["top1"], found["top5"]) == (0, 0)
    assert np.isnan(found["loss"])
    assert np.isfinite(found["ece"])


def test_of_equal_answers_none_is_among_the_best_five():
    images = torch.zeros(6, 3, 1, 6)
    found = predict_all(Table(), [(images, places(0, 1, 2, 3, 4, 5))]).metrics()
    assert found["top1"] == found["top5"] == pytest.approx(100 / 6)


def test_among_classes_refuses_the_others():
    images = torch.zeros(1, 3, 1, 6)
    images[0, 0, 0] = torch.arange(6.0)
    logits = AmongClasses(Table(), np.array([1, 4]), 6)(images)
    assert logits.tolist() == [[-np.inf, 1, -np.inf, -np.inf, 4, -np.inf]]


def test_unreadable_images_are_left_out_and_named(checkpoint, tmp_path, capsys):
    write_class(tmp_path / "data" / "red", COLOURS["red"], 3)
    bad = spoil(tmp_path / "data" / "red" / "001.png", "truncated")
    assert validate(checkpoint, "--data", tmp_path / "data") == 0
    printed = capsys.readouterr().out
    assert "2 in" in printed
    assert str(bad) in printed


def test_a_file_of_weights_goes_by_the_folders_order(images, tmp_path, capsys):
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert validate("test_resnet", "--checkpoint", tmp_path / "weights.pth", "--data", images, "--size", 32) == 0
    assert "3 of 3" in capsys.readouterr().out


def test_a_file_of_a_model_of_two_classifiers_tells_its_classes(images, tmp_path, capsys):
    name = "deit_tiny_distilled_patch16_224"
    torch.save(timm.create_model(name, num_classes=3).state_dict(), tmp_path / "weights.pth")
    assert validate(name, "--checkpoint", tmp_path / "weights.pth", "--data", images) == 0
    assert "3 of 3" in capsys.readouterr().out


def fail(capsys, *arguments):
    """Return the one line that a command fails with."""
    assert validate(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def test_what_it_refuses_is_one_line(images, checkpoint, tmp_path, capsys):
    write_class(tmp_path / "other" / "cat", COLOURS["red"], 1)
    write_class(tmp_path / "other" / "red", COLOURS["red"], 1)
    assert "'cat'" in fail(capsys, checkpoint, "--data", tmp_path / "other")
    assert "no split 'test'; it has train, val" in fail(capsys, checkpoint, "--data", images, "--split", "test")
    assert "no folder" in fail(capsys, checkpoint, "--data", tmp_path / "none")
    assert "no such checkpoint" in fail(capsys, "resnet1x", "--data", images)
    assert "nowhere" in fail(capsys, checkpoint, "--data", images, "--output", tmp_path / "nowhere" / "found.json")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: is no plain file" in fail(capsys, checkpoint, "--data", images, "--output", tmp_path / "pipe")
    assert "is a folder" in fail(capsys, checkpoint, "--data", images, "--output", tmp_path)
    assert "--checkpoint" in fail(capsys, "test_resnet", "--data", images, "--checkpoint", tmp_path / "none.pth")
    assert "--crop-pct 1.5" in fail(capsys, checkpoint, "--data", images, "--crop-pct", 1.5)
    assert "--batch-size 0" in fail(capsys, checkpoint, "--data", images, "--batch-size", 0)
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "five.pth")
    line = fail(capsys, "test_resnet", "--data", images, "--checkpoint", tmp_path / "five.pth")
    assert "5 classes without names" in line
    line = fail(capsys, "test_convnext", "--data", images, "--checkpoint", checkpoint / "model.safetensors")
    assert len(line) < 600


def test_a_class_named_twice_is_refused(images, tmp_path, capsys):
    folder = save(tmp_path / "best", ("red", "green", "blue", "red"))
    assert "'red'" in fail(capsys, folder, "--data", images)


def test_a_folder_without_a_readable_image_is_refused(checkpoint, tmp_path, capsys):
    (tmp_path / "red").mkdir()
    noisy(COLOURS["red"], 0).save(tmp_path / "red" / "0.png")
    spoil(tmp_path / "red" / "0.png", "text")
    assert "none of the validation images" in fail(capsys, checkpoint, "--data", tmp_path)


def test_the_documentations_python_runs(capsys):
    text = (Path(__file__).parents[1] / "docs" / "validation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {})
    assert len(capsys.readouterr().out.splitlines()) == 4
