"""Exported files against the model: other sizes and batches than the traced, by a process without the package."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import glattn.export as exporting
from glattn.cli import main
from glattn.export import FORMATS, export
from glattn.hub import push
from glattn.models.variants import VARIANTS

SHAPES = [(1, 3, 64, 64), (3, 3, 101, 75), (8, 3, 45, 160), (1, 3, 224, 199)]
NAMES = ["ant", "bee", "cat", "dog"]

RUN = """
import json, sys
import numpy as np
path, inputs, outputs = sys.argv[1:]
images = np.load(inputs)
if path.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    run = lambda image: session.run(["logits"], {"image": image})[0]
    facts = session.get_modelmeta().custom_metadata_map
elif path.endswith(".xml"):
    import openvino
    model = openvino.Core().read_model(path)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run = lambda image: compiled({"image": image})["logits"]
    names = ("architecture", "class_names", "preprocessing", "license", "glattn")
    facts = {name: model.get_rt_info(["model_info", name]).astype(str) for name in names}
else:
    import torch
    facts = dict.fromkeys(("architecture", "class_names", "preprocessing", "license", "glattn"), "")
    module = torch.export.load(path, extra_files=facts).module()
    with torch.inference_mode():
        run = lambda image: module(torch.from_numpy(image)).detach().numpy()
assert not [name for name in sys.modules if name.partition(".")[0] in ("glattn", "timm")]
np.savez(outputs, **{name: run(images[name]) for name in images})
print(json.dumps({name: json.loads(value) for name, value in facts.items()}))
"""


def small(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_glattn", **{"num_classes": 4, "depths": (1, 1, 1, 1), **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for _ in range(2):
            model.train()(torch.rand(4, model.in_chans, 64, 64))
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": NAMES}
    return model.eval()


def compare(model: torch.nn.Module, path: Path) -> dict:
    """Run the file at every shape in a process of its own; return its metadata."""
    images = {"x".join(map(str, shape)): torch.rand(shape).numpy() for shape in SHAPES}
    np.savez(path.parent / "in.npz", **images)
    arguments = [sys.executable, "-c", RUN, str(path), str(path.parent / "in.npz"), str(path.parent / "out.npz")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    logits = np.load(path.parent / "out.npz")
    for name, image in images.items():
        with torch.inference_mode():
            expected = model(torch.from_numpy(image)).numpy()
        assert logits[name].shape == expected.shape
        assert np.abs(logits[name] - expected).max() <= 1e-4 * np.abs(expected).max(), name
    return json.loads(done.stdout.splitlines()[-1])


def skip_without(to: str) -> None:
    for name in FORMATS[to].needs:
        pytest.importorskip(name)


@pytest.mark.export
@pytest.mark.parametrize("to", FORMATS)
def test_any_batch_and_size_elsewhere(tmp_path, to):
    skip_without(to)
    model = small(depths=(1, 1, 2, 1))
    done = export(model, to, tmp_path / f"model{FORMATS[to].suffix}")
    assert done.difference <= 1e-4 * done.scale
    facts = compare(model, done.path)
    assert facts["class_names"] == NAMES
    assert facts["architecture"] == "test_glattn"
    assert facts["license"] == "apache-2.0"
    how = facts["preprocessing"]
    assert (how["input_size"], how["interpolation"], how["crop_pct"]) == ([3, 224, 224], "bicubic", 0.95)
    assert how["mean"] == [0.485, 0.456, 0.406]
    # the export is of the folded model: each norm went into the convolution before it
    assert not [name for name in done.path.read_bytes().split() if b"BatchNorm" in name] or to == "torch-export"
    # and left the model as it was
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


@pytest.fixture
def written(monkeypatch):
    """Formats that write no graph, and the shape and the metadata that were asked for: what `export` adds to them."""
    asked = {}

    def write(program, facts, path):
        path.touch()
        asked.update({name: json.loads(value) for name, value in facts.items()})
        return program

    def capture(model, shape, free):
        asked.update(shape=shape, free=free, dtype=next(model.parameters()).dtype)
        return model.forward

    formats = {name: replace(kind, needs=(), write=write) for name, kind in FORMATS.items()}
    monkeypatch.setattr(exporting, "FORMATS", formats)
    monkeypatch.setattr(exporting, "_capture", capture)
    return asked


def test_the_model_stays_as_it_was(tmp_path, written):
    model = small().bfloat16().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, "torch-export", tmp_path / "model.pt2", img_size=64)
    assert written["dtype"] == torch.float32
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.stem.conv1.conv.weight.dtype == torch.bfloat16


def test_the_model_s_own_channels(tmp_path, written):
    export(small(in_chans=1), "torch-export", tmp_path / "model.pt2")
    assert (written["shape"], written["free"]) == ((1, 224, 224), True)
    how = written["preprocessing"]
    assert (how["input_size"], how["mean"], how["std"]) == (
        [1, 224, 224],
        [pytest.approx(0.449)],
        [pytest.approx(0.226)],
    )
    assert "color" not in how


@pytest.mark.parametrize(("img_size", "shape"), [(64, (3, 64, 64)), ((64, 96), (3, 64, 96)), ([96, 64], (3, 96, 64))])
def test_a_size_that_is_fixed(tmp_path, written, img_size, shape):
    export(small(), "torch-export", tmp_path / "model.pt2", img_size=img_size)
    assert (written["shape"], written["free"]) == (shape, False)
    assert written["preprocessing"]["input_size"] == list(shape)
    assert written["preprocessing"]["color"] == "RGB"


@pytest.mark.parametrize("img_size", [0, (64,), (64, 96, 3), 64.5])
def test_a_size_that_is_none(tmp_path, img_size):
    with pytest.raises(ValueError, match=r"img_size=.*; give one side, or \(height, width\), in whole pixels"):
        export(small(), "torch-export", tmp_path / "model.pt2", img_size=img_size)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", ["model", "model-v1.2"])
def test_a_name_gets_the_suffix_it_lacks(tmp_path, written, name, to):
    suffix = FORMATS[to].suffix
    for given in (name, name + suffix):
        assert export(small(), to, tmp_path / "out" / given, img_size=64).path == tmp_path / "out" / (name + suffix)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name + suffix]


@pytest.mark.export
def test_a_gray_model_of_two_sides(tmp_path):
    model = small(in_chans=1)
    loaded = torch.export.load(export(model, "torch-export", tmp_path / "gray.pt2", img_size=(64, 96)).path).module()
    image = torch.rand(2, 1, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(image), model(image), rtol=1e-4, atol=1e-5)
    assert torch.export.load(export(model, "torch-export", tmp_path / "any.pt2").path)


MECHANISMS = sorted({"_".join(name.split("_")[2:]) for name in VARIANTS if name.startswith("glattn_tiny_")})


@pytest.mark.export
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_named_mechanism(tmp_path, mechanism, to):
    skip_without(to)
    ours, theirs = VARIANTS["test_glattn"].to_dict(), VARIANTS[f"glattn_tiny_{mechanism}"].to_dict()
    options = {k: v for k, v in theirs.items() if v != ours[k] and k not in ("dims", "depths", "head_dim", "num_heads")}
    assert options
    model = small(**options)
    compare(model, export(model, to, tmp_path / f"model{FORMATS[to].suffix}").path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    push(small(), "org/name", dry_run=folder / "best")
    return folder


def test_the_command_prints_the_difference(run_folder, capsys):
    assert main(["export", str(run_folder), "--to", "torch-export", "--img-size", "64"]) == 0
    printed = capsys.readouterr().out
    assert f"{run_folder / 'test_glattn.pt2'}: largest difference " in printed
    image = torch.rand(5, 3, 64, 64)
    model = timm.create_model(f"local-dir:{run_folder / 'best'}", pretrained=True).eval()
    with torch.inference_mode():
        loaded = torch.export.load(run_folder / "test_glattn.pt2").module()
        torch.testing.assert_close(loaded(image), model(image), rtol=1e-4, atol=1e-5)


def fails(arguments: list[str], capsys) -> str:
    assert main(["export", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("glattn export: ")
    assert message.count("\n") == 1
    return message


def test_a_file_that_differs_is_not_written(run_folder, tmp_path, capsys, monkeypatch):
    arguments = [str(run_folder), "--to", "torch-export", "--img-size", "64", "--output", str(tmp_path / "model.pt2")]
    captured = exporting._capture(small(), (3, 64, 64), free=False)
    monkeypatch.setattr(exporting, "_capture", lambda *args, **kwargs: captured)
    assert main(["export", *arguments]) == 0
    (tmp_path / "model.pt2").unlink()
    assert "-1 of that is allowed" in fails([*arguments, "--tolerance=-1"], capsys)
    assert not list(tmp_path.iterdir())

    def tampered(factor):
        def write(program, facts, path):
            run = FORMATS["torch-export"].write(program, facts, path)
            return lambda image: run(image) * factor

        return replace(FORMATS["torch-export"], write=write)

    for factor in (1.001, float("nan")):
        monkeypatch.setattr(exporting, "FORMATS", {**FORMATS, "torch-export": tampered(factor)})
        assert "it differs from the model by" in fails(arguments, capsys)
        assert not list(tmp_path.iterdir())


@pytest.mark.export
def test_a_program_that_takes_fewer_sizes_says_how_to_fix_one(tmp_path):
    model = timm.create_model("test_convnext", num_classes=3).eval()
    model.pretrained_cfg["input_size"] = model.pretrained_cfg["test_input_size"] = (3, 32, 32)
    with pytest.raises(ValueError, match=r"does not take .*; fix the size with --img-size: Expected input"):
        export(model, "torch-export", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    assert export(model, "torch-export", tmp_path / "model.pt2", img_size=32).path.exists()


@pytest.mark.parametrize("to", [name for name in FORMATS if FORMATS[name].extra])
def test_a_missing_extra_is_named(run_folder, capsys, monkeypatch, to):
    find = exporting.importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util, "find_spec", lambda name: None if name == FORMATS[to].needs[0] else find(name)
    )
    message = fails([str(run_folder), "--to", to], capsys)
    assert FORMATS[to].needs[0] in message
    assert f"pip install 'glattn[{FORMATS[to].extra}]'" in message


def test_what_is_no_whole_model_is_refused_and_a_wrapped_one_is_exported(tmp_path):
    for model in (timm.create_model("test_glattn", features_only=True), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=rf"^{type(model).__name__} is no classifier of timm's"):
            exporting.export(model, "torch-export", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    compiled = torch.compile(timm.create_model("test_glattn", num_classes=3), backend="eager")
    assert exporting.export(compiled, "torch-export", tmp_path / "model.pt2", img_size=32).path.exists()


def test_what_is_asked_wrongly(run_folder, tmp_path, capsys):
    arguments = ["--to", "torch-export", "--output", str(tmp_path / "model.onnx")]
    assert "ends in .pt2" in fails([str(run_folder), *arguments], capsys)
    assert "--img-size -1" in fails([str(run_folder), "--to", "torch-export", "--img-size", "-1"], capsys)
    assert "did you mean 'glattn_atto'" in fails(["glattn_ato", "--to", "torch-export"], capsys)
    assert "Invalid pretrained tag (typo)" in fails(["glattn_atto.typo", "--to", "torch-export"], capsys)


def test_a_model_of_some_sides_alone_says_how_to_fix_one(tmp_path):
    model = timm.create_model("test_vit", dynamic_img_size=True, num_classes=3)
    with pytest.raises(ValueError, match=r"does not take .*; fix the size with --img-size: Input height"):
        export(model, "torch-export", tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
