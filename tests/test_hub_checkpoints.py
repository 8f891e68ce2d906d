"""A corpus of checkpoints: each loads right, or is refused in one line that names the file and the key."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import glattn  # noqa: F401
from glattn.hub import create_model, push
from glattn.hub.card import Record
from glattn.models.weights import save_weights

NAME = "test_glattn"
KEY = "stages.2.blocks.1.mlp.fc1.conv.weight"


def trained(seed: int = 0, **options) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **{"num_classes": 10, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for _ in range(2):
            model.train()(torch.rand(4, model.in_chans, 64, 64))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["timm", "glattn", "checkpoint_path"])
def load(request):
    """Return a function from a file and options to a model, by each of the ways there are."""
    if request.param == "checkpoint_path":
        return lambda path, **options: create_model(NAME, checkpoint_path=path, **{"num_classes": 10, **options})
    create = timm.create_model if request.param == "timm" else create_model

    def load(path, **options):
        overlay = {"file": str(path), "num_classes": 10}
        return create(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **options)

    return load


def same(one: torch.nn.Module, other: torch.nn.Module, image: torch.Tensor) -> bool:
    with torch.inference_mode():
        return torch.equal(one(image), other.eval()(image))


def refused(load, path: Path, *said: str, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    for part in said:
        assert part in message
    return message


FORMS = {
    "plain": lambda state: state,
    "module": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    "compiled and wrapped": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "compiled stage": lambda state: {k.replace("stages.2.", "stages.2._orig_mod."): v for k, v in state.items()},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "averaged alone": lambda state: {"state_dict_ema": {f"module.{k}": v for k, v in state.items()}},
    "averaged beside": lambda state: {
        "state_dict": {k: torch.zeros_like(v) for k, v in state.items()},
        "state_dict_ema": state,
    },
    "averaged by torch": lambda state: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in state.items()}},
    "no counters": lambda state: {k: v for k, v in state.items() if "num_batches_tracked" not in k},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_load_right(tmp_path, model, state, image, load, form):
    torch.save(FORMS[form](state), tmp_path / "model.pth")
    assert same(model, load(tmp_path / "model.pth"), image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_other_precisions_load_as_the_models_own(tmp_path, state, load, dtype, suffix):
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    path = tmp_path / f"model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(cast, path)
    loaded = load(path).state_dict()
    assert all(torch.equal(loaded[k], cast[k].to(state[k].dtype)) for k in state)


@pytest.mark.parametrize("source", ["timm", "ours"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_folder_loads_right(tmp_path, model, image, source, prefix):
    if source == "timm":
        save_for_hf(model, tmp_path, safe_serialization=True)
    else:
        push(model, "org/name", dry_run=tmp_path)
    path = tmp_path / "model.safetensors"
    if prefix:
        save_file({prefix + k: v for k, v in load_file(path).items()}, path)
    assert same(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True), image)


def test_safetensors_come_before_a_pickle(tmp_path, model, image):
    push(model, "org/name", dry_run=tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not to be read")
    assert same(model, create_model(f"local-dir:{tmp_path}", pretrained=True), image)


class Burglar:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, state, load, legacy):
    burglar = Burglar()
    burglar.path = str(tmp_path / "broken-in")
    path = tmp_path / "model.pth"
    torch.save({**state, "extra": burglar}, path, _use_new_zipfile_serialization=not legacy)
    message = refused(load, path, "never run", "safetensors")
    assert legacy or "pathlib" in message
    assert not (tmp_path / "broken-in").exists()
    path.write_bytes(pickle.dumps(burglar, protocol=2))
    refused(load, path)
    assert not (tmp_path / "broken-in").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0, 0.0001, 0.3, 0.999])
def test_truncated(tmp_path, model, state, load, suffix, share):
    path = tmp_path / f"model.{suffix}"
    save_weights(model, path) if suffix == "safetensors" else torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(load, path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, model, state, image, suffix):
    path = tmp_path / f"model.{suffix}"
    save_weights(model, path) if suffix == "safetensors" else torch.save(state, path)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(data), (40,), generator=generator).tolist() + list(range(0, 64, 9))
    found = 0
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        message = ""
        try:
            loaded = create_model(NAME, checkpoint_path=path, num_classes=10)
        except ValueError as error:
            message = str(error)
        if message:
            assert "\n" not in message
            assert str(path) in message
            found += 1
        else:  # padding between the archive's records, or metadata that say nothing of the tensors
            assert same(model, loaded, image)
    assert found > len(places) * 0.8


def test_missing(tmp_path, load):
    refused(load, tmp_path / "none.safetensors", "no such checkpoint", kind=FileNotFoundError)


def drop(state):
    return {k: v for k, v in state.items() if k != KEY}


def poison(value):
    def change(state):
        wrong = state[KEY].clone()
        wrong.view(-1)[7] = value
        return {**state, KEY: wrong}

    return change


WRONG = {
    "missing key": (drop, (KEY, "missing")),
    "extra key": (lambda s: {**s, "neck.weight": torch.ones(3)}, ("neck.weight", "not in this model")),
    "wrong shape": (lambda s: {**s, KEY: s[KEY][:5]}, (KEY, "(5, 32, 1, 1)", "(128, 32, 1, 1)", "mlp_ratio")),
    "wrong rank": (lambda s: {**s, KEY: s[KEY].flatten()}, (KEY, "(4096,)", "(128, 32, 1, 1)")),
    "transposed": (lambda s: {**s, KEY: s[KEY].transpose(0, 1).contiguous()}, (KEY, "(32, 128, 1, 1)")),
    "integers": (lambda s: {**s, KEY: s[KEY].int()}, (KEY, "torch.int32", "torch.float32")),
    "NaN": (poison(float("nan")), (KEY, "1 of 4096", "NaN")),
    "infinite": (poison(float("-inf")), (KEY, "1 of 4096", "infinite")),
    "other classes": (
        lambda s: {**s, "head.fc.weight": s["head.fc.weight"][:7], "head.fc.bias": s["head.fc.bias"][:7]},
        ("head.fc.weight", "(7, 64)", "(10, 64)", "num_classes=7"),
    ),
    "other channels": (
        lambda s: {**s, "stem.conv1.conv.weight": s["stem.conv1.conv.weight"][:, :1].contiguous()},
        ("stem.conv1.conv.weight", "(8, 1, 3, 3)", "(8, 3, 3, 3)", "in_chans=1"),
    ),
    "no classifier": (
        lambda s: {k: v for k, v in s.items() if "head.fc" not in k},
        ("head.fc.weight", "missing", "num_classes=0"),
    ),
    "empty": (lambda s: {}, ("no tensors",)),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_contents_are_refused(tmp_path, state, load, wrong, suffix):
    change, said = WRONG[wrong]
    path = tmp_path / f"model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(change(state), path)
    with torch.random.fork_rng():
        refused(load, path, *said)


def test_something_else_than_tensors(tmp_path, state, load):
    torch.save({**state, "epoch": 3}, tmp_path / "model.pth")
    refused(load, tmp_path / "model.pth", "epoch", "not a tensor")


def test_the_weights_say_how_many_classes_and_channels_they_have(tmp_path, image):
    gray = trained(in_chans=1)
    save_weights(gray, tmp_path / "gray.safetensors")
    create = timm.create_model
    overlay = {"file": str(tmp_path / "gray.safetensors")}
    # timm alone would take the registry's 1000 classes for the file's, and leave a classifier of chance
    loaded = create(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, in_chans=1)
    assert same(gray, loaded, image[:, :1])
    assert loaded.pretrained_cfg["num_classes"] == 10
    five = create(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=4).eval()
    assert five.stem.conv1.conv.weight.shape[1] == 4
    assert torch.equal(five.stages[0].state_dict()["blocks.0.ls1.gamma"], gray.stages[0].blocks[0].ls1.gamma)
    maps = create(NAME, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, in_chans=1).eval()
    with torch.inference_mode():
        assert torch.equal(maps(image[:, :1])[-1], gray.forward_features(image[:, :1]))
    with pytest.raises(ValueError, match=r"\(10, 64\).*\(1000, 64\).*num_classes=10"):
        create(NAME, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)


def test_other_sizes_are_resized_and_other_options_refused_by_name(tmp_path):
    options = {"layout": "window", "window_size": 7, "position": "bias", "abs_pos": "stem"}
    push(trained(**options), "org/name", dry_run=tmp_path)
    name = f"local-dir:{tmp_path}"
    bigger = timm.create_model(name, pretrained=True, img_size=288, window_size=9, num_classes=3).eval()
    assert bigger(torch.rand(1, 3, 100, 72)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"made with mlp_ratio=4\.0, the model with mlp_ratio=2\.0"):
        timm.create_model(name, pretrained=True, mlp_ratio=2.0)
    with pytest.raises(ValueError, match=r"made with depths=\[1, 1, 2, 1\], the model with depths=\[1, 1, 3, 1\]"):
        timm.create_model(name, pretrained=True, depths=(1, 1, 3, 1))
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 10}
    with pytest.raises(ValueError, match="the checkpoint is a test_glattn, the model a glattn_atto"):
        timm.create_model("glattn_atto", pretrained=True, pretrained_cfg_overlay=overlay)


def test_damage_since_saving_is_found_even_where_every_value_is_finite(tmp_path, model):
    push(model, "org/name", dry_run=tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    for create in (timm.create_model, create_model):
        with pytest.raises(ValueError, match="damaged") as error:
            create(f"local-dir:{tmp_path}", pretrained=True)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("MIT", "license: mit\n"),
        ("fair-noncommercial-research-license", "license: fair-noncommercial-research-license\n"),
        ("qwen-community-1.0", "license: other\nlicense_name: qwen-community-1.0\n"),
        ("My own", "license: other\nlicense_name: my-own\n"),
        (None, "---\nlibrary_name"),
    ],
)
def test_a_licence_is_one_of_the_hub_s_or_another_or_left_out(licence, said, tmp_path, model):
    model.pretrained_cfg["license"] = licence
    push(model, "org/name", dry_run=tmp_path)
    assert said in (tmp_path / "README.md").read_text()


def test_names_by_index_are_names(tmp_path, model):
    names = [f"<class>\n{number}" for number in range(10)]
    model.pretrained_cfg["label_names"] = {str(number): name for number, name in enumerate(names)}
    push(model, "org/name", dry_run=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == names
    assert "&lt;class&gt; 0, &lt;class&gt; 1" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="10 label_names that are not under 0, 1, 2 and so on"):
        push(model, "org/name", dry_run=tmp_path, label_names={name: number for number, name in enumerate(names)})


@pytest.mark.parametrize("moved", [False, True])
def test_a_best_folder_alone_has_its_measurements(moved, tmp_path, model):
    run = tmp_path / "run"
    push(model, "org/name", dry_run=run / "best")
    (run / "best" / "metrics.json").write_text('{"epoch": 3, "top1": 87.125}')
    (run / "config.yaml").write_text("dataset: digits\nseed: 7\n")
    pushed = run / "best"
    if moved:
        pushed = pushed.rename(tmp_path / "final")
    push(pushed, "org/name", dry_run=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "87.125" in card
    assert ("| seed | 7 |" in card) != moved


@pytest.mark.parametrize("told", [[], {"pretrained_cfg": None}, {"num_classes": "3"}, {"model_args": {"fooo": 1}}])
def test_a_config_of_another_kind_is_one_line(told, tmp_path, model):
    push(model, "org/name", dry_run=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **told} if told else told))
    for options in ({}, {"num_classes": 5}):
        with pytest.raises(ValueError, match=r"config\.json (is not one of timm's|asks for 'fooo')") as error:
            create_model(f"local-dir:{tmp_path}", pretrained=True, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="config") if told != {"model_args": {"fooo": 1}} else pytest.raises(TypeError):
        create_model(f"local-dir:{tmp_path}", pretrained=True, fooo=2)


@pytest.mark.parametrize("found", ['[{"top1": 3}]', '{"epoch": "3/10"}'])
def test_a_foreign_metrics_file_is_nobody_s_measurement(found, tmp_path, model):
    push(model, "org/name", dry_run=tmp_path / "model")
    (tmp_path / "model" / "metrics.json").write_text(found)
    push(tmp_path / "model", "org/name", dry_run=tmp_path / "out")
    assert "Nothing: these weights came without" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("named", "good"), [("flowers", True), ("-flowers", False), ("a.git", False), ("a" * 120, False)]
)
def test_a_folder_s_name_is_a_data_set_s_where_it_can_be(named, good, tmp_path, model):
    record = Record(dataset=named, metrics={"top1": 50.0})
    push(model, "org/name", dry_run=tmp_path, record=record)
    assert (f"datasets:\n- {named}" in (tmp_path / "README.md").read_text()) == good


def test_push_refuses_what_would_not_load(tmp_path, model):
    with pytest.raises(ValueError, match=r"3 label_names for a model of 10 classes"):
        push(model, "org/name", dry_run=tmp_path, label_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="pretrained_cfg"):
        push(torch.nn.Linear(2, 2), "org/name", dry_run=tmp_path)
    with pytest.raises(FileNotFoundError, match="no model here"):
        push(tmp_path, "org/name", dry_run=tmp_path / "out")
    with pytest.raises(ValueError, match="'name': give org/name"):
        push(model, "name", dry_run=tmp_path)
    with pytest.raises(ValueError, match=re.escape("org/na me")):
        push(model, "org/na me", dry_run=tmp_path / "out")
    broken = trained()
    with torch.no_grad():
        broken.head.fc.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"head\.fc\.bias"):
        push(broken, "org/name", dry_run=tmp_path / "out")
    folded = timm.utils.reparameterize_model(trained())
    with pytest.raises(ValueError, match=r"^the model is folded: .*; push the one that it was folded from$"):
        push(folded, "org/name", dry_run=tmp_path / "out")
    partly = trained()
    partly.stages = timm.utils.reparameterize_model(partly.stages)
    with pytest.raises(ValueError, match=r"^the model is folded"):
        push(partly, "org/name", dry_run=tmp_path / "out")
    torch.save(folded.state_dict(), tmp_path / "folded.pth")
    with pytest.raises(ValueError, match=r"the checkpoint is of a folded model: save the one that it was folded from$"):
        timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "folded.pth"), "num_classes": 10}
        )
    features = timm.create_model("test_glattn", features_only=True)
    with pytest.raises(ValueError, match=r"^FeatureListNet gives features alone; push the whole model$"):
        push(features, "org/name", dry_run=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"num_classes": 0, "global_pool": ""}, {"in_chans": 1},
                                     {"in_chans": 4}, {"in_chans": 6}])  # fmt: skip
def test_a_cards_code_runs_whatever_the_model_reads_and_gives(tmp_path, options):
    push(timm.create_model(NAME, **options), "org/name", dry_run=tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "0 classes" not in card.replace("1000 classes", "")
    assert ("pipeline_tag: image-feature-extraction" in card) == (options.get("num_classes") == 0)
    assert "transformers" not in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    said: dict[str, Any] = {}
    exec("\n".join(blocks).replace("hf-hub:org/name", f"local-dir:{tmp_path}"), said)
    assert said["model"].num_classes == 5
    assert said["batch"].shape[1] == options.get("in_chans", 3)


def test_dry_run_again_updates_and_keeps_an_edited_card(tmp_path, model, image):
    push(model, "org/name", dry_run=tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"README.md", "config.json", "model.safetensors"}
    push(model, "org/name", dry_run=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first

    (tmp_path / "README.md").write_text(first["README.md"].decode().replace("# org/name", "# Ours"))
    other = trained(1)
    push(other, "org/name", dry_run=tmp_path)
    assert "# Ours" in (tmp_path / "README.md").read_text()
    assert same(other, timm.create_model(f"local-dir:{tmp_path}", pretrained=True), image)


def test_any_memory_format_wrapper_and_model_of_timm(tmp_path, model, image):
    nhwc = trained().to(memory_format=torch.channels_last)
    push(nhwc, "org/name", dry_run=tmp_path / "nhwc")
    assert same(model, timm.create_model(f"local-dir:{tmp_path / 'nhwc'}", pretrained=True), image)
    averaged = timm.utils.ModelEmaV3(model)
    push(averaged, "org/name", dry_run=tmp_path / "averaged")
    assert same(model, timm.create_model(f"local-dir:{tmp_path / 'averaged'}", pretrained=True), image)
    resnet = timm.create_model("test_resnet", num_classes=4).eval()
    push(resnet, "org/resnet", dry_run=tmp_path / "resnet")
    assert same(resnet, create_model(f"local-dir:{tmp_path / 'resnet'}", pretrained=True), image)
    assert "import glattn" not in (tmp_path / "resnet" / "README.md").read_text()


def test_errors_of_names_and_configs(tmp_path, model):
    with pytest.raises(ValueError, match="did you mean 'glattn_atto'"):
        create_model("glattn_ato")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        create_model(f"local-dir:{tmp_path}", pretrained=True)
    push(model, "org/name", dry_run=tmp_path)
    shutil.copy(tmp_path / "config.json", tmp_path / "kept.json")
    for text, said in (("{", "no JSON"), ('{"num_classes": 3}', "architecture")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=said) as error:
            create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)
