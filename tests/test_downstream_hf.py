"""Hugging Face transformers: the family behind its backbone, classifier and pipeline classes."""

import json

import pytest
import timm
import torch
from models import randomize
from PIL import Image

pytest.importorskip("transformers")

from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModelForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

NAMES = ["circle", "square", "star"]


def _backbone(**options):
    return AutoBackbone.from_config(TimmBackboneConfig(backbone="test_glattn", **options)).eval()


def test_a_backbone_gives_timm_s_maps():
    backbone = _backbone(out_indices=[0, 1, 2, 3])
    assert isinstance(backbone, TimmBackbone)
    assert backbone.channels == [16, 24, 32, 64]
    assert backbone.stage_names == ["stages.0", "stages.1", "stages.2", "stages.3"]
    body = timm.create_model("test_glattn", features_only=True).eval()
    body.load_state_dict(backbone._backbone.state_dict())
    x = torch.randn(2, 3, 96, 70)
    with torch.no_grad():
        for mine, wanted in zip(backbone(x).feature_maps, body(x), strict=True):
            torch.testing.assert_close(mine, wanted, atol=0, rtol=0)


def test_backbones_take_indices_strides_and_frozen_norms():
    x = torch.randn(1, 3, 64, 96)
    assert [m.shape[1:] for m in _backbone()(x).feature_maps] == [(64, 2, 3)]
    assert [m.shape[1] for m in _backbone(out_indices=[1, 3])(x).feature_maps] == [24, 64]
    assert [m.shape[2] for m in _backbone(out_indices=[2, 3], output_stride=8)(x).feature_maps] == [8, 8]
    assert _backbone(num_channels=1)(x[:, :1]).feature_maps[0].shape == (1, 64, 2, 3)
    frozen = _backbone(freeze_batch_norm_2d=True).train()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    frozen(x).feature_maps[0].sum().backward()


def test_a_backbone_comes_from_timm_s_folder(saved):
    model, folder = saved
    config = TimmBackboneConfig(backbone=f"local-dir:{folder}", out_indices=[1, 3])
    backbone = AutoBackbone.from_config(config).eval()
    # TimmBackbone.from_pretrained of transformers 5.23 resets every BatchNorm's statistics, ResNet's as well
    trained = timm.create_model(config.backbone, features_only=True, out_indices=[1, 3], pretrained=True)
    backbone._backbone.load_state_dict(trained.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        wanted = model.forward_intermediates(x, [1, 3], intermediates_only=True)
        for mine, theirs in zip(backbone(x).feature_maps, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_detector_on_a_backbone_saved_comes_back(tmp_path):
    config = DetrConfig(
        backbone_config=TimmBackboneConfig(backbone="test_glattn", out_indices=[1, 2, 3], freeze_batch_norm_2d=True),
        num_queries=5, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    model = DetrForObjectDetection(config).eval()
    x = torch.randn(2, 3, 96, 128)
    model.save_pretrained(tmp_path)
    again = DetrForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(x).logits, model(x).logits)


@pytest.fixture(scope="module", params=["test_glattn", "glattn_tiny_window", "glattn_tiny_performer"])
def saved(request, tmp_path_factory):
    """A model, and its folder as timm writes it for the Hub."""
    torch.manual_seed(1)
    # small, but with the variant's own layouts, tables and random matrices
    sizes = {"dims": (16, 24, 32, 64), "depths": (1, 2, 2, 1), "head_dim": 8} if "tiny" in request.param else {}
    model = randomize(timm.create_model(request.param, num_classes=3, **sizes))
    folder = tmp_path_factory.mktemp("saved") / request.param
    timm.models.save_for_hf(
        model, folder, model_config={"label_names": NAMES}, model_args=sizes, safe_serialization=True
    )
    # timm 1.0.31 says the number of classes twice, and transformers' wrapper then passes it twice; `glattn push`
    # says it once
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]["num_classes"]
    (folder / "config.json").write_text(json.dumps(config))
    return model, folder


def test_a_classifier_of_timm_s_folder(saved, tmp_path):
    model, folder = saved
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert isinstance(wrapped, TimmWrapperForImageClassification)
    assert wrapped.config.id2label == dict(enumerate(NAMES))
    x = torch.randn(2, 3, 96, 70)
    with torch.no_grad():
        wanted, (_, maps) = model(x), model.forward_intermediates(x)
        out = wrapped(x, output_hidden_states=True)
        torch.testing.assert_close(out.logits, wanted)
        for mine, theirs in zip(out.hidden_states, maps, strict=True):
            torch.testing.assert_close(mine, theirs)
        wrapped.save_pretrained(tmp_path / "theirs")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "theirs").eval()
        torch.testing.assert_close(again(x).logits, wanted)


def test_a_pipeline_names_what_timm_would(saved):
    model, folder = saved
    picture = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 60).convert("RGB")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        shares = model(transform(picture)[None]).softmax(-1)[0]
    classify = pipeline(
        "image-classification", model=str(folder), image_processor=AutoImageProcessor.from_pretrained(folder)
    )
    found = {entry["label"]: entry["score"] for entry in classify(picture, top_k=3)}
    assert found == pytest.approx(dict(zip(NAMES, shares.tolist(), strict=True)), abs=1e-5)


def test_a_classifier_fine_tunes_with_new_classes_and_checkpointing(saved):
    _, folder = saved
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    model.timm_model.set_grad_checkpointing()
    loss = model.train()(torch.randn(2, 3, 64, 64), labels=torch.tensor([1, 4])).loss
    loss.backward()
    assert model.timm_model.get_classifier().weight.shape == (5, 64)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class _Trainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        logits = model(inputs["image"])
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def test_the_trainer_trains_it(tmp_path):
    images = [{"image": torch.randn(3, 64, 64), "labels": number % 3} for number in range(8)]
    model = timm.create_model("test_glattn", num_classes=3)
    before = model.head.fc.weight.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=2, per_device_train_batch_size=4,
        remove_unused_columns=False, label_names=["labels"], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = _Trainer(model=model, args=arguments, train_dataset=images, eval_dataset=images)
    trainer.train()
    assert not torch.equal(model.head.fc.weight, before)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").is_file()
