"""The stem's map at stride 2 as a feature, through each of timm's feature wrappers."""

import copy

import pytest
import timm
import torch
from timm.models._features import FeatureDictNet
from timm.utils import reparameterize_model

import glattn  # noqa: F401 (registers the family)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_glattn", stem_features=True).eval()


@pytest.fixture(scope="module")
def reference(model):
    """Images, and their maps computed by hand."""
    x = torch.randn(2, 3, 70, 97)
    with torch.no_grad():
        maps = [model.stem.act(model.stem.conv1(x))]
        y = model.stem(x)
        for stage in model.stages:
            y = stage(y)
            maps.append(y)
    return x, maps


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "getter", "fx"])
def test_every_wrapper_returns_the_stem_s_map(reference, kind):
    x, maps = reference
    # wrappers rename modules, so that the seed and not a checkpoint makes the weights equal
    torch.manual_seed(0)
    body = timm.create_model("test_glattn", features_only=True, stem_features=True, feature_cls=kind).eval()
    with torch.no_grad():
        out = body(x)
    assert body.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert body.feature_info.channels() == [8, 16, 24, 32, 64]
    for feature, wanted in zip(out.values() if kind == "dict" else out, maps, strict=True):
        torch.testing.assert_close(feature, wanted)


def test_wrappers_fold_and_checkpoint():
    body = timm.create_model("test_glattn", features_only=True, stem_features=True).eval()
    assert isinstance(body, FeatureDictNet)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for mine, wanted in zip(reparameterize_model(copy.deepcopy(body))(x), body(x), strict=True):
            torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
    body.train().set_grad_checkpointing()
    sum(f.mean() for f in body(x)).backward()
    assert body.stem_conv1.conv.weight.grad is not None


def test_forward_intermediates_and_pruning(model, reference):
    x, maps = reference
    with torch.no_grad():
        last, out = model.forward_intermediates(x, indices=[0, 2])
        torch.testing.assert_close(last, maps[-1])
        torch.testing.assert_close(out, [maps[0], maps[2]])
        for kept in range(5):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([kept]) == [kept]
            assert len(pruned.stages) == kept
            assert pruned.num_features == (16, 16, 24, 32, 64)[kept]
            torch.testing.assert_close(pruned.forward_intermediates(x, [kept], intermediates_only=True)[0], maps[kept])
            assert pruned.forward_features(x).shape[1] == pruned.num_features


def test_the_default_has_four_features_and_equal_weights(model):
    plain = timm.create_model("test_glattn")
    assert [info["reduction"] for info in plain.feature_info] == [4, 8, 16, 32]
    plain.load_state_dict(model.state_dict())


def test_a_stride_two_stem_has_no_map_in_between():
    with pytest.raises(ValueError, match=r"stem_features=True with stem_stride=2.*leave stem_features out"):
        timm.create_model("test_glattn", stem_features=True, stem_stride=2)
