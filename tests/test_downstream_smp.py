"""segmentation_models_pytorch: the family as its encoders, under every decoder."""

import warnings

import pytest
import timm
import torch
from models import scripted

from glattn.models.variants import VARIANTS

smp = pytest.importorskip("segmentation_models_pytorch")

from glattn.heads.smp import stem_encoder  # noqa: E402

DECODERS = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "UPerNet", "Segformer"]
DILATED = [("DeepLabV3", 8), ("DeepLabV3", 16), ("DeepLabV3Plus", 8), ("DeepLabV3Plus", 16), ("PAN", 16)]


def check(model, size=(128, 160)):
    """A forward at two sizes and a training step that reaches every parameter of the encoder."""
    model.eval()
    with torch.no_grad():
        for height, width in (size, (size[1], size[0])):
            assert model(torch.randn(2, 3, height, width)).shape == (2, 3, height, width)
    model.train()(torch.randn(2, 3, *size)).square().mean().backward()
    unused = [name for name, p in model.encoder.named_parameters() if p.grad is None and "head.fc" not in name]
    assert not unused


def test_an_encoder_takes_features_as_a_dictionary():
    encoder = smp.encoders.get_encoder(stem_encoder("test_glattn", feature_cls="dict"), depth=5).eval()
    maps = encoder(torch.randn(1, 3, 64, 96))
    assert [64 // m.shape[2] for m in maps] == [1, 2, 4, 8, 16, 32]


def test_a_decoder_on_the_stem_s_map_is_scripted():
    model = smp.Unet(stem_encoder("test_glattn"), encoder_weights=None, classes=2).eval()
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(scripted(model)(x), model(x))


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_takes_the_family_as_it_is(decoder):
    check(getattr(smp, decoder)("tu-test_glattn", encoder_weights=None, classes=3))


@pytest.mark.parametrize(("decoder", "stride"), DILATED)
def test_dilated_decoders_get_their_output_stride(decoder, stride):
    model = getattr(smp, decoder)("tu-test_glattn", encoder_weights=None, classes=3, encoder_output_stride=stride)
    assert model.encoder(torch.randn(1, 3, 128, 128))[-1].shape[-1] == 128 // stride
    check(model)


@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("decoder", ["Unet", "UnetPlusPlus", "Linknet"])
def test_depths_and_channels(decoder, depth):
    options = {} if decoder == "Linknet" else {"decoder_channels": (64, 32, 16, 16, 8)[-depth:]}
    model = getattr(smp, decoder)(
        "tu-test_glattn", encoder_weights=None, encoder_depth=depth, in_channels=5, classes=2, **options
    ).eval()
    assert model(torch.randn(1, 5, 64, 96)).shape == (1, 2, 64, 96)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("glattn_base", "glattn_large")])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_every_variant_is_an_encoder_at_every_output_stride(name, stride):
    encoder = smp.encoders.get_encoder(f"tu-{name}", in_channels=4, depth=5, output_stride=stride).eval()
    with torch.no_grad():
        maps = encoder(torch.randn(1, 4, 64, 96))
    assert [m.shape[1] for m in maps] == list(encoder.out_channels)
    assert [64 // m.shape[2] for m in maps] == [min(s, stride) for s in (1, 2, 4, 8, 16, 32)]


@pytest.mark.parametrize("decoder", ["Unet", "UnetPlusPlus", "MAnet", "Linknet"])
def test_u_shaped_decoders_get_a_map_at_stride_two(decoder):
    model = getattr(smp, decoder)(stem_encoder("test_glattn"), encoder_weights=None, classes=3)
    assert model.encoder.out_channels == [3, 8, 16, 24, 32, 64]
    maps = model.encoder(torch.randn(1, 3, 64, 96))
    assert [m.shape[1:] for m in maps][:3] == [(3, 64, 96), (8, 32, 48), (16, 16, 24)]
    check(model)


def test_the_stem_encoder_takes_the_decoder_s_channels_depth_and_stride():
    name = stem_encoder("test_glattn", drop_path_rate=0.2)
    model = smp.Unet(name, encoder_weights=None, in_channels=1, encoder_depth=4, decoder_channels=(32, 16, 8, 8)).eval()
    assert model(torch.randn(1, 1, 64, 96)).shape == (1, 1, 64, 96)
    model = smp.DeepLabV3Plus(name, encoder_weights=None, encoder_output_stride=16, classes=2).eval()
    assert model.encoder(torch.randn(1, 3, 64, 64))[-1].shape[-1] == 4
    with pytest.raises(ValueError, match="depth=6; give 1 to 5"):
        smp.encoders.get_encoder(name, depth=6)
    with pytest.raises(ValueError, match="in_chans=1: leave it out, and give the decoder in_channels=1"):
        stem_encoder("test_glattn", in_chans=1)


@pytest.mark.parametrize("in_channels", [1, 2, 5])
def test_the_stem_encoder_s_trained_weights_are_adapted_to_other_channels(in_channels):
    wanted = timm.create_model("glattn_atto", pretrained=True, in_chans=in_channels).stem.conv1.conv.weight
    name = stem_encoder("glattn_atto", pretrained=True)
    encoder = smp.Unet(name, encoder_weights=None, in_channels=in_channels).encoder
    assert encoder.out_channels[0] == in_channels
    # timm rounds to the file's own half precision
    torch.testing.assert_close(encoder.model.stem_conv1.conv.weight, wanted, atol=1e-3, rtol=1e-3)


def test_stem_encoders_of_one_model_stand_beside_each_other():
    names = [stem_encoder("glattn_atto", **options) for options in ({"pretrained": True}, {}, {"drop_path_rate": 0.1})]
    assert names[1] == "glattn_atto+stem"
    assert len(set(names)) == 3
    trained = timm.create_model("glattn_atto", pretrained=True).stem.conv1.conv.weight
    same = [torch.equal(smp.encoders.get_encoder(n).model.stem_conv1.conv.weight, trained) for n in names]
    assert same == [True, False, False]


def test_a_decoder_for_transformers_takes_it_too():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = smp.DPT("tu-test_glattn", encoder_weights=None, classes=3, decoder_readout="ignore")
    check(model, (96, 128))


def test_a_saved_model_comes_back(tmp_path):
    model = smp.Unet("tu-test_glattn", encoder_weights=None, classes=3).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(smp.from_pretrained(tmp_path).eval()(x), model(x))


@pytest.mark.export
def test_the_encoder_scripts_exports_and_keeps_its_maps():
    encoder = smp.encoders.get_encoder("tu-test_glattn", in_channels=3, depth=5).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = encoder(x)
        exported = torch.export.export(encoder, (x,)).module()(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, that scripting is on its way out
            scripted = torch.jit.script(encoder)(x)
    for mine, *others in zip(maps, exported, scripted, strict=True):
        for other in others:
            torch.testing.assert_close(mine, other)
