"""What other libraries do with a timm model, done to the family as they do it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.optim
import timm.utils
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import cpu_offload
from models import randomize
from torch import nn

from glattn.layers import TABLES, GlobalLocalBlock
from glattn.models.variants import VARIANTS

SMALL = [name for name in VARIANTS if name not in ("glattn_base", "glattn_large")]


def test_nothing_in_names_or_attributes_misleads():
    """Tools tell transformers with tokens, NHWC maps, or Hugging Face's models by these."""
    for name in VARIANTS:
        assert "vit" not in name
        assert "swin" not in name
    model = timm.create_model("test_glattn")
    assert getattr(model, "output_fmt", "NCHW") == "NCHW"
    assert not [
        attribute
        for attribute in ("patch_embed", "cls_token", "num_prefix_tokens", "config")
        if hasattr(model, attribute)
    ]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    assert dict(model.named_modules())[model.default_cfg["first_conv"]].in_channels == 3
    assert dict(model.named_modules())[model.default_cfg["classifier"]].out_features == 1000


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:pytorch_grad_cam")
def test_grad_cam_on_the_last_stage(folded):
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model = randomize(timm.create_model("test_glattn", num_classes=3))
    if folded:
        model = timm.utils.reparameterize_model(model)
    x = torch.randn(2, 3, 96, 160)
    with grad_cam.GradCAM(model=model, target_layers=[model.stages[-1]]) as cam:
        heat = cam(input_tensor=x, targets=[targets.ClassifierOutputTarget(c) for c in (1, 2)])
    assert heat.shape == (2, 96, 160)
    # channels weighted by their mean gradient, negative evidence cut off, written out
    maps = model.forward_features(x).detach().requires_grad_()
    logits = model.forward_head(maps)
    (gradient,) = torch.autograd.grad(logits[0, 1] + logits[1, 2], maps)
    wanted = (gradient.mean((2, 3), keepdim=True) * maps).sum(1).relu().detach()
    for mine, plain in zip(heat, wanted, strict=True):
        top = np.unravel_index(mine.argmax(), mine.shape)
        assert plain[top[0] * 3 // 96, top[1] * 5 // 160] == plain.max()


def test_anomaly_detectors_pick_layers_by_the_names_of_feature_info():
    """As anomalib's TimmFeatureExtractor does."""
    layers = ["stages.1", "stages.2"]
    model = timm.create_model("test_glattn", features_only=True, exportable=True)
    names = [info["module"] for info in model.feature_info.info]
    indices = [names.index(layer) for layer in layers]
    torch.manual_seed(0)
    extractor = timm.create_model("test_glattn", features_only=True, exportable=True, out_indices=indices).eval()
    torch.manual_seed(0)
    whole = timm.create_model("test_glattn").eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = dict(zip(layers, extractor(x), strict=True))
        y = whole.stages[1](whole.stages[0](whole.stem(x)))
        torch.testing.assert_close(features["stages.1"], y)
        torch.testing.assert_close(features["stages.2"], whole.stages[2](y))
    assert extractor.feature_info.channels() == [24, 32]


def test_self_supervised_trainers_read_maps_and_pooled_features():
    """As lightly-train's wrapper of timm models does."""
    model = timm.create_model("test_glattn", num_classes=0).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        last, (features,) = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW")
        assert features.shape == (2, model.num_features, 2, 3)
        torch.testing.assert_close(last, features, atol=0, rtol=0)
        torch.testing.assert_close(model.forward_head(features), F.adaptive_avg_pool2d(features, 1).flatten(1))


class OpenMMLabBackbone(nn.Module):
    """As mmpretrain's, mmseg's and mmdet's TIMMBackbone does it."""

    def __init__(self, model_name, **kwargs):
        super().__init__()
        self.timm_model = timm.create_model(
            model_name, features_only=True, pretrained=False, in_chans=3, checkpoint_path="", **kwargs
        )
        self.timm_model.global_pool = self.timm_model.fc = self.timm_model.classifier = None
        self._is_init = True

    def forward(self, x):
        return self.timm_model(x)


def test_openmmlab_s_wrapper_trains_every_parameter():
    model = OpenMMLabBackbone("test_glattn", out_indices=(0, 1, 2, 3), output_stride=16, drop_path_rate=0.1)
    maps = model.train()(torch.randn(2, 3, 64, 96))
    assert [m.shape[1:] for m in maps] == [(16, 16, 24), (24, 8, 12), (32, 4, 6), (64, 4, 6)]
    sum(m.square().mean() for m in maps).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_variant_in_the_wrappers(name):
    maps = OpenMMLabBackbone(name).eval()(torch.randn(1, 3, 64, 96))
    assert [m.shape[2] for m in maps] == [16, 8, 4, 2]
    assert [m.shape[1] for m in maps] == timm.create_model(name, features_only=True).feature_info.channels()


def test_what_timm_s_train_py_does_to_a_model(tmp_path):
    """Its order: make, group by layer, average, save, load, pool for testing, fold."""
    torch.manual_seed(0)
    model = timm.create_model("test_glattn", num_classes=4, drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=None)
    model.set_grad_checkpointing()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) == 7  # stem, five blocks, head
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    saver = timm.utils.CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir="")
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    for _ in range(2):
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    saver.save_checkpoint(0, metric=1.0)
    fresh = timm.create_model("test_glattn", num_classes=4).eval()
    timm.models.load_checkpoint(fresh, str(tmp_path / "model_best.pth.tar"), use_ema=True)
    with torch.no_grad():
        wanted = ema.module.eval()(x)
        torch.testing.assert_close(fresh(x), wanted)
        torch.testing.assert_close(timm.utils.reparameterize_model(fresh)(x), wanted, atol=1e-4, rtol=1e-4)
    pooled, used = timm.layers.apply_test_time_pool(fresh, timm.data.resolve_model_data_config(fresh))
    assert pooled is fresh
    assert not used


def test_what_timm_s_validate_py_does_to_a_model(tmp_path):
    """Its order: make by the command's sizes, load, fold before ``eval()``, read the data config."""
    trained = randomize(timm.create_model("test_glattn", num_classes=4))
    torch.save({"state_dict": trained.state_dict(), "arch": "test_glattn"}, tmp_path / "checkpoint.pth.tar")
    said = {"img_size": 64, "in_chans": None, "input_size": None}
    options = timm.models.resolve_model_input_args(
        "test_glattn", said, pretrained=False, num_classes=4, global_pool=None, scriptable=True
    )
    model = timm.create_model(**options)
    timm.models.load_checkpoint(model, str(tmp_path / "checkpoint.pth.tar"), use_ema=False)
    assert model.training
    model = timm.utils.reparameterize_model(model)
    config = timm.data.resolve_input_data_config(model, said, use_test_size=True)
    assert config["input_size"] == (3, 64, 64)
    x = torch.randn(2, *config["input_size"])
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), trained.eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{axis: kind} for axis, table in TABLES.items() for kind in table] + [{"abs_pos": "stages"}],
    ids=lambda options: "=".join(*options.items()),
)
def test_accelerate_offloads_every_mechanism_by_layers(options):
    """A parameter is on its device only while the forward of the module that owns it runs."""
    torch.manual_seed(0)
    model = randomize(timm.create_model("test_glattn", num_classes=3, img_size=64, head_dim=4, **options)).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        out = cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)(x)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", TABLES["position"])
def test_every_modules_output_is_of_tensors(position):
    """As tools that print shapes take them: a tensor, or a list of them."""
    model = timm.create_model("test_glattn", position=position).eval()
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(torch.randn(1, 3, 64, 64))
    assert len(seen) > 50
    assert all(isinstance(o, torch.Tensor) or all(isinstance(part, torch.Tensor) for part in o) for o in seen)


def test_fsdp2_by_block_takes_the_same_step(one_process):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = timm.create_model("test_glattn", num_classes=3, img_size=64)
    sharded = copy.deepcopy(model)
    blocks = [module for module in sharded.modules() if isinstance(module, GlobalLocalBlock)]
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert len(blocks) == 5
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    x, y = torch.randn(4, 3, 64, 96), torch.tensor([0, 1, 2, 1])
    for network in (model, sharded):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        F.cross_entropy(network.train()(x), y).backward()
        optimizer.step()
    for (name, mine), wanted in zip(sharded.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), wanted, atol=1e-5, rtol=1e-4, msg=name)


def _digits():
    """scikit-learn's digits as (images, labels) to train on, and held out, at 32 pixels."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = F.interpolate(torch.from_numpy(data.images[order] / 8 - 1).float()[:, None], size=32, mode="bilinear")
    labels = torch.from_numpy(data.target[order])
    images = images.expand(-1, 3, -1, -1).contiguous()
    return (images[360:], labels[360:]), (images[:360], labels[:360])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_static_int8_loses_less_than_a_point_on_digits(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from glattn.export import export

    (images, labels), (held_images, held_labels) = _digits()
    model = timm.create_model("test_glattn", num_classes=10, img_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps, batch = 230, 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,))
        loss = F.cross_entropy(model.train()(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    exported = export(model.eval(), "onnx", tmp_path / "float.onnx", img_size=32)
    # its own inference of symbolic shapes does not know every operator of the exporter; onnx's does
    quant_pre_process(str(exported.path), str(tmp_path / "ready.onnx"), skip_symbolic_shape=True)

    class Calibration(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(images[:256].split(32))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch.numpy()}

    quantize_static(
        str(tmp_path / "ready.onnx"), str(tmp_path / "int8.onnx"), Calibration(),
        # unsigned activations saturate on CPUs without VNNI, and cost a point there
        per_channel=True, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip

    def accuracy(path):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"image": held_images.numpy()})
        return (torch.from_numpy(logits).argmax(1) == held_labels).float().mean().item()

    plain, quantized = accuracy(exported.path), accuracy(tmp_path / "int8.onnx")
    weights = b"".join(p.read_bytes() for p in Path(tmp_path).glob("int8.onnx*"))
    assert b"QuantizeLinear" in weights
    assert plain > 0.95, json.dumps({"float": plain, "int8": quantized})
    assert quantized > plain - 0.01
