"""The list of the family against counts made another way."""

import pytest
import timm
import torch
from timm.models import PretrainedCfg, _registry
from torch import nn

from glattn.cli import main
from glattn.listing import describe


def rows(capsys, *pattern: str) -> dict[str, list[str]]:
    assert main(["list", *pattern]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "params,", "M", "GMACs", "size", "weights"]
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.mark.slow
def test_the_whole_family_is_there_smallest_first(capsys):
    listed = rows(capsys)
    assert sorted(listed) == sorted(timm.list_models(module="glattn"))
    assert [float(row[1]) for row in listed.values()] == sorted(float(row[1]) for row in listed.values())


def test_a_pattern_chooses_and_parameters_are_a_count(capsys):
    listed = rows(capsys, "glattn_[apn]*o")
    tags = ["fractal1k_ft_contour1k_64", "fractal1k_64"]
    weights = {"glattn_atto": tags, "glattn_pico": tags, "glattn_nano": ["-"]}
    assert list(listed) == list(weights)
    for name in listed:
        model = timm.create_model(name)
        params = sum(p.numel() for p in model.parameters())
        assert listed[name][0] == f"{params / 1e6:.2f}"
        assert listed[name][2:] == ["224", *weights[name]]


def test_multiply_adds_are_those_of_convolutions_linear_layers_and_attention(capsys):
    model = timm.create_model("test_glattn").eval()
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        weight = module.weight
        positions = output.numel() if isinstance(module, nn.Linear) else output[0].numel()
        counted += positions * weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)

    real = nn.functional.scaled_dot_product_attention

    def attend(q, k, v, *args, **kwargs):
        nonlocal counted
        counted += q.shape[:-2].numel() * q.shape[-2] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return real(q, k, v, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        model(torch.rand(1, 3, 224, 224))
    member = describe("test_glattn")
    assert member.params == sum(p.numel() for p in model.parameters())
    assert member.macs == pytest.approx(counted, rel=0.01)
    assert rows(capsys, "test_*") == {"test_glattn": ["0.20", f"{counted / 1e9:.2f}", "224", "-"]}


def test_weights_that_there_are_go_by_their_tags(capsys, monkeypatch):
    name = "test_glattn.digits"
    cfg = PretrainedCfg(hf_hub_id="org/test_glattn.digits", tag="digits", architecture="test_glattn")
    monkeypatch.setitem(_registry._model_pretrained_cfgs, name, cfg)
    monkeypatch.setattr(_registry, "_model_has_pretrained", {*_registry._model_has_pretrained, name})
    tags = _registry._model_with_tags
    monkeypatch.setitem(tags, "test_glattn", [*tags["test_glattn"], name])
    assert rows(capsys, "test_*")["test_glattn"][-1] == "digits"


def test_an_unknown_name(capsys):
    assert main(["list", "resnet*"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "'resnet*'; there are glattn_atto" in message
