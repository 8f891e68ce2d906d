"""The weights that the package carries: they load with no network, say what they are, and fit the network of today."""

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from hub_client import Client, Failed, environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint

import glattn
from glattn.benchmark.folding import observe
from glattn.hub import push
from glattn.hub.card import read_record
from glattn.models.checkpoint import checkpoint_filter_fn
from glattn.models.weights import HUB, check_digest, source_overlay
from glattn.training.classifier import open_checkpoint
from glattn.training.config import TrainConfig, read_recipe
from glattn.training.pretrain import FormulaSource

ROOT = Path(__file__).resolve().parents[1]
CONTOURS = "glattn_atto.fractal1k_ft_contour1k_64"
PICO = "glattn_pico.fractal1k_ft_contour1k_64"
# at most, of what the package has
MB = {CONTOURS: 8, "glattn_atto.fractal1k_64": 8, PICO: 18, "glattn_pico.fractal1k_64": 18}
DEFAULTS = {"glattn_atto": CONTOURS, "glattn_pico": PICO}
SHIPPED = pytest.mark.parametrize("name", MB)
WAYS = pytest.mark.parametrize("create", [timm.create_model, glattn.create_model], ids=["timm", "glattn"])


def file_of(name: str) -> Path:
    return ROOT / "glattn" / "models" / f"{name}.safetensors"


def record_of(name: str) -> Path:
    return ROOT / "docs" / "weights" / name


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def hub_client(tmp_path_factory):
    """Return a process whose Hub is a port where nobody listens."""
    client = Client(environment("http://127.0.0.1:9", tmp_path_factory.mktemp("home")))
    yield client
    client.close()


@pytest.fixture
def _closed(monkeypatch):
    """Let no connection be opened."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)


@pytest.mark.usefixtures("_closed")
@WAYS
@pytest.mark.parametrize(("asked", "name"), [*DEFAULTS.items(), *zip(MB, MB, strict=True)])
def test_they_load_without_a_connection(create, asked, name, image):
    model = create(asked, pretrained=True).eval()
    expected = load_file(file_of(name))
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key
    assert model.pretrained_cfg["tag"] == name.partition(".")[2]
    with torch.inference_mode():
        assert torch.isfinite(model(image)).all()


@pytest.mark.usefixtures("_closed")
def test_every_habit_works_from_them(image):
    whole = timm.create_model("glattn_atto", pretrained=True).eval()
    with pytest.raises(ValueError, match="classifier reads 448 channels: take its global_pool"):
        timm.create_model("glattn_atto", pretrained=True, global_pool="catavgmax")
    fewer = timm.create_model("glattn_atto", pretrained=True, num_classes=7, in_chans=1, img_size=96).eval()
    features = timm.create_model("glattn_atto", pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        assert fewer(image.mean(1, keepdim=True)).shape == (2, 7)
        for one, other in zip(
            features(image), whole.forward_intermediates(image, intermediates_only=True), strict=True
        ):
            assert torch.equal(one, other)
    assert torch.equal(fewer.stages[0].blocks[0].mlp.fc1.conv.weight, whole.stages[0].blocks[0].mlp.fc1.conv.weight)


@SHIPPED
def test_they_are_small_and_whole(name):
    path = file_of(name)
    assert path.stat().st_size < 1e6 * MB[name]
    with safe_open(path, framework="pt") as file:
        assert "sha256" in file.metadata()
    tensors = load_file(path)
    check_digest(tensors, path)
    kinds = {value.dtype for value in tensors.values() if value.ndim > 1}
    assert kinds == {torch.float16}


@SHIPPED
def test_no_rate_is_too_low_for_them(name):
    """In front of a batch norm no kernel is larger than a new model's: one step turns both as far."""
    ours, new = (timm.create_model(name, pretrained=given).eval() for given in (True, False))
    pairs = observe(ours, torch.zeros(1, 3, 64, 64))
    assert len(pairs) > 50
    for conv, _ in pairs:
        assert ours.get_submodule(conv).weight.norm() < 1.2 * new.get_submodule(conv).weight.norm(), conv


@SHIPPED
def test_they_know_pictures_that_they_have_not_seen(name):
    model = timm.create_model(name, pretrained=True).eval()
    source = FormulaSource.of(read_record(record_of(name)).dataset, 400, fixed=True, side=64)
    assert list(model.pretrained_cfg["label_names"]) == list(source.class_names)
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, 64, 64)}
    (pictures, places), *_ = source.loader(
        [[(i, 0) for i in range(400)]], config, workers=0, device=torch.device("cpu")
    )
    with torch.inference_mode():
        right = (model(pictures).argmax(1) == places[:, 0]).float().mean()
    measured = json.loads((record_of(name) / "best" / "metrics.json").read_text())["top1"]
    assert 100 * float(right) == pytest.approx(measured, abs=7)


@SHIPPED
def test_the_record_is_of_enough_pictures_and_its_card_says_so(name):
    card, seen, kinds = (record_of(name) / "README.md").read_text(), 0, []
    # of the run, and those that it went on from
    folders = sorted(path.parent for path in record_of(name).rglob("config.yaml"))
    for folder in folders:
        record = read_record(folder)
        kinds.append(record.dataset)
        with (folder / "metrics.csv").open(newline="") as file:
            epochs = list(csv.DictReader(file))
        config = TrainConfig(**read_recipe(folder / "config.yaml"))
        loss = config.eval_metric == "loss"
        scores = [-float(epoch["val_loss"]) if loss else float(epoch["top1"]) for epoch in epochs]
        best = 1 + scores.index(max(scores))  # what is carried is of the best epoch
        assert record.seen == config.epoch_samples * best
        seen += record.seen
        assert f"{record.seen:,}" in card
        assert str(record.environment["commit"]) in card
    assert seen >= 2_000_000
    went_on = int(name in (CONTOURS, PICO))
    assert kinds == ["contours"] * went_on + ["fractals"] * (len(kinds) - went_on)
    for said in (f"hf-hub:{HUB}/{name}", "no photograph", f"{seen:,}",
                 "without fine-tuning they predict nothing", "## When it helps"):  # fmt: skip
        assert said in card


@pytest.mark.parametrize(("metric", "best"), [("top1", 1), ("loss", 3)])
def test_a_record_without_its_weights_counts_up_to_the_epoch_that_was_kept(tmp_path, metric, best):
    (tmp_path / "config.yaml").write_text(f"eval_metric: {metric}\n")
    (tmp_path / "environment.json").write_text('{"images_per_epoch": 100}')
    rows = "1,1.0,90,10\n2,0.8,80,10\n3,0.5,85,10\n4,0.6,70,10\n"
    (tmp_path / "metrics.csv").write_text("epoch,val_loss,top1,images_per_second\n" + rows)
    assert read_record(tmp_path).seen == 100 * best


@WAYS
@pytest.mark.parametrize("name", ["glattn_tiny", "test_glattn"])
def test_a_variant_without_weights_says_so_in_one_line(create, name, hub_client):
    code = f"""
        import timm, glattn
        create = {"timm" if create is timm.create_model else "glattn"}.create_model
        create("{name}", pretrained=True)
    """
    with pytest.raises(Failed) as error:
        hub_client.run(code)
    assert "OSError" in error.value.kinds
    assert "\n" not in error.value.message
    for said in (f"{name}: no pretrained weights", "pretrained=False", "pretrained_cfg_overlay", f"{HUB}/{name}"):
        assert said in error.value.message


SOURCES = {
    "file": 'dict(pretrained_cfg_overlay=dict(file=f"{folder}/model.safetensors"))',
    "tensors": "dict(pretrained_cfg_overlay=dict(state_dict=mine.state_dict()))",
    "cfg with a file": 'dict(pretrained_cfg=dict(file=f"{folder}/model.safetensors", **plain))',
    "cfg with tensors": "dict(pretrained_cfg=dict(state_dict=mine.state_dict(), **plain))",
    "url": 'dict(pretrained_cfg_overlay=dict(url=f"file://{folder}/model.safetensors"))',
    "nothing": "dict(pretrained_cfg_overlay={})",
    "no repository": "dict(pretrained_cfg_overlay=dict(hf_hub_id=None))",
}


@WAYS
@pytest.mark.parametrize("source", SOURCES)
def test_the_users_source_comes_before_them(create, source, hub_client, tmp_path):
    same = hub_client.run(f"""
        import timm, torch, glattn
        from glattn.hub import push
        mine = timm.create_model("glattn_atto", num_classes=3)
        folder = push(mine, "org/mine", dry_run={str(tmp_path)!r})
        torch.hub.set_dir({str(tmp_path / "cache")!r})
        plain = dict(num_classes=3, input_size=(3, 224, 224), first_conv="stem.conv1.conv", classifier="head.fc")
        made = {"timm" if create is timm.create_model else "glattn"}.create_model(
            "glattn_atto", pretrained=True, num_classes=3, **{SOURCES[source]}
        )
        key = "stages.0.blocks.0.mlp.fc1.conv.weight"
        result = [torch.equal(made.state_dict()[key], mine.state_dict()[key])]
    """)
    assert same == [source not in ("nothing", "no repository")]


@pytest.mark.parametrize(
    ("given", "cleared"),
    [
        ({"url": "u"}, {"file", "hf_hub_id"}),
        ({"hf_hub_id": "r"}, {"file"}),
        ({"hf_hub_filename": "f"}, {"file"}),
        ({"hf_hub_id": None}, set()),
        ({"num_classes": 3}, set()),
        (None, set()),
    ],
)
def test_an_overlays_source_is_the_only_one(given, cleared):
    overlay = source_overlay(given)
    assert {key for key, value in overlay.items() if value is None and key not in (given or {})} == cleared
    assert {key: overlay[key] for key in given or {}} == (given or {})


def test_a_classifier_of_theirs_names_its_pictures():
    names = open_checkpoint("glattn_atto").class_names
    assert names == FormulaSource.of("contours", 1, fixed=True, side=64).class_names


def test_other_weights_carry_no_names_of_theirs(tmp_path):
    ours = timm.create_model("glattn_atto", pretrained=True)
    assert len(ours.pretrained_cfg["label_names"]) == 1000
    ours.reset_classifier(1000)
    save_file(ours.state_dict(), tmp_path / "mine.safetensors")
    overlay = {"file": str(tmp_path / "mine.safetensors")}
    for model in (
        ours,
        timm.create_model("glattn_atto"),
        timm.create_model("glattn_atto", pretrained=True, pretrained_cfg_overlay=overlay),
        timm.create_model("glattn_atto", checkpoint_path=str(tmp_path / "mine.safetensors")),
    ):
        assert not model.pretrained_cfg.get("label_names")
    overlay |= {"source": None}
    named = push(timm.create_model("glattn_atto", num_classes=2), "org/mine", dry_run=tmp_path / "a", label_names="ab")
    save_file(timm.create_model("glattn_atto", num_classes=2).state_dict(), tmp_path / "mine.safetensors")
    named = timm.create_model(f"local-dir:{named}", pretrained=True, pretrained_cfg_overlay=overlay)
    assert list(named.pretrained_cfg["label_names"]) == ["a", "b"]  # the user's own
    push(ours, "org/mine", dry_run=tmp_path / "pushed")
    assert "contour0" not in (tmp_path / "pushed" / "config.json").read_text()


@pytest.mark.parametrize("classes", [0, 10])
def test_another_classifier_has_no_names_of_theirs(classes):
    model = timm.create_model("glattn_atto", pretrained=True, num_classes=classes)
    assert not model.pretrained_cfg.get("label_names")
    kept = timm.create_model("glattn_atto", pretrained=True, num_classes=1000)
    assert len(kept.pretrained_cfg["label_names"]) == 1000


def test_timms_own_loader_takes_any_file_by_the_familys_filter(tmp_path):
    mine = timm.create_model("glattn_atto")
    save_file(mine.state_dict(), tmp_path / "mine.safetensors")
    model = timm.create_model("glattn_atto", pretrained=True)
    load_checkpoint(model, str(tmp_path / "mine.safetensors"), filter_fn=checkpoint_filter_fn)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in mine.state_dict().items())


def test_another_mechanism_starts_from_what_it_shares_with_them(tmp_path):
    other = {"position": "rope", "num_classes": 3}
    with pytest.raises(
        ValueError, match=r"keys are not in this model; .* made with position='conv', .*; pretrained_strict=False loads"
    ):
        timm.create_model("glattn_atto", pretrained=True, **other)
    with pytest.raises(ValueError, match=r"position='rope'$"):  # other shapes of what they share: it would fail
        timm.create_model("glattn_atto", pretrained=True, mlp_ratio=2.0, **other)
    theirs = timm.create_model("glattn_atto", pretrained=True).state_dict()
    model = timm.create_model("glattn_atto", pretrained=True, pretrained_strict=False, **other)
    mine = model.state_dict()
    assert set(mine) < set(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items() if not key.startswith("head."))
    push(model, "org/mine", dry_run=tmp_path)
    save_file(theirs, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="keys are not in this model"):  # the pushed model is loaded strictly again
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(ValueError, match=r"has shape"):
        timm.create_model("glattn_atto", pretrained=True, pretrained_strict=False, dims=(32, 64, 160, 512))


def test_no_path_of_theirs_travels_on(tmp_path):
    push(timm.create_model("glattn_atto", pretrained=True, num_classes=3), "org/mine", dry_run=tmp_path)
    assert str(ROOT) not in (tmp_path / "config.json").read_text()
    for path in (ROOT / "docs" / "weights").rglob("*.*"):
        if path.is_file() and path.suffix != ".png":
            assert not any(part in path.read_text() for part in ("/tmp/", "/root/", "/home/", str(ROOT))), path
