"""Options: validated at once, in words a user can act on, and plain JSON."""

import dataclasses
import json
import math

import numpy as np
import pytest
import timm
import torch

from glattn import GLAttnConfig, MixerConfig
from glattn.layers import TABLES
from glattn.models.variants import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_configs_survive_json(name):
    config = VARIANTS[name]
    assert GLAttnConfig().replace(**json.loads(json.dumps(config.to_dict()))) == config


def test_one_value_or_four():
    config = GLAttnConfig().replace(layout=["window", "full", "grid", "pooled"], kernel_sizes=[3, 5], mlp_ratio=3)
    assert [m.layout for m in config.mixer] == ["window", "full", "grid", "pooled"]
    assert config.mlp_ratio == (3.0,) * 4
    assert all(m.kernel_sizes == (3, 5) for m in config.mixer)
    nested = GLAttnConfig().replace(kernel_sizes=[[1, 3], [3], [5], [3, 7]])
    assert [m.kernel_sizes for m in nested.mixer] == [(1, 3), (3,), (5,), (3, 7)]


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GLAttnConfig().stem_stride = 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layuot": "full"}, ["layuot", "did you mean 'layout'"]),
        ({"num_clases": 3}, ["did you mean 'num_classes'"]),
        ({"out_stride": 8}, ["did you mean 'output_stride'"]),
        ({"pretraned": True}, ["did you mean 'pretrained'"]),
        ({"drop_path": 0.1}, ["did you mean 'drop_path_rate'"]),
        ({"not_an_option": 1}, ["not_an_option", "kernel_sizes"]),
    ],
)
def test_unknown_options_raise_type_error(options, words):
    with pytest.raises(TypeError) as caught:
        timm.create_model("test_glattn", **options)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "windw"}, ["layout='windw'", "did you mean 'window'"]),
        ({"layout": ["full"] * 3}, ["layout", "3 values", "4"]),
        ({"kernel_sizes": (2, 3)}, ["kernel_sizes", "2", "odd"]),
        ({"kernel_sizes": ()}, ["kernel_sizes", "empty"]),
        ({"kernel_sizes": "3"}, ["kernel_sizes", "'3'"]),
        ({"dims": (16, 24, 32)}, ["dims", "(16, 24, 32)"]),
        ({"depths": (1, 0, 1, 1)}, ["depths", "positive"]),
        ({"mlp_ratio": -1}, ["mlp_ratio=-1", "positive"]),
        ({"mlp_ratio": math.inf}, ["mlp_ratio=inf", "positive"]),
        ({"mlp_ratio": [4, 4, 0.01, 4]}, ["mlp_ratio", "no hidden channel"]),
        ({"head_dim": 7}, ["head_dim=7", "16 channels", "divisor"]),
        ({"num_heads": 5}, ["num_heads=5", "16 channels", "divisor"]),
        ({"num_heads": 1, "layout": "cross_shaped"}, ["cross_shaped", "2 head groups", "multiple of 2"]),
        ({"head_dim": 2, "position": "rope"}, ["rope", "head_dim=2", "multiple of 4"]),
        ({"local_groups": 5}, ["local_groups=5", "divisor"]),
        ({"local_groups": True}, ["local_groups=True", "dense"]),
        ({"local_groups": "densee"}, ["local_groups='densee'", "did you mean 'dense'"]),
        ({"position": "bias", "mechanism": "performer"}, ["position='bias'", "performer", "rope"]),
        ({"layout": "overlap", "mechanism": "reformer"}, ["overlap", "reformer", "window"]),
        ({"layout": "grid", "window_sizing": "tokens"}, ["window_sizing='tokens'", "grid", "fixed"]),
        ({"fusion": "split", "split_ratio": 1.0}, ["split_ratio=1.0", "change split_ratio"]),
        ({"augment_ratio": 1.0, "local": "augmented"}, ["augment_ratio", "smaller"]),
        ({"window_size": 0}, ["window_size=0", "1 or more"]),
        ({"window_size": 3.5}, ["window_size=3.5", "integer"]),
        ({"halo": -1}, ["halo=-1"]),
        ({"attn_drop": 1.5}, ["attn_drop=1.5"]),
        ({"layer_scale": -1.0}, ["layer_scale=-1.0", "0 to leave it out"]),
        ({"layer_scale": math.inf}, ["layer_scale=inf", "0 to leave it out"]),
        ({"stem_stride": 3}, ["stem_stride=3", "4"]),
        ({"abs_pos": "stme"}, ["abs_pos='stme'", "did you mean 'stem'"]),
        ({"output_stride": 12}, ["output_stride=12", "8, 16, 32"]),
        ({"global_pool": "mean"}, ["global_pool='mean'", "avg"]),
        ({"img_size": (224, 0)}, ["img_size=(224, 0)"]),
        ({"img_size": 64.0}, ["img_size=64.0"]),
        ({"num_classes": True}, ["num_classes=True"]),
        ({"in_chans": 0}, ["in_chans=0"]),
        ({"num_classes": -1}, ["num_classes=-1"]),
        ({"drop_path_rate": 1.0}, ["drop_path_rate=1.0"]),
        ({"act_layer": "geluu"}, ["act_layer='geluu'", "gelu"]),
    ],
)
def test_impossible_options_say_what_is_allowed(options, words):
    with pytest.raises(ValueError) as caught:
        timm.create_model("test_glattn", **options)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [(4, ""), (-1,), (2.0,)])
def test_impossible_classifiers_are_refused_before_anything_changes(given):
    model = timm.create_model("test_glattn", num_classes=3).eval()
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(*given)
    assert model.num_classes == model(torch.zeros(1, 3, 32, 32)).shape[1] == 3


@pytest.mark.parametrize("act_layer", ["relu", "prelu"])
def test_activations_are_made_on_the_device_and_in_the_type_asked_for(act_layer):
    model = timm.create_model("test_glattn", act_layer=act_layer, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_numbers_of_numpy_are_numbers():
    given = {
        "num_classes": np.int64(3),
        "drop_rate": np.float32(0.5),
        "layer_scale": np.float32(0.5),
        "split_ratio": np.float32(0.5),
        "in_chans": np.uint8(1),
    }
    model = timm.create_model(
        "test_glattn", head_dim=np.int32(8), depths=(np.int64(1),) * 4, stem_stride=np.int64(2), **given,
        local_groups=np.int64(2),
    )  # fmt: skip
    model.set_input_size(np.int64(64))
    assert model.head.fc.out_features == 3
    json.dumps([model.cfg.to_dict(), model.num_classes, model.drop_rate])


def test_layer_scale_may_be_left_out():
    model = timm.create_model("test_glattn", layer_scale=0)
    assert not [name for name, _ in model.named_parameters() if "ls1" in name or "ls2" in name]
    again = timm.create_model("test_glattn", **model.cfg.to_dict())  # which drops what is None
    again.load_state_dict(model.state_dict())


def test_every_kind_is_reachable():
    for option, kinds in TABLES.items():
        for kind in kinds:
            assert getattr(MixerConfig(**{option: kind}, **_companions(option, kind)), option) == kind


def _companions(option, kind):
    return {"layout": "window"} if option == "window_sizing" and kind != "fixed" else {}


@pytest.mark.parametrize("mixer", ["full", (MixerConfig(),) * 3, ("full",) * 4])
def test_a_mixer_is_one_or_one_a_stage(mixer):
    with pytest.raises(ValueError, match=r"mixer.* give .* 4"):
        GLAttnConfig(mixer=mixer)
    assert GLAttnConfig(mixer=[MixerConfig()] * 4) == GLAttnConfig(mixer=MixerConfig()) == GLAttnConfig()
