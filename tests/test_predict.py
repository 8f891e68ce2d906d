"""`glattn predict`: images of any kind, checkpoints from anywhere, and pictures of what the branches did."""

import json
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from image_folders import COLOURS, noisy, spoil
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform

import glattn  # noqa: F401 (registers the family)
from glattn.cli import main
from glattn.layers.fusion import FUSIONS
from glattn.layers.layout import LAYOUTS
from glattn.layers.mechanism import MECHANISMS
from glattn.training.checkpoint import export
from glattn.training.explain import explain

NAMES = ("tench", "naïve 猫", "<b>", "$x_1$", "a & b", "six", "seven")
INPUT = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def save(folder, name, in_chans=3):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(NAMES), in_chans=in_chans).eval()
    data_config = {**INPUT, "input_size": (in_chans, 32, 32), **{k: INPUT[k][:in_chans] for k in ("mean", "std")}}
    export(model, folder, class_names=NAMES, data_config=data_config, metrics={})
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return save(tmp_path_factory.mktemp("ours") / "best", "test_glattn")


@pytest.fixture(scope="module")
def timms(tmp_path_factory):
    return save(tmp_path_factory.mktemp("timms") / "best", "test_resnet")


@pytest.fixture
def photo(tmp_path):
    noisy(COLOURS["red"], 0, side=50).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def predict(*arguments):
    return main(["predict", "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize("top", [1, 5, 99])
def test_the_likeliest_classes_by_name(ours, photo, capsys, top):
    assert predict(photo, "--model", ours, "--top", top, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["image"] == str(photo)
    model = timm.create_model(f"local-dir:{ours}", pretrained=True).eval()
    with torch.inference_mode():
        probabilities = model(create_transform(**INPUT)(Image.open(photo))[None])[0].softmax(0).numpy()
    order = np.argsort(-probabilities)[:top]
    assert [row["class"] for row in found["top"]] == order.tolist()
    assert [row["name"] for row in found["top"]] == [NAMES[n] for n in order]
    assert [row["probability"] for row in found["top"]] == pytest.approx(probabilities[order].tolist())


def test_every_way_to_name_a_checkpoint_gives_the_same(ours, photo, capsys):
    lines = set()
    for model in (ours, f"local-dir:{ours}", ours.parent, ours / "model.safetensors"):
        assert predict(photo, "--model", model) == 0
        lines.add(capsys.readouterr().out)
    (printed,) = lines
    assert len(printed.splitlines()) == 6  # the image and its top five
    assert predict(photo, "--model", "test_glattn", "--checkpoint", ours / "model.safetensors", "--size", 32) == 0
    assert "class " in capsys.readouterr().out  # a bare file has no names


def odd_images(folder):
    values = np.random.default_rng(0)
    wide = (values.random((37, 51)) * 65535).astype(np.uint16)
    images = {
        "grey": Image.fromarray((values.random((20, 30)) * 255).astype(np.uint8)),
        "sixteen": Image.fromarray(wide),
        "rgba": Image.fromarray((values.random((20, 30, 4)) * 255).astype(np.uint8)),
        "pixel": Image.new("1", (1, 1)),
        "needle": Image.new("L", (700, 1), 99),
        "palette": noisy(COLOURS["blue"], 0).convert("P"),
    }
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    images["palette"].convert("CMYK").save(folder / "cmyk.jpg")
    return sorted(folder.iterdir())


def test_images_of_every_kind_and_size(ours, tmp_path, capsys):
    paths = odd_images(tmp_path)
    assert predict(*paths, "--model", ours, "--top", 1) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line for line in printed.out.splitlines() if not line.startswith(" ")] == [str(p) for p in paths]


def test_a_picture_of_what_was_seen(ours, tmp_path, capsys):
    paths = odd_images(tmp_path)[:2]
    assert predict(*paths, "--model", ours, "--draw", tmp_path / "seen.png") == 0
    assert capsys.readouterr().out.endswith(f"drawn: {tmp_path / 'seen.png'}\n")
    with Image.open(tmp_path / "seen.png") as picture:
        assert picture.height > 2 * len(paths) * 200
        assert np.asarray(picture.convert("RGB")).std() > 10


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are text")
def test_an_image_whose_name_is_no_text_is_seen_and_drawn(ours, photo, tmp_path, capsys):
    odd = photo.rename(tmp_path / "caf\udce9.png")
    assert predict(odd, "--model", ours, "--json", "--draw", tmp_path / "seen.png") == 0
    assert json.loads(capsys.readouterr().out)["image"] == str(odd)
    assert (tmp_path / "seen.png").exists()


def test_a_corrupt_image_is_named_and_the_others_are_seen(ours, photo, tmp_path, capsys):
    noisy(COLOURS["blue"], 0).save(tmp_path / "bad.png")
    bad = spoil(tmp_path / "bad.png", "truncated")
    assert predict(bad, photo, "--model", ours) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert f"{bad}: cannot be read as an image" in line
    assert printed.out.startswith(str(photo))


def fail(capsys, *arguments):
    """Return the one line that a command fails with."""
    assert predict(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_it_refuses_is_one_line(ours, timms, photo, tmp_path, capsys):
    assert "no such image" in fail(capsys, tmp_path / "none.png", "--model", ours)
    assert "a folder" in fail(capsys, tmp_path, "--model", ours)
    assert "no such checkpoint" in fail(capsys, photo, "--model", "glattn_atom")
    assert "config.json" in fail(capsys, photo, "--model", f"local-dir:{tmp_path}")
    assert "neither best/config.json" in fail(capsys, photo, "--model", tmp_path)
    assert "--top 0" in fail(capsys, photo, "--model", ours, "--top", 0)
    for size in (0, 100_000):
        assert f"--size {size}: 1 to" in fail(capsys, photo, "--model", ours, "--size", size)
    assert "--device" in fail(capsys, photo, "--model", ours, "--device", "abacus")
    assert ".png" in fail(capsys, photo, "--model", ours, "--draw", tmp_path / "seen.gif")
    assert "does not exist" in fail(capsys, photo, "--model", ours, "--draw", tmp_path / "none" / "seen.png")
    grey = save(tmp_path / "grey", "test_glattn", in_chans=1)
    for size in ([], ["--size", 32]):
        assert "takes 1 channel(s)" in fail(capsys, photo, "--model", grey, *size)
    spoil(timms / "model.safetensors", "truncated")
    assert "model.safetensors" in fail(capsys, photo, "--model", timms)


def test_a_model_that_has_diverged_predicts_nothing(ours, photo, tmp_path, capsys):
    folder = shutil.copytree(ours, tmp_path / "best")
    weights = load_file(folder / "model.safetensors")
    weights["head.fc.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors")
    assert predict(photo, "--model", f"local-dir:{folder}") == 1
    assert capsys.readouterr().err == (
        "glattn predict: the model's outputs are no finite numbers: its training has diverged\n"
    )


def test_other_models_predict_without_a_picture(tmp_path, photo, capsys):
    folder = save(tmp_path / "best", "test_resnet")
    assert predict(photo, "--model", folder, "--draw", tmp_path / "seen.png") == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 6
    (line,) = printed.err.splitlines()
    assert "no global-local blocks" in line
    assert not (tmp_path / "seen.png").exists()


def test_received_attention_is_the_softmax_summed_over_the_queries():
    model = timm.create_model("test_glattn", num_classes=5, layout="full", position="none").eval()
    image = torch.randn(1, 3, 64, 96)
    seen = {}
    block = model.stages[-1].blocks[-1].mixer
    group = block.attn.groups[0]
    group.register_forward_hook(lambda _, inputs, out: seen.update(qk=inputs[:2]))
    block.local.register_forward_hook(lambda _, inputs, out: seen.update(local=out))
    maps = explain(model, image)[-1]
    q, k = (x.detach().flatten(2).unflatten(1, (group.num_heads, group.head_dim)) for x in seen["qk"])
    weights = (q.transpose(2, 3) @ k / group.head_dim**0.5).softmax(-1)
    received = weights.sum(2).mean(1).reshape(1, 1, 2, 3)
    expected = torch.nn.functional.interpolate(received, (64, 96), mode="bilinear")[0, 0]
    assert maps.cells == (2, 3)
    np.testing.assert_allclose(maps.received, expected, rtol=1e-4)
    assert received.mean().item() == pytest.approx(1, rel=1e-4)  # an even share
    answer = torch.nn.functional.interpolate(
        seen["local"].detach().abs().mean(1, keepdim=True), (64, 96), mode="bilinear"
    )
    np.testing.assert_allclose(maps.answer, answer[0, 0], rtol=1e-4)


def test_received_attention_is_that_of_all_groups_of_heads():
    options = {"layout": "multi_scale", "num_heads": 2, "window_sizes": (1, 0), "position": "none"}
    model = timm.create_model("test_glattn", num_classes=5, **options).eval()
    whole = model.stages[-1].blocks[-1].mixer.attn.groups[1]  # of the other group's cells each sees itself
    seen = []
    whole.register_forward_hook(lambda _, inputs, out: seen.extend(inputs[:2]))
    maps = explain(model, torch.randn(1, 3, 64, 96))[-1]
    q, k = (x.detach().flatten(2) for x in seen)
    weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
    received = ((weights.sum(1) + 1) / 2).reshape(1, 1, 2, 3)
    expected = torch.nn.functional.interpolate(received, (64, 96), mode="bilinear")[0, 0]
    np.testing.assert_allclose(maps.received, expected, rtol=1e-4)


KINDS = [
    *({"layout": layout, "num_heads": 2} for layout in LAYOUTS),
    *({"mechanism": mechanism, "position": "none", "layout": "full"} for mechanism in MECHANISMS),
    *({"fusion": fusion} for fusion in FUSIONS),
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_kind_of_block_is_explained_and_left_as_it_was(options):
    model = timm.create_model("test_glattn", num_classes=5, **options).eval()
    image = torch.randn(1, 3, 57, 41)
    with torch.no_grad():
        before = model(image)
    maps = explain(model, image)
    assert len(maps) == 4
    for block in maps:
        assert (block.received is None) == (options.get("fusion") == "local")
        assert (block.answer is None) == (options.get("fusion") == "global")
        for values in (block.received, block.answer):
            assert values is None or (values.shape == (57, 41) and np.isfinite(values).all() and values.std() > 0)
    with torch.no_grad():
        assert torch.equal(before, model(image))
    assert not any(module._forward_hooks for module in model.modules())
