"""UNetFormer's decoder on the family's maps."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from glattn import MixerConfig
from glattn.heads import UNetFormer, UNetFormerDecoder, unetformer
from glattn.layers import GlobalLocalAttention
from glattn.layers.layout import Window


def trained(model):
    """Give the norms statistics, as if trained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (33, 40), (200, 48)])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_logits_have_the_image_s_size(size, stride):
    model = unetformer("test_glattn", num_classes=5, dim=16, output_stride=stride).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5, *size)


def test_it_decodes_as_the_paper_says():
    """The way from the maps to the classes, written out."""
    model = trained(unetformer("test_glattn", num_classes=5, dim=16))
    x = torch.randn(2, 3, 96, 64)
    c1, c2, c3, c4 = model.backbone(x)
    d = model.decoder
    for fusion in d.fusions:
        fusion.balance.data = torch.tensor([1.0, 3.0])
    y = d.blocks[0](d.lateral(c4))
    for block, fusion, skip in zip([*d.blocks[1:], nn.Identity()], d.fusions, (c3, c2, c1), strict=True):
        w = fusion.balance.relu() / fusion.balance.relu().sum()
        y = F.interpolate(y, scale_factor=2, mode="bilinear")
        y = block(F.hardswish(fusion.conv(w[0] * fusion.skip(skip) + w[1] * y)))
    r = d.refine
    spatial, channel = y * r.spatial(y).sigmoid(), r.channel(y)
    y = F.hardswish(r.project(spatial + channel) + r.shortcut(y))
    wanted = F.interpolate(d.classifier(d.head(y)), scale_factor=4, mode="bilinear")
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)


def test_its_blocks_are_ours_and_their_mixer_is_free():
    model = unetformer(
        "test_glattn", num_classes=2, dim=32, mixer=MixerConfig(layout="full", position="rope", head_dim=8)
    )
    mixers = [m for m in model.decoder.modules() if isinstance(m, GlobalLocalAttention)]
    assert len(mixers) == 3
    assert model.eval()(torch.randn(1, 3, 50, 70)).shape == (1, 2, 50, 70)


def test_it_folds():
    model = trained(unetformer("test_glattn", num_classes=5, dim=16)).double()
    x = torch.randn(2, 3, 97, 131, dtype=torch.float64)
    folded = timm.utils.reparameterize_model(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x))


def test_it_is_traced_by_fx_for_any_size():
    model = trained(unetformer("test_glattn", num_classes=5, dim=16)).double()
    traced = torch.fx.symbolic_trace(model)
    for size in ((97, 131), (64, 64)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(traced(x), model(x))


def test_it_is_where_timm_s_keywords_put_its_backbone():
    model = unetformer("test_glattn", num_classes=5, dim=16, dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}


def test_an_image_s_logits_do_not_depend_on_its_batch():
    model = trained(unetformer("test_glattn", num_classes=5, dim=16))
    x = torch.randn(3, 3, 70, 90)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-5, rtol=1e-4)


def test_every_parameter_trains():
    model = unetformer("test_glattn", num_classes=5, dim=16).train()
    model(torch.randn(2, 3, 64, 96)).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_other_backbones_and_the_stem_s_map():
    body = timm.create_model("test_glattn", features_only=True, stem_features=True)
    assert UNetFormer(body, num_classes=2, dim=16).eval()(torch.randn(1, 3, 40, 60)).shape == (1, 2, 40, 60)
    assert unetformer("test_convnext", num_classes=2, dim=16).eval()(torch.randn(1, 3, 64, 96)).shape == (1, 2, 64, 96)


def test_the_nominal_size_is_the_backbone_s_too():
    windows = MixerConfig(layout="window", window_sizing="image", position="bias", head_dim=8)
    for img_size, cells in ((448, (14, 14)), ((448, 224), (14, 7)), (None, (7, 7))):
        model = unetformer(
            "test_glattn", num_classes=2, dim=16, img_size=img_size, mixer=windows, layout="window",
            window_sizing="image",
        )  # fmt: skip
        for part, stages in ((model.backbone, 4), (model.decoder, 3)):
            sizes = {(m.size.height, m.size.width) for m in part.modules() if isinstance(m, Window)}
            assert sizes == {cells}
            assert sum(isinstance(m, Window) for m in part.modules()) >= stages
    assert model.eval()(torch.randn(1, 3, 40, 60)).shape == (1, 2, 40, 60)


@pytest.mark.parametrize("name", ["test_convnext", "resnet18", "test_efficientnet", "poolformerv2_s12"])
def test_a_backbone_without_a_nominal_size_gets_none(name):
    options = {"num_classes": 2, "dim": 16, "mixer": MixerConfig(layout="full", position="bias", head_dim=8)}
    tables = [unetformer(name, img_size=s, **options).decoder.blocks[0].mixer.attn for s in (64, (64, 96))]
    assert [t.groups[0].position.table.shape[1:] for t in tables] == [(3, 3), (3, 5)]
    with pytest.raises(ValueError, match=r"img_size=0; give one side, or \(height, width\)"):
        unetformer(name, img_size=0, **options)
    with pytest.raises(TypeError, match="img_side"):
        unetformer(name, img_size=64, img_side=64, **options)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="give two or more maps' channels"):
        UNetFormerDecoder([64], num_classes=2, reductions=[32])
    with pytest.raises(ValueError, match="num_heads=8 does not divide"):
        unetformer("test_glattn", num_classes=2, dim=20)
