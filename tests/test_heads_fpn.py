"""The pyramid, and torchvision's detectors on it."""

from functools import partial

import pytest
import timm
import torch
from models import scripted
from timm.layers.norm_act import FrozenBatchNorm2d
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from glattn.heads import FPNBackbone, UNetFormer, fpn_backbone, unetformer
from glattn.layers import TABLES

LEVELS = {"pool": ["0", "1", "2", "3", "pool"], "p6p7": ["0", "1", "2", "p6", "p7"]}


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (33, 250)])
@pytest.mark.parametrize("extra", LEVELS)
def test_levels_have_their_names_channels_and_sizes(extra, size):
    backbone = fpn_backbone("test_glattn", out_channels=24, extra=extra).eval()
    levels = backbone(torch.randn(2, 3, *size))
    assert list(levels) == LEVELS[extra]
    assert backbone.out_channels == 24
    start = {"pool": 4, "p6p7": 8}[extra]
    for i, level in enumerate(levels.values()):
        assert level.shape == (2, 24, *(-(-side // (start * 2**i)) for side in size))


@pytest.mark.parametrize("name", ["test_glattn", "resnet18", "swin_tiny_patch4_window7_224"])
def test_heads_are_scripted(name):
    options = {"img_size": (64, 96), "window_size": 2} if name.startswith("swin") else {}
    x = torch.randn(2, 3, 64, 96)
    for head in (fpn_backbone, partial(unetformer, num_classes=2)):
        model = head(name, **options).eval()
        torch.testing.assert_close(scripted(model)(x), model(x))


@pytest.mark.filterwarnings("ignore:RCNN always returns:UserWarning")
def test_a_detector_is_scripted():
    detector = FasterRCNN(fpn_backbone("test_glattn"), num_classes=3, min_size=64, max_size=96).eval()
    images = [torch.rand(3, 80, 100)]
    torch.testing.assert_close(scripted(detector)(images)[1], detector(images))


@pytest.mark.parametrize("feature_cls", ["dict", "hook", "getter", "fx"])
def test_heads_take_every_wrapper_of_timm_s(feature_cls):
    x = torch.randn(2, 3, 64, 96)
    for head in (fpn_backbone, partial(unetformer, num_classes=2)):
        torch.manual_seed(0)
        wanted = head("test_glattn").eval()(x)
        torch.manual_seed(0)
        torch.testing.assert_close(head("test_glattn", feature_cls=feature_cls).eval()(x), wanted)


def test_maps_of_a_body_that_works_in_nhwc_are_turned():
    narrow = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
    backbone = fpn_backbone("swin_tiny_patch4_window7_224", out_channels=24, img_size=64, **narrow).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = backbone.body(x)
    assert [each.shape[1] for each in maps] == [16, 8, 4, 2]
    wanted = backbone.fpn({str(i): each.permute(0, 3, 1, 2) for i, each in enumerate(maps)})
    for name, level in backbone(x).items():
        assert torch.equal(level, wanted[name])
    assert UNetFormer(backbone.body, num_classes=2, dim=16).eval()(x).shape == (2, 2, 64, 64)


@pytest.mark.parametrize("extra", LEVELS)
def test_equal_weights_give_torchvision_s_pyramid(extra):
    backbone = fpn_backbone("test_glattn", out_channels=24, extra=extra).eval()
    channels = backbone.body.feature_info.channels()
    blocks = {"pool": LastLevelMaxPool, "p6p7": lambda: LastLevelP6P7(channels[-1], 24)}[extra]()
    theirs = FeaturePyramidNetwork(channels, 24, blocks)
    theirs.load_state_dict(backbone.fpn.state_dict())
    x = torch.randn(2, 3, 97, 131)
    wanted = theirs({str(i): f for i, f in enumerate(backbone.body(x))})
    levels = backbone(x)
    assert list(levels) == list(wanted)
    for name, level in levels.items():
        assert torch.equal(level, wanted[name])


def test_stages_norm_and_timm_s_keywords_are_the_caller_s():
    backbone = fpn_backbone(
        "test_glattn", out_indices=(0, 3), in_chans=1, norm_layer=nn.BatchNorm2d, drop_path_rate=0.1
    )
    assert list(backbone(torch.randn(1, 1, 64, 64))) == ["0", "1", "pool"]
    assert any(isinstance(m, nn.BatchNorm2d) for m in backbone.fpn.modules())
    assert list(fpn_backbone("test_glattn", out_indices=2)(torch.randn(1, 3, 64, 64))) == ["0", "1", "pool"]
    placed = fpn_backbone("test_glattn", dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in placed.parameters()} == {(torch.bfloat16, "meta")}


@pytest.mark.parametrize("name", ["test_glattn", "test_convnext.r160_in1k"])
@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_stages_do_not_move(name, frozen_stages):
    backbone = fpn_backbone(name, out_channels=8, frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    before = {k: v.clone() for k, v in backbone.body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    sum(level.square().mean() for level in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    frozen = ("nothing",) if frozen_stages < 0 else ("stem", *(f"stages_{i}." for i in range(frozen_stages)))
    moved = {k for k, v in backbone.body.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in moved if k.startswith(frozen)]
    for part in ("stem", *(f"stages_{i}." for i in range(4))):
        if not part.startswith(frozen):
            assert [k for k in moved if k.startswith(part)], part
    assert backbone.training
    assert not any(m.training for k, m in backbone.body.named_modules() if k.startswith(frozen))


@pytest.mark.parametrize("feature_cls", ["getter", "fx"])
@pytest.mark.parametrize("frozen_stages", [0, 1])
def test_stages_that_cannot_be_told_from_the_stem_are_not_frozen(feature_cls, frozen_stages):
    assert fpn_backbone("test_glattn", feature_cls=feature_cls, frozen_stages=-1).frozen == []
    with pytest.raises(
        ValueError, match=rf"^frozen_stages={frozen_stages}: a Feature\w+Net .*; give -1, or a body whose"
    ):
        fpn_backbone("test_glattn", feature_cls=feature_cls, frozen_stages=frozen_stages)


@pytest.mark.parametrize("extra", LEVELS)
@pytest.mark.parametrize(("name", "options"), [("test_glattn", {"stem_features": True}), ("resnet18", {})])
def test_a_map_at_stride_two_is_no_level(name, options, extra):
    backbone = fpn_backbone(name, extra=extra, out_channels=8, **options)
    assert backbone.body.feature_info.reduction() == {"pool": [4, 8, 16, 32], "p6p7": [8, 16, 32]}[extra]
    if options:
        backbone = fpn_backbone(name, extra=extra, out_channels=8, out_indices=range(5), **options).eval()
        assert backbone(torch.randn(1, 3, 64, 64))["0"].shape[-1] == 32


@pytest.mark.parametrize("fusion", TABLES["fusion"])
def test_frozen_norms_go_with_autocast(fusion):
    backbone = fpn_backbone("test_glattn", out_channels=8, frozen_bn=True, fusion=fusion, head_dim=4)
    x = torch.randn(1, 3, 64, 64)
    wanted = backbone(x)
    with torch.autocast("cpu", torch.bfloat16):
        given = backbone(x)
    for name, feature in given.items():
        assert (feature - wanted[name]).abs().max() < 0.05 * wanted[name].abs().max()


def test_frozen_norms_hold_statistics_and_output():
    torch.manual_seed(1)
    plain = fpn_backbone("test_glattn", out_channels=8).eval()
    torch.manual_seed(1)
    frozen = fpn_backbone("test_glattn", out_channels=8, frozen_bn=True).train()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.body.modules())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in frozen.body.modules())
    x = torch.randn(1, 3, 64, 64)
    for mine, wanted in zip(frozen(x).values(), plain(x).values(), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
    folded = timm.utils.reparameterize_model(frozen.eval())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in folded.modules())
    for mine, wanted in zip(folded(x).values(), plain(x).values(), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="extra='p6' is not one of pool, p6p7; did you mean 'p6p7'"):
        fpn_backbone("test_glattn", extra="p6")
    with pytest.raises(ValueError, match=r"frozen_stages=5; give -1 .* up to 4"):
        fpn_backbone("test_glattn", frozen_stages=5)
    with pytest.raises(ValueError, match=r"out_indices=\(3, 1\): give them from the finest"):
        fpn_backbone("test_glattn", out_indices=(3, 1))
    body = timm.create_model("test_glattn", features_only=True, out_indices=(0, 1))
    with pytest.raises(ValueError, match="up to 2"):
        FPNBackbone(body, frozen_stages=3)


def _detector(kind):
    """A small detector of 3 classes that takes images as they are, down to 96 pixels."""
    sizes = {"min_size": 96, "max_size": 224}
    if kind == "faster_rcnn":
        return FasterRCNN(fpn_backbone("test_glattn", out_channels=16, extra="pool"), num_classes=3, **sizes)
    anchors = AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    backbone = fpn_backbone("test_glattn", out_channels=16, extra="p6p7")
    return RetinaNet(backbone, num_classes=3, anchor_generator=anchors, **sizes)


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_torchvision_detectors_train_and_predict_at_mixed_sizes(kind):
    torch.manual_seed(0)
    model = _detector(kind)
    images = [torch.rand(3, 96, 160), torch.rand(3, 131, 97), torch.rand(3, 64, 200)]
    targets = [
        {"boxes": torch.tensor([[10.0, 12.0, 50.0, 60.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[5.0, 5.0, 90.0, 90.0], [20.0, 30.0, 60.0, 70.0]]), "labels": torch.tensor([2, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = sum(model.train()(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.backbone.parameters())
    with torch.no_grad():
        for image, found in zip(images, model.eval()(images), strict=True):
            assert set(found) == {"boxes", "labels", "scores"}
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"] <= torch.tensor([*image.shape[:0:-1]] * 2)).all()
