"""The report of a run: one page that needs nothing else, whatever the classes are called and however many."""

import json
from html.parser import HTMLParser

import pytest
import timm
import torch
from image_folders import write_folder
from reports import NASTY, make_predictions, make_run, make_source, predictions_of

from glattn.training.checkpoint import export
from glattn.training.config import TrainConfig
from glattn.training.data import open_sources
from glattn.training.report import render, write_report
from glattn.training.validation import predict_source

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would make of a page: its tags, their attributes, and the text of its cells."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.cells, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def report(tmp_path, names, images=4, predictions=None):
    source = make_source(tmp_path / "images", names, images)
    predictions = predictions or make_predictions(source)
    text = render(make_run(tmp_path / "run", predictions), source, predictions)
    return Page(text), predictions


@pytest.mark.parametrize("names", [NASTY, [f"class {n}" for n in range(100)]], ids=len)
def test_a_page_that_needs_nothing_else(tmp_path, names):
    page, _ = report(tmp_path, names, images=2)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed"})
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        assert "url(" not in attributes.get("style", "")
        assert not any(name.startswith("on") for name in attributes)
        assert not {"width", "height"} & attributes.keys(), "of a fixed size: wider than a phone"
        if tag == "img":
            assert attributes["alt"]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    style = page.text[: page.text.index("test_glattn on", page.text.index("{"))]
    assert "url(" not in style
    assert "@import" not in style


def test_names_are_shown_as_they_are(tmp_path):
    page, _ = report(tmp_path, NASTY)
    for name in NASTY:
        assert page.cells.count(name) == 3  # its accuracy, its row, its column
    assert "'my images/<b>'" in page.text  # the command, as a shell takes it
    assert any(attributes.get("alt", "").startswith(NASTY[0]) for _, attributes in page.tags)


def test_the_worst_mistakes_come_first(tmp_path):
    logits = torch.tensor([[0, 1, 0], [0, 0, 3], [2, 0, 0]]).double()
    predictions = predictions_of(logits, torch.tensor([0, 0, 1]))
    source = make_source(tmp_path / "images", ["a", "b", "c"])
    page = Page(render(make_run(tmp_path / "run", predictions), source, predictions))
    shown = [attributes["alt"] for tag, attributes in page.tags if "taken for" in attributes.get("alt", "")]
    assert shown == ["a, taken for c", "b, taken for a", "a, taken for b"]


def test_the_matrix_counts_every_image(tmp_path):
    page, predictions = report(tmp_path, NASTY)
    start = page.cells.index(NASTY[0], page.cells.index(""))
    numbers = [int(cell) for cell in page.cells[start:] if cell.isdigit()]
    assert sum(numbers) == len(predictions.index)
    assert sorted(numbers) == sorted(predictions.confusion(len(NASTY))[predictions.confusion(len(NASTY)) > 0].tolist())


def test_many_classes_show_their_worst_confusions(tmp_path):
    names = [f"class {n}" for n in range(40)]
    target = torch.arange(160) // 4
    logits = torch.nn.functional.one_hot(target, 40).float()
    logits[4:7] = torch.nn.functional.one_hot(torch.tensor(9), 40).float()  # class 1, three times taken for 9
    logits[8] = torch.nn.functional.one_hot(torch.tensor(3), 40).float()  # class 2, once taken for 3
    page, _ = report(tmp_path, names, predictions=predictions_of(logits, target))
    head = page.cells.index("taken for")
    assert page.cells[head + 2 : head + 8] == ["class 1", "class 9", "3", "class 2", "class 3", "1"]
    assert page.cells[page.cells.index("accuracy") + 2 :][:3] == ["class 1", "1 of 4", "25.0%"]  # the worst is first


@pytest.mark.parametrize("classes", [2, 40])
def test_a_run_without_mistakes(tmp_path, classes):
    target = torch.arange(4 * classes) // 4
    logits = 9 * torch.nn.functional.one_hot(target, classes).float()
    page, _ = report(tmp_path, [f"class {n}" for n in range(classes)], predictions=predictions_of(logits, target))
    assert "None." in page.text


def test_a_report_is_of_the_exported_model(tmp_path, capsys):
    config = TrainConfig(data=str(write_folder(tmp_path / "data", train=1, val=3)), workers=0, device="cpu")
    _, source = open_sources(config)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    data_config = {
        "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3,
        "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
    predictions = predict_source(model, source, data_config, batch_size=4, workers=0, device=torch.device("cpu"))
    run = make_run(tmp_path / "run", predictions)
    (run / "config.yaml").write_text(config.to_yaml())
    noted = json.loads((run / "best" / "metrics.json").read_text())
    export(model, run / "best", class_names=source.class_names, data_config=data_config, metrics=noted)
    write_report(run, source)
    printed = capsys.readouterr().out
    assert "warning" not in printed
    assert f"top-1 {noted['top1']:.2f}%" in printed
    assert f"{noted['top1']:.2f}%" in Page((run / "report.html").read_text(encoding="utf-8")).text
    assert (run / "samples.png").stat().st_size > 1000
    other = {**noted, "top1": noted["top1"] + 1}  # as of another model
    (run / "best" / "metrics.json").write_text(json.dumps(other))
    write_report(run, source)
    assert "warning" in capsys.readouterr().out


def test_a_run_without_a_model_is_an_error(tmp_path):
    with pytest.raises(OSError, match="no model to report on"):
        write_report(tmp_path, make_source(tmp_path / "images", ["a", "b"]))
