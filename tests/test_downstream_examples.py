"""The examples: their scenes, their scores, and each run through."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from digit_scenes import Digits  # noqa: E402
from scores import average_precisions, confusion, intersections_over_unions  # noqa: E402


def test_held_out_digits_are_in_no_scene_to_train_on():
    train, held_out = Digits(train=True), Digits(train=False)
    assert not set(train.indices) & set(held_out.indices)
    assert len(train.indices) + len(held_out.indices) == 1797
    assert set(held_out.labels) == set(range(10))


def test_scenes_are_of_mixed_sizes_with_boxes_around_the_ink():
    digits = Digits(train=True)
    scenes = [digits.scene((7, i)) for i in range(12)]
    assert len({scene.mask.shape for scene in scenes}) > 6
    assert all((scene.image.shape[:2] == scene.mask.shape) for scene in scenes)
    for scene in scenes:
        inside = np.zeros(scene.mask.shape, bool)
        for (left, top, right, bottom), label in zip(scene.boxes.astype(int), scene.labels, strict=True):
            ink = scene.mask[top:bottom, left:right] == label + 1
            assert ink[0].any()
            assert ink[-1].any()
            assert ink[:, 0].any()
            assert ink[:, -1].any()
            inside[top:bottom, left:right] = True
        assert not scene.mask[~inside].any()
    again = digits.scene((7, 3))
    np.testing.assert_array_equal(again.image, scenes[3].image)


def test_digits_too_large_for_the_scenes_are_named():
    with pytest.raises(ValueError, match=r"digits of up to 90 pixels do not fit scenes of 96"):
        Digits(train=True, digit_side=(40, 90))


def _boxes(*corners):
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def test_average_precision_by_hand():
    """Two of three objects of class 1 found, a wrong box between them: 1 up to a third, 2/3 up to two thirds."""
    wanted = [
        {"boxes": _boxes([0, 0, 10, 10], [20, 0, 30, 10]), "labels": torch.tensor([1, 1])},
        {"boxes": _boxes([0, 0, 10, 10], [50, 50, 60, 60]), "labels": torch.tensor([1, 2])},
    ]
    # the second box is of the first object again, and so wrong
    found = [
        {"boxes": _boxes([0, 0, 10, 11], [0, 0, 10, 10]), "labels": torch.tensor([1, 1])},
        {"boxes": _boxes([0, 0, 10, 9], [50, 50, 60, 60]), "labels": torch.tensor([1, 1])},
    ]
    for guess, scores in zip(found, ([0.9, 0.8], [0.7, 0.1]), strict=True):
        guess["scores"] = torch.tensor(scores)
    result = average_precisions(found, wanted)
    assert result[1] == pytest.approx(1 / 3 + 2 / 3 / 3)
    assert result[2] == 0.0
    assert average_precisions(wanted_as_found(wanted), wanted) == {1: 1.0, 2: 1.0}


def wanted_as_found(wanted):
    return [{**target, "scores": torch.ones(len(target["labels"]))} for target in wanted]


def test_boxes_that_overlap_too_little_are_wrong():
    wanted = [{"boxes": _boxes([0, 0, 10, 10]), "labels": torch.tensor([1])}]
    near = [{"boxes": _boxes([0, 0, 10, 4.9]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}]
    assert average_precisions(near, wanted) == {1: 0.0}
    assert average_precisions(near, wanted, overlap=0.4) == {1: 1.0}


def test_nothing_found_scores_nothing():
    wanted = [{"boxes": _boxes([0, 0, 10, 10]), "labels": torch.tensor([3])}]
    nothing = [{"boxes": _boxes(), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}]
    assert average_precisions(nothing, wanted) == {3: 0.0}


def test_intersection_over_union_by_hand():
    wanted, found = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])
    ious = intersections_over_unions(confusion(found, wanted, classes=3))
    assert ious[:2].tolist() == pytest.approx([1 / 2, 2 / 3])
    assert ious[2].isnan()


def _run(monkeypatch, script, *options):
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize(
    ("script", "options", "score"),
    [
        ("detect_digits.py", [], "map50"),
        pytest.param("detect_digits.py", ["--detector", "retinanet"], "map50", marks=pytest.mark.slow),
        ("segment_digits.py", [], "mean_iou"),
        pytest.param("segment_digits.py", ["--no-stem"], "mean_iou", marks=pytest.mark.slow),
    ],
)
def test_an_example_runs_through(script, options, score, tmp_path, monkeypatch, capsys):
    assert _run(monkeypatch, script, "--quick", "--output", str(tmp_path / "out"), *options) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.pt", "predictions.png", "scores.json"]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert 0 <= scores[score] <= 1
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert picture.size > (900, 700)
    printed = capsys.readouterr().out
    assert "step 3/3  loss" in printed
    assert "held-out digits" in printed


def test_detections_are_drawn_green_and_red(tmp_path):
    """A right one, a wrong one, and one that is too unsure to be drawn."""
    detect_digits = importlib.import_module("detect_digits")
    scene = Digits(train=True).scene((7, 1))
    boxes = torch.from_numpy(scene.boxes[[0, 0, 0]])
    label = int(scene.labels[0]) + 1
    for labels, scores, colours in (
        ([label, label, label], [0.9, 0.2, 0.2], {"green"}),
        ([label % 10 + 1, label, label], [0.9, 0.2, 0.2], {"red"}),
        ([label, label, label], [0.3, 0.2, 0.2], set()),
    ):
        found = {"boxes": boxes, "labels": torch.tensor(labels), "scores": torch.tensor(scores)}
        detect_digits.draw([scene], [found], tmp_path / "drawn.png")
        with Image.open(tmp_path / "drawn.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()
        drawn = {name for name, colour in (("green", [0, 255, 0]), ("red", [255, 0, 0])) if colour in pixels}
        assert drawn == colours


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "glattn_gigantic"], "Unknown model (glattn_gigantic)"),
        (["--steps", "0"], "--steps 0: give 1 or more"),
    ],
)
@pytest.mark.parametrize("script", ["detect_digits.py", "segment_digits.py"])
def test_a_mistake_is_one_line(script, options, says, tmp_path, monkeypatch, capsys):
    assert _run(monkeypatch, script, *options, "--output", str(tmp_path)) == 1
    assert capsys.readouterr().err == f"{script}: {says}\n"
    assert not list(tmp_path.iterdir())
